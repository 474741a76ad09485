"""What each kind of OpenVINO export costs in accuracy, and saves in size and time.

    python tests/benchmarks/deployment.py --ckpt_path model.ckpt --data configs/data/elpv.yaml

Exports a checkpoint in every ``compression_type`` and compares each file with the checkpoint on the test images that
calibrated nothing: image AUROC, scores, labels. Latency (one image at a time) and throughput come from OpenVINO's
``benchmark_app``, files in turns, as multiples of those of the export without compression. A second table compares the
latter, and the checkpoint in PyTorch, with the backbone alone, cut off after its last layer: each in turns with it.
"""

import argparse
import logging
import multiprocessing
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from anomalib.data import AnomalibDataModule, ImageBatch, InferenceBatch
from anomalib.deploy import CompressionType
from jsonargparse import ArgumentParser
from lightning import seed_everything
from measure import interleaved, save, show
from torchmetrics.functional.classification import binary_auroc

from anomalib_simplenet import SimpleNet

TYPES = ["none", *(kind.value for kind in CompressionType)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt_path", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="file as those of configs/data")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--seconds", type=int, default=5, help="of each run of benchmark_app")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in args.types:  # each in a process of its own: NNCF's accuracy control leaves one behind that crashes
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                files[name] = pool.submit(export, args.ckpt_path, args.data, name, Path(folder) / name).result()
            print(f"exported {name}", flush=True)
        rows = compare(*load(args.ckpt_path, args.data), files)
        times = measure(files, args.seconds, args.repeats)
        backbone = against_backbone(*load(args.ckpt_path, args.data), files["none"])
    base = times["none"]
    for row in rows:
        latency, throughput = times[row["export"]]
        row |= {"latency": latency / base[0], "throughput": throughput / base[1]}
    show("Against the checkpoint; latency and throughput as multiples of the export without compression", rows)
    show("Median latency of one image, multiples of the backbone's", backbone)
    save(
        "deployment", {name: str(value) for name, value in vars(args).items()}, {"exports": rows, "backbone": backbone}
    )


