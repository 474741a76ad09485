"""What the options that make training faster, but are not exact, do to accuracy.

    python -m anomalib_simplenet.quickstart --prepare-only
    python tests/benchmarks/options.py --folder elpv_mono=datasets/elpv/mono --folder NAME=FOLDER

Trains ``configs/model/simplenet_edge.yaml`` through anomalib's engine on each folder (train/good, test/good, test/*
and, where there are masks, ground_truth/*), with each seed. The metrics are those of the last epoch on the half of the
test images that anomalib leaves for testing; the split is the same for all. Times are those of training without
validation.
"""

import argparse
import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from anomalib.data import Folder
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from measure import save, show

from anomalib_simplenet import SimpleNet

VARIANTS: dict[str, dict[str, Any]] = {
    "all patches": {"patch_fraction": 1.0},
    "1/4 of the patches": {"patch_fraction": 1 / 4},
    "1/8 of the patches": {"patch_fraction": 1 / 8},
    "1/8, 4 times the epochs": {"patch_fraction": 1 / 8, "times": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    runs = []
    for seed in args.seeds:
        for folder in args.folder:
            name, _, path = folder.partition("=")
            for variant in args.variants:
                settings = dict(VARIANTS[variant])
                epochs = args.epochs * settings.pop("times", 1)
                metrics = train(name, Path(path), seed, epochs, settings)
                runs.append({"data": name, "variant": variant, "seed": seed, **metrics})
                print(runs[-1], flush=True)
    tables = {"summary": summarise(runs), "runs": runs}
    show("Mean and standard deviation over the seeds", tables["summary"])
    save("options", {**vars(args), "folder": list(dict.fromkeys(run["data"] for run in runs))}, tables)


def train(name: str, folder: Path, seed: int, epochs: int, settings: dict[str, Any]) -> dict[str, float]:
    """Figures of the last epoch, and seconds of training."""
    times = TrainingTime()
    tested = sorted(path for path in (folder / "test").iterdir() if path.name != "good")
    masks = [folder / "ground_truth" / path.name for path in tested]
    data = Folder(
        name,
        normal_dir=folder / "train" / "good",
        normal_test_dir=folder / "test" / "good",
        abnormal_dir=tested,
        mask_dir=masks if masks[0].is_dir() else None,
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        seed=0,
    )
    seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            callbacks=[times],
            max_epochs=epochs,
            accelerator="cpu",
            default_root_dir=results,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
        )
        overrides = {f"model.{key}": value for key, value in {"visualizer": False, **settings}.items()}
        model = SimpleNet.from_config("configs/model/simplenet_edge.yaml", **overrides)
        metrics = engine.train(model, datamodule=data)[0]
    return {**{key: round(value, 4) for key, value in metrics.items()}, "seconds": round(times.seconds, 1)}


class TrainingTime(Callback):
    """From the first step to the last, with what comes before the first epoch."""

    def on_fit_start(self, *_args: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_args: object) -> None:
        self.seconds = time.perf_counter() - self.start


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each data set and variant."""
    rows = []
    for data in dict.fromkeys(run["data"] for run in runs):
        unit = 0.0
        for variant in dict.fromkeys(run["variant"] for run in runs):
            chosen = [run for run in runs if (run["data"], run["variant"]) == (data, variant)]
            seconds = statistics.median(run["seconds"] for run in chosen)
            unit = unit or seconds
            row = {"data": data, "variant": variant}
            for figure in ("image_AUROC", "pixel_AUROC", "pixel_AUPRO"):
                values = [run[figure] for run in chosen if figure in run]
                row[figure] = f"{statistics.mean(values):.3f} ± {statistics.pstdev(values):.3f}" if values else ""
            rows.append({**row, "training time": seconds / unit})
    return rows


if __name__ == "__main__":
    main()
