"""Whether a rate of false alarms holds, and how many defects it leaves detected.

    python tests/benchmarks/accuracy.py --prepare
    python tests/benchmarks/false_alarms.py --threads 1    # elpv_mono elpv_poly magnetic_tile mvtec_screw

Each model of ``accuracy.py`` is trained once on all training images, and scores all test images;
``results/false_alarms_scores.csv`` keeps the raw scores, and what is found there is not trained again. Then the normal
test images are split at random 200 times: one half gives the threshold, by the rule of ``false_alarm_rate``, the other
counts false alarms, and recall and image AUROC are those of all test images. ``results/false_alarms.csv`` has the
means and the standard error of the mean over the splits; it is empty where half of the images are too few for the rate.
"""

import argparse
import csv
import logging
import statistics
import warnings
from typing import Any

import numpy as np
import torch
from accuracy import data_set, trained_predictions
from measure import RESULTS, show
from sklearn.metrics import roc_auc_score

from anomalib_simplenet.calibration import allowed_alarms, needed_images

SCORES, TABLE = RESULTS / "false_alarms_scores.csv", RESULTS / "false_alarms.csv"
RATES = (0.1, 0.05, 0.02, 0.01)
SPLITS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["elpv_mono", "elpv_poly", "magnetic_tile", "mvtec_screw"])
    parser.add_argument("--models", nargs="+", default=["SimpleNet", "Padim", "Patchcore, 1 %"], metavar="MODEL")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for data in args.data:
        for model in args.models:
            score(data, model)
    table = [split(data, model, rate) for data, model in sorted(known()) for rate in RATES]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    show(f"False alarms (recall), in %, mean of {SPLITS} splits", summary(table))


def score(data: str, model: str) -> None:
    """Train once, and keep the scores of all test images."""
    if (data, model) in known():
        return
    # All test images: the config would keep half of them for validation.
    predictions = trained_predictions(
        data_set(data, val_split_mode="none", mask_dir=None), "efficientnet_lite0", model, 0
    )
    labels, scores = (
        torch.cat([getattr(each, name).flatten() for each in predictions]) for name in ("gt_label", "pred_score")
    )
    parts = [" ".join(f"{each:.5g}" for each in scores[labels == kind].tolist()) for kind in (0, 1)]
    new = not SCORES.is_file()
    with SCORES.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["data", "model", "normal", "defective"])
        writer.writerow([data, model, *parts])
    print(data, model, len(scores), flush=True)


def known() -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Scores of normal and of defective images, by data and model."""
    if not SCORES.is_file():
        return {}
    with SCORES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    kinds = ("normal", "defective")
    return {(row["data"], row["model"]): tuple(np.array(row[kind].split(), float) for kind in kinds) for row in rows}


def split(data: str, model: str, rate: float) -> dict[str, Any]:
    """False alarms and recall at a rate, over random splits of the normal images."""
    normal, defective = known()[data, model]
    count = len(normal) // 2
    auroc = roc_auc_score([0] * len(normal) + [1] * len(defective), np.concatenate([normal, defective]))
    row = {"data": data, "model": model, "image_AUROC": round(auroc, 4), "normal": len(normal)}
    row |= {"calibration": count, "rate": rate}
    if count < needed_images(rate):
        return {**row, "false_alarm_rate": "", "standard_error": "", "recall": ""}
    draw, alarms, recalls = np.random.default_rng(0), [], []
    for _ in range(SPLITS):
        shuffled = draw.permutation(normal)
        threshold = np.sort(shuffled[:count])[count - allowed_alarms(rate, count)]
        alarms.append(float((shuffled[count:] > threshold).mean()))
        recalls.append(float((defective > threshold).mean()))
    error = statistics.stdev(alarms) / SPLITS**0.5
    values = {"false_alarm_rate": statistics.mean(alarms), "standard_error": error, "recall": statistics.mean(recalls)}
    return {**row, **{name: round(value, 4) for name, value in values.items()}}


def summary(table: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A line for each data set and model, a column for each rate."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    for row in table:
        start = {"data": row["data"], "model": row["model"], "image AUROC": f"{row['image_AUROC']:.3f}"}
        line = lines.setdefault((row["data"], row["model"]), start)
        cell = f"{row['calibration']} images, {needed_images(row['rate'])} needed"
        if row["recall"] != "":
            alarms, error, recall = (100 * row[name] for name in ("false_alarm_rate", "standard_error", "recall"))
            cell = f"{alarms:.1f} ± {error:.1f} ({recall:.0f})"
        line[f"{100 * row['rate']:g} %"] = cell
    return list(lines.values())


if __name__ == "__main__":
    main()
