"""How much SimpleNet's inference costs, in multiples of the backbone that it stands on.

    python tests/benchmarks/inference.py --help

All models stand on WideResNet-50-2, cut off after layer3, with random weights (time does not depend on them).
"backbone" is the cut-off backbone alone, in the memory layout that SimpleNet runs it in; "as timm makes it" in the
default one. Patchcore has 20,000 patches in its memory; Padim has 100 features a position. Times are medians of
interleaved runs in one process; memory is the peak of a fresh process, beyond what importing takes.
"""

import argparse
import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import openvino as ov
import torch
from anomalib.models.image.glass.torch_model import GlassModel
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.models.image.supersimplenet.torch_model import SupersimplenetModel
from measure import interleaved, peak_memory, random_weights, save, show
from torch import nn

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.components import FeatureExtractor
from anomalib_simplenet.torch_model import SimpleNetModel

BACKBONE, LAYERS = "wide_resnet50_2", ["layer2", "layer3"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--sides", type=int, nargs="+", default=[224, 288, 448, 672], help="of images, at batch 1")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; others than SimpleNet are timed on the cpu only")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32", help="autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--name", default="inference", help="of the JSON file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # TF32 where there is a GPU

    time_models = partial(_time_models, args)
    tables = {
        "models": [time_models(batch, 288, others=args.device == "cpu") for batch in args.batches],
        "sides": [time_models(1, side, others=False) for side in args.sides],
    }
    show("Multiples of the backbone's time, 288 x 288", tables["models"])
    show("Multiples of the backbone's time, batch 1", tables["sides"])
    if args.device == "cpu":
        tables["memory"] = [_memory(batch) for batch in args.batches]
        show("Peak memory, 288 x 288", tables["memory"])
        tables["openvino"] = [_time_openvino(batch, args.repeats, args.threads) for batch in args.batches]
        show("OpenVINO in float32, multiples of OpenVINO's time of the backbone, 288 x 288", tables["openvino"])
    save(args.name, vars(args), tables)


def make_backbone(_side: int = 288) -> nn.Module:
    return FeatureExtractor(BACKBONE, LAYERS, pre_trained=False).eval()


def make_backbone_as_timm(_side: int = 288) -> nn.Module:
    return deepcopy(make_backbone().net).to(memory_format=torch.contiguous_format)


def make_simplenet(_side: int = 288) -> nn.Module:
    return SimpleNetModel(BACKBONE, LAYERS, pre_trained=False).eval()


def make_patchcore(_side: int = 288) -> nn.Module:
    model = PatchcoreModel(LAYERS, BACKBONE, pre_trained=False).eval()
    model.memory_bank = torch.randn(20_000, 1536)
    return model


def make_padim(side: int = 288) -> nn.Module:
    model = PadimModel(BACKBONE, ["layer1", "layer2", "layer3"], pre_trained=False, n_features=100).eval()
    positions = (side // 4) ** 2
    model.gaussian.mean = torch.zeros(100, positions)
    model.gaussian.inv_covariance = torch.eye(100).repeat(positions, 1, 1)
    return model


def make_supersimplenet(_side: int = 288) -> nn.Module:
    with random_weights():
        return SupersimplenetModel(backbone=BACKBONE, layers=LAYERS).eval()


def make_glass(side: int = 288) -> nn.Module:
    return GlassModel((side, side), backbone=BACKBONE, pre_trained=False).eval()


OTHERS = {
    "Patchcore": make_patchcore,
    "Padim": make_padim,
    "Supersimplenet": make_supersimplenet,
    "Glass": make_glass,
}


def run(make: Callable[[int], nn.Module], batch: int, side: int = 288) -> Callable[[], object]:
    """Inference of one batch, as a function without arguments."""
    return _runner(make(side), torch.randn(batch, 3, side, side))


def _runner(model: nn.Module, images: torch.Tensor, precision: str = "float32") -> Callable[[], object]:
    half = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bfloat16")

    def infer() -> object:
        with torch.inference_mode(), half:
            return model(images)

    return infer


def _time_models(args: argparse.Namespace, batch: int, side: int, others: bool) -> dict:
    makers = {"backbone": make_backbone, "as timm makes it": make_backbone_as_timm, "SimpleNet": make_simplenet}
    images = torch.randn(batch, 3, side, side, device=args.device)
    cases = {}
    for name, make in {**makers, **(OTHERS if others else {})}.items():
        model = make(side).to(args.device)
        cases[name] = _runner(torch.compile(model) if args.compile else model, images, args.precision)
    seconds = interleaved(cases, args.repeats, args.device)
    row = {"batch": batch, "side": side, **{name: value / seconds["backbone"] for name, value in seconds.items()}}
    if args.device != "cpu":
        row["SimpleNet, images a second"] = batch / seconds["SimpleNet"]
        row["backbone, images a second"] = batch / seconds["backbone"]
    return row


def _memory(batch: int) -> dict:
    mib = {
        name: peak_memory(run, make, batch) / 2**20
        for name, make in {"backbone": make_backbone, "SimpleNet": make_simplenet, **OTHERS}.items()
    }
    return {
        "batch": batch,
        "backbone, MiB": round(mib["backbone"]),
        **{name: value / mib["backbone"] for name, value in mib.items()},
    }


def _time_openvino(batch: int, repeats: int, threads: int) -> dict:
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    images = torch.randn(batch, 3, 288, 288)
    cases = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "backbone.onnx"
        torch.onnx.export(make_backbone(), (images,), path, dynamo=True, opset_version=18, verbose=False)
        model = SimpleNet(
            backbone=BACKBONE, layers=LAYERS, pre_trained=False, pre_processor=False, post_processor=False
        )
        models = {"backbone": path, "SimpleNet": model.to_openvino(folder, input_size=(288, 288))}
        for name, exported in models.items():
            read = ov.Core().read_model(exported)
            read.reshape([batch, 3, 288, 288])
            compiled = ov.Core().compile_model(read, "CPU", config)
            cases[name] = partial(compiled, images.numpy())
        seconds = interleaved(cases, 3 * repeats)
    return {"batch": batch, **{name: value / seconds["backbone"] for name, value in seconds.items()}}


if __name__ == "__main__":
    main()
