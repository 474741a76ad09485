"""Check an exported model against its checkpoint on a folder of images, and measure its speed on this machine.

Prints the largest differences of scores, anomaly maps, masks (share of pixels) and p-values, the images whose labels
differ, and size, precision, threads, latency and throughput in OpenVINO, throughput by its benchmark_app. An .onnx file
is compared in onnxruntime. Exit code: 0 if all labels agree, or all scores where there are no labels, 1 if some differ,
2 if an input cannot be used. Images of the validation may differ by rounding: in their p-value by 1 / (n + 1), in their
label where their score became the threshold. Sensitivities and rates given for the export are not the checkpoint's:
labels differ then.
"""

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from tempfile import TemporaryDirectory
from time import perf_counter

import numpy as np
import openvino as ov
import torch
from anomalib.data import PredictDataset
from numpy.typing import NDArray
from tqdm.auto import tqdm

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks.predictions import threshold
from anomalib_simplenet.callbacks.unreadable_images import PathErrorDataset

FIELDS = {"pred_score": "score", "anomaly_map": "anomaly map", "pred_mask": "mask", "p_value": "p-value"}
PRODUCTS = {"Convolution", "FullyConnected", "MatMul"}
ROUNDING = 1e-5  # of scores, by the order of sums
SECONDS = 5  # of each measurement


def main() -> None:
    """Command line: ``python -m anomalib_simplenet.check EXPORTED CHECKPOINT FOLDER``."""
    parser = argparse.ArgumentParser("python -m anomalib_simplenet.check", description=__doc__)
    parser.add_argument("EXPORTED", type=Path, help="model.xml or model.onnx")
    parser.add_argument("CHECKPOINT", type=Path, help="what it was exported from, model.ckpt")
    parser.add_argument("FOLDER", type=Path, help="of images, those of its subfolders too")
    paths = vars(parser.parse_args()).values()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of images need not be UTF-8
    try:
        agree = _compare(*paths)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        parser.exit(2, f"{error}\n")
    sys.exit(0 if agree else 1)


def _compare(exported: Path, checkpoint: Path, folder: Path) -> bool:
    """Print differences and speed; whether all labels agree, but for images exactly at the threshold."""
    compiled, model, dataset = _compile(exported), _load(checkpoint), PathErrorDataset(PredictDataset(folder))
    run, limit = _runtime(exported, compiled), threshold(model, "image")
    paths, labels, differing = [], [], 0
    differences: dict[str, list[float]] = {name: [] for name in FIELDS}
    for index in tqdm(range(len(dataset)), "Comparing", leave=False):
        item = dataset[index]
        image, path = item.image[None], item.image_path
        try:
            answer = run(image.numpy())
        except RuntimeError as error:
            msg = f"{exported} takes {compiled.inputs[0].partial_shape}, and {path} is {list(image.shape)}: resize it."
            raise ValueError(msg) from error
        with torch.inference_mode():
            expected = {name: each.numpy() for name, each in model(image)._asdict().items() if each is not None}
        if {name: each.shape for name, each in answer.items()} != {name: each.shape for name, each in expected.items()}:
            msg = f"{exported} has other outputs than {checkpoint}: export this checkpoint again."
            raise ValueError(msg)
        paths.append(path)
        for name in FIELDS.keys() & expected.keys():
            differences[name].append(_difference(answer[name], expected[name]))
        own, reference = answer["pred_score"].item(), expected["pred_score"].item()
        if limit is not None and (answer["pred_label"] != expected["pred_label"] or np.isnan(own)):
            decided = not (abs(own - limit) <= ROUNDING and abs(reference - limit) <= ROUNDING)  # NaN is decided
            differing += decided
            label = "defective" if answer["pred_label"] else "normal"
            note = "" if decided else ", at the threshold: not counted"
            labels.append(f"    {path}: {label}, score {own:.5f}, checkpoint's {reference:.5f}{note}")
    print(f"{exported} and {checkpoint}")
    for name, found in differences.items():
        worst = int(np.argmax(found)) if found else 0  # NaN counts as the largest
        text = f"differs by at most {found[worst]:.2g}, for {paths[worst]}" if found else "none in this checkpoint"
        print(f"  {FIELDS[name]:<12} {text}")
    text = "none in this checkpoint" if limit is None else f"differs for {differing} of {len(paths)} images"
    print(f"  {'label':<12} {text}", *labels, sep="\n")
    for name, value in _speed(exported, compiled, image.numpy()).items():
        print(f"  {name:<12} {value}")
    return not differing if limit is not None else all(each <= ROUNDING for each in differences["pred_score"])


