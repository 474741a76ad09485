"""Small folders of pictures, a tiny model and, where it is about results, real photographs with real weights."""

import json
import os
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
from anomalib.data import Folder
from PIL import Image

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.quickstart import prepare_cells, prepare_weights

FULL_TRIALS = os.environ.get("TRIALS") == "full"  # make trials
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "reliability.json"
# One for all: a core of OpenVINO 2026.4 that outlives an older one leaves a freed signal stack behind, and the process
# crashes when the next worker of a data loader ends.
CORE = ov.Core()
TINY = {
    "backbone": "resnet18",
    "layers": ["layer1"],
    "pre_trained": False,
    "pretrain_embed_dimension": 16,
    "target_embed_dimension": 16,
    "discriminator_hidden": 8,
}


def tiny_model(**arguments: object) -> SimpleNet:
    size = arguments.pop("image_size", (64, 64))
    arguments.setdefault("pre_processor", SimpleNet.configure_pre_processor(size))
    return SimpleNet(**{**TINY, **arguments})


def record(trial: str, **metrics: object) -> None:
    """Keep the metrics of a full trial."""
    if FULL_TRIALS:
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        RESULTS.write_text(json.dumps({**kept, trial: metrics}, indent=1) + "\n")


def write_images(folder: Path, count: int, size: tuple[int, int] = (80, 64), seed: int = 0) -> None:
    noise = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{index:03}.png")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folder with train/good (5), test/good (4), test/bad (4) and masks of bad."""
    root = tmp_path / "pictures"
    for seed, (part, count) in enumerate({"train/good": 5, "test/good": 4, "test/bad": 4}.items()):
        write_images(root / part, count, seed=seed)
    (root / "ground_truth" / "bad").mkdir(parents=True)
    for path in (root / "test" / "bad").iterdir():
        mask = np.zeros((80, 64), dtype=np.uint8)
        mask[20:40, 10:30] = 255
        Image.fromarray(mask).save(root / "ground_truth" / "bad" / path.name)
    return root


def folder_data(root: Path, masks: bool = True, **arguments: object) -> Folder:
    defaults = {
        "name": "pictures",
        "root": root,
        "normal_dir": "train/good",
        "normal_test_dir": "test/good",
        "abnormal_dir": "test/bad",
        "mask_dir": "ground_truth/bad" if masks else None,
        "train_batch_size": 2,
        "eval_batch_size": 3,
        "num_workers": 0,
        "seed": 0,
    }
    return Folder(**{**defaults, **arguments})


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with real weights, ``efficientnet_lite0``, and real photographs, ``mono``."""
    root = tmp_path_factory.mktemp("real")
    prepare_weights(root / "efficientnet_lite0", "lite0")
    prepare_cells(root / "mono", "mono")
    return root