def load(ckpt_path: Path, data: Path) -> tuple[SimpleNet, AnomalibDataModule]:
    """The model, and the data in the same split each time."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    seed_everything(0)
    reader = ArgumentParser()
    reader.add_subclass_arguments(AnomalibDataModule, "data")
    datamodule = reader.instantiate_classes(reader.parse_args([f"--data={data}"])).data
    datamodule.setup()
    return SimpleNet.load_from_checkpoint(ckpt_path, map_location="cpu").eval(), datamodule


def export(ckpt_path: Path, data: Path, name: str, folder: Path) -> Path:
    """Export in one of the types."""
    model, datamodule = load(ckpt_path, data)
    kind = None if name == "none" else CompressionType(name)
    return model.to_openvino(folder, compression_type=kind, datamodule=datamodule)


@torch.no_grad()
def compare(model: SimpleNet, datamodule: AnomalibDataModule, files: dict[str, Path]) -> list[dict[str, Any]]:
    """Answers of exported models beside those of the checkpoint."""
    batches = list(datamodule.test_dataloader())
    labels = torch.cat([batch.gt_label for batch in batches])
    scores, decisions = _answers(model, batches)
    rows = []
    for name, path in files.items():
        own, decided = _answers(_openvino(path), batches)
        rows.append(
            {
                "export": name,
                "images": len(labels),
                "image AUROC": f"{binary_auroc(own, labels.int()):.4f}",
                "AUROC lost": f"{binary_auroc(scores, labels.int()) - binary_auroc(own, labels.int()):.4f}",
                "largest score difference": f"{(own - scores).abs().max():.4f}",
                "same labels": f"{(decided == decisions).float().mean():.3f}",
                "MiB": f"{(path.stat().st_size + path.with_suffix('.bin').stat().st_size) / 2**20:.1f}",
            }
        )
    return rows


def _openvino(path: Path) -> Callable[[torch.Tensor], InferenceBatch]:
    compiled = ov.Core().compile_model(path, "CPU")

    def run(images: torch.Tensor) -> InferenceBatch:
        answer = compiled(images.numpy())
        return InferenceBatch(*(torch.tensor(answer[name]) for name in InferenceBatch._fields))

    return run


def _answers(
    run: Callable[[torch.Tensor], InferenceBatch], batches: list[ImageBatch]
) -> tuple[torch.Tensor, torch.Tensor]:
    answers = [run(batch.image) for batch in batches]
    return torch.cat([answer.pred_score for answer in answers]), torch.cat([answer.pred_label for answer in answers])


def measure(files: dict[str, Path], seconds: int, repeats: int) -> dict[str, tuple[float, float]]:
    """Median latency and throughput by benchmark_app, of the files in turns."""
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in files}
    for _ in range(repeats):
        for name, path in files.items():
            latency = _benchmark_app(path, seconds, "latency", r"Median:\s+([\d.]+)")
            throughput = _benchmark_app(path, seconds, "throughput", r"Throughput:\s+([\d.]+)")
            speeds[name].append((latency, throughput))
    return {name: tuple(map(statistics.median, zip(*values, strict=True))) for name, values in speeds.items()}


@torch.inference_mode()
def against_backbone(
    model: SimpleNet, datamodule: AnomalibDataModule, exported: Path, turns: int = 200
) -> list[dict[str, Any]]:
    """Latency in OpenVINO (float32) and PyTorch, for images of the model's size and, in OpenVINO, of 300 x 300.

    Images of the model's size go to a file exported for that size alone, too, which does not resize.
    The backbone in eight bits, as NNCF quantizes it by default, is about the least that an export can take.
    """
    photograph = torch.rand(1, 3, 300, 300)
    image = torch.rand_like(model.pre_processor.transform(photograph))
    core, hint = ov.Core(), {"INFERENCE_PRECISION_HINT": "f32"}
    backbone = ov.convert_model(Backbone(model).eval(), example_input=image, input=list(image.shape))
    images = nncf.Dataset(datamodule.val_dataloader(), lambda batch: model.pre_processor.transform(batch.image[:1]))
    quantised = nncf.quantize(backbone, images)
    fixed = model.to_openvino(exported.parent / "fixed", input_size=tuple(image.shape[-2:]))
    files = (backbone, quantised, exported, fixed)
    cut_off, eight_bits, whole, unresized = (core.compile_model(each, "CPU", hint) for each in files)
    cases = {
        "backbone": lambda: cut_off(image.numpy()),
        "backbone in eight bits": lambda: eight_bits(image.numpy()),
        "export for this size alone": lambda: unresized(image.numpy()),
        "export": lambda: whole(image.numpy()),
        "export, 300 x 300": lambda: whole(photograph.numpy()),
    }
    tables = {"OpenVINO": interleaved(cases, turns)}
    # Not in turns with those: PyTorch's threads wait actively for a while, which slows down whatever follows.
    cases = {"backbone": lambda: model.model.feature_extractor(image), "SimpleNet": lambda: model.model(image)}
    tables["PyTorch"] = interleaved(cases, turns)
    return [
        {"in": name, "what": case, "latency": seconds / table["backbone"]}
        for name, table in tables.items()
        for case, seconds in table.items()
    ]


class Backbone(torch.nn.Module):
    """A model's feature extractor, with a tuple as output."""

    def __init__(self, model: SimpleNet) -> None:
        super().__init__()
        self.extractor = model.model.feature_extractor

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.extractor(image).values())


def _benchmark_app(path: Path, seconds: int, hint: str, pattern: str) -> float:
    program = Path(sys.executable).parent / "benchmark_app"
    command = [program, "-m", path, "-d", "CPU", "-hint", hint, "-t", seconds]
    shape = ["-shape", "[1,3,300,300]", "-data_shape", "[1,3,300,300]"]
    output = subprocess.run([*map(str, command), *shape], capture_output=True, text=True, check=True).stdout
    return float(re.findall(pattern, output)[-1])


if __name__ == "__main__":
    main()
