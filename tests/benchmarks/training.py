"""What an epoch of training costs, beside the authors' release and anomalib's own models.

    git clone https://github.com/DonaldRR/SimpleNet RELEASE
    python tests/benchmarks/training.py --release RELEASE

WideResNet-50-2 with random weights, images of 288 x 288 read from files by the training process, the paper's settings
and batch size. All in one process, in turns, medians; memory is the peak of a fresh process, beyond what importing
takes. Patchcore keeps a hundredth of its patches, Padim 100 features a position; of both, as they train in one pass,
it is the time of all of the training.
"""

import argparse
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, Glass, Padim, Patchcore, Supersimplenet
from lightning.pytorch.callbacks import Callback
from measure import peak_memory, random_weights, save, show
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.models import wide_resnet50_2
from torchvision.transforms import v2

from anomalib_simplenet import SimpleNet

BACKBONE, LAYERS, SIDE = "wide_resnet50_2", ["layer2", "layer3"], 288
TRANSFORM = v2.Compose(
    [
        v2.Resize((SIDE, SIDE), antialias=True),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
    ]
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", type=Path, help="clone of the authors' repository")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 48], help="the first is for the comparison")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip-others", action="store_true", help="leave out anomalib's models")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in args.images:
            write_images(folder / str(count), count)
        images = folder / str(args.images[0])
        cases: dict[str, Callable[[], list[float]]] = {
            "SimpleNet, no cache": partial(epochs, make_simplenet, images, args, 1, feature_cache=False),
            "SimpleNet": partial(epochs, make_simplenet, images, args, 3),
            "SimpleNet, 1/8 of the patches": partial(epochs, make_simplenet, images, args, 3, patch_fraction=1 / 8),
        }
        if args.release:
            cases = {"authors' release": partial(release_epoch, args, images), **cases}
        if not args.skip_others:
            for other in (Supersimplenet, Glass, Patchcore, Padim):
                cases[other.__name__] = partial(epochs, partial(make_other, other), images, args, 1)
        tables = {"epochs": in_turns(cases, args.repeats)}
        show(
            f"Seconds of an epoch, as multiples of an epoch of SimpleNet from the second on ({args.images[0]} images)",
            tables["epochs"],
        )
        tables["images"] = [{"images": count, **growth(folder / str(count), args)} for count in args.images]
        show("Seconds of an epoch, as multiples of one without cache, as the number of images grows", tables["images"])
        if args.device == "cpu":
            cases = {"SimpleNet": partial(epochs, make_simplenet, images, args, 2)}
            if args.release:
                cases = {"authors' release": partial(release_epoch, args, images), **cases}
            mib = {label: peak_memory(_same, case) / 2**20 for label, case in cases.items()}
            tables["memory"] = [
                {"": label, "MiB": round(size), "of the first": size / next(iter(mib.values()))}
                for label, size in mib.items()
            ]
            show("Peak memory of training", tables["memory"])
    save("training", {**vars(args), "release": args.release is not None}, tables)


def write_images(folder: Path, count: int) -> None:
    """Write random pictures that compress and decode as photographs do."""
    noise = np.random.default_rng(0)
    (folder / "good").mkdir(parents=True)
    for index in range(count):
        small = Image.fromarray(noise.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        small.resize((400, 400), Image.Resampling.BICUBIC).save(folder / "good" / f"{index:03}.png")


def in_turns(cases: dict[str, Callable[[], list[float]]], repeats: int) -> list[dict]:
    """First and later epochs of each case."""
    seconds: dict[str, list[list[float]]] = {label: [] for label in cases}
    for _ in range(repeats):
        for label, case in cases.items():
            seconds[label].append(case())
    unit = np.median([epoch for run in seconds["SimpleNet"] for epoch in run[1:]])
    return [
        {
            "": label,
            "first epoch": float(np.median([run[0] for run in runs]) / unit),
            "later epochs": float(np.median([epoch for run in runs for epoch in run[1:] or run]) / unit),
        }
        for label, runs in seconds.items()
    ]


def growth(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """First and later epochs with the cache, in one without."""
    plain = epochs(make_simplenet, folder, args, 2, feature_cache=False)
    first, *later = epochs(make_simplenet, folder, args, 3)
    unit = float(np.mean(plain))
    return {"no cache": 1.0, "first epoch": first / unit, "later epochs": float(np.mean(later)) / unit}


def make_simplenet(**arguments: Any) -> SimpleNet:  # noqa: ANN401
    return SimpleNet(backbone=BACKBONE, layers=LAYERS, pre_trained=False, **arguments)


def make_other(kind: type[AnomalibModule]) -> AnomalibModule:
    arguments: dict[str, Any] = {"pre_processor": kind.configure_pre_processor((SIDE, SIDE)), "evaluator": False}
    if kind is Padim:
        arguments |= {"backbone": BACKBONE, "n_features": 100}
    elif kind is Patchcore:
        arguments |= {"backbone": BACKBONE, "layers": LAYERS, "coreset_sampling_ratio": 0.01}
    elif kind is Glass:
        arguments |= {"backbone": BACKBONE, "layers": LAYERS, "input_shape": (SIDE, SIDE)}
    with random_weights():
        return kind(**arguments)


class EpochTimes(Callback):
    """Seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, *_args: object) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Any, *_args: object) -> None:  # noqa: ANN401
        if trainer.strategy.root_device.type != "cpu":
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


def epochs(
    make: Callable[..., AnomalibModule],
    images: Path,
    args: argparse.Namespace,
    count: int,
    **arguments: Any,  # noqa: ANN401
) -> list[float]:
    """Seconds of epochs of training through anomalib's engine."""
    data = Folder(
        "pictures",
        normal_dir=images / "good",
        train_batch_size=args.batch,
        num_workers=0,
        val_split_mode="none",
        test_split_mode="none",
    )
    times, model = EpochTimes(), make(**arguments)
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            callbacks=[times],
            max_epochs=count,
            accelerator="gpu" if args.device == "cuda" else "cpu",
            default_root_dir=results,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            logger=False,
        )
        start = time.perf_counter()
        engine.fit(model, datamodule=data)
        whole = time.perf_counter() - start
    return [whole] if isinstance(model, Patchcore | Padim) else times.seconds


class Pictures(Dataset):
    """The release's form of an item."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": TRANSFORM(Image.open(self.paths[index]).convert("RGB"))}


def release_epoch(args: argparse.Namespace, images: Path) -> list[float]:
    """Seconds of an epoch of the authors' own training loop, with the arguments of their run.sh."""
    # Modules that it imports for other purposes than training, and that may not be installed.
    for name, content in {
        "metrics": {},
        "utils": {"plot_segmentation_images": None},
        "torch.utils.tensorboard": {"SummaryWriter": None},
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        sys.modules[name] = module
    sys.path.insert(0, str(args.release))
    import simplenet

    net = simplenet.SimpleNet(args.device)
    net.load(
        backbone=wide_resnet50_2(weights=None),
        layers_to_extract_from=LAYERS,
        device=args.device,
        input_shape=(3, SIDE, SIDE),
        pretrain_embed_dimension=1536,
        target_embed_dimension=1536,
        gan_epochs=1,
        noise_std=0.015,
        dsc_hidden=1024,
        dsc_layers=2,
        dsc_margin=0.5,
        pre_proj=1,
    )
    net.logger = SimpleNamespace(g_iter=0, step=lambda: None, logger=SimpleNamespace(add_scalar=lambda *_: None))
    loader = DataLoader(Pictures(images / "good"), args.batch, shuffle=True)
    start = time.perf_counter()
    net._train_discriminator(loader)
    return [time.perf_counter() - start]


def _same(case: Callable[[], object]) -> Callable[[], object]:
    return case


if __name__ == "__main__":
    main()