def _difference(answer: NDArray, expected: NDArray) -> float:
    """The largest difference, or of masks the share of pixels; infinite pixels, outside a region, may be equal."""
    unequal = answer != expected
    if expected.dtype == bool:
        return float(unequal.mean())
    return float(np.abs(np.subtract(answer, expected, where=unequal, out=np.zeros_like(expected))).max())


def _compile(exported: Path) -> ov.CompiledModel:
    if exported.suffix not in {".xml", ".onnx"} or not exported.is_file():
        msg = f"{exported} is no exported model: expected an .xml or .onnx file, as anomalib export writes."
        raise ValueError(msg)
    try:
        return ov.Core().compile_model(exported, "CPU")
    except RuntimeError as error:
        msg = f"{exported}, or its .bin or .data file, cannot be loaded: {str(error).strip().splitlines()[-1]}"
        raise ValueError(msg) from error


def _load(checkpoint: Path) -> SimpleNet:
    try:
        return SimpleNet.load_from_checkpoint(checkpoint, map_location="cpu", pre_trained=False).eval()
    except (KeyError, RuntimeError, TypeError, UnpicklingError, ValueError) as error:
        msg = f"{checkpoint} is no checkpoint of this version of SimpleNet, or was cut off: {error}".splitlines()[0]
        raise ValueError(msg) from error


def _runtime(exported: Path, compiled: ov.CompiledModel) -> Callable[[NDArray], dict[str, NDArray]]:
    if exported.suffix == ".xml":
        return lambda image: {output.get_any_name(): each for output, each in compiled(image).items()}
    from onnxruntime import InferenceSession

    session = InferenceSession(exported, providers=["CPUExecutionProvider"])
    names, (given,) = [output.name for output in session.get_outputs()], session.get_inputs()

    def run(image: NDArray) -> dict[str, NDArray]:
        try:
            return dict(zip(names, session.run(names, {given.name: image}), strict=True))
        except Exception as error:  # onnxruntime's own kinds have no public name
            raise RuntimeError(str(error)) from error

    return run


def _speed(exported: Path, compiled: ov.CompiledModel, image: NDArray) -> dict[str, str]:
    weights = exported.with_suffix(".bin" if exported.suffix == ".xml" else ".onnx.data")
    operations = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    products = Counter(each["runtimePrecision"].value for each in operations if each["layerType"].value in PRODUCTS)
    counts = ", ".join(f"{number} in {precision}" for precision, number in products.most_common())
    cpu = ov.Core().get_property("CPU", "FULL_DEVICE_NAME")
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    times: list[float] = []
    while sum(times) < SECONDS:  # benchmark_app reports one percentile a run
        start = perf_counter()
        compiled(image)
        times.append(perf_counter() - start)
    latency = [f"p{percentile} {np.percentile(times, percentile) * 1000:.1f} ms" for percentile in (50, 95, 99)]
    return {
        "size": f"{sum(file.stat().st_size for file in (exported, weights) if file.is_file()) / 2**20:.1f} MiB",
        "measured in": f"OpenVINO {ov.__version__.split('-')[0]} on {cpu}",
        "precision": f"convolutions and matrix products {counts}; INFERENCE_PRECISION_HINT {hint}",
        "threads": compiled.get_property("INFERENCE_NUM_THREADS"),
        "latency": f"{', '.join(latency)}, one image of {image.shape[3]} x {image.shape[2]} at a time",
        "throughput": f"{_throughput(exported, list(image.shape))} images a second",
    }


def _throughput(exported: Path, shape: list[int]) -> str:
    with TemporaryDirectory() as folder:
        program = [sys.executable, "-c", "from openvino.tools.benchmark.main import main; main()"]
        program += ["-m", str(exported), "-d", "CPU", "-shape", str(shape).replace(" ", ""), "-t", str(SECONDS)]
        program += ["-hint", "throughput", "-report_type", "no_counters", "-json_stats", "-report_folder", folder]
        run = subprocess.run(program, capture_output=True, text=True, check=False)  # noqa: S603
        if run.returncode:
            msg = f"benchmark_app measured nothing: {(run.stdout + run.stderr).strip()[-300:]}"
            raise ValueError(msg)
        return json.loads((Path(folder) / "benchmark_report.json").read_text())["execution_results"]["throughput"]


if __name__ == "__main__":
    main()
