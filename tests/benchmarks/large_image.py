"""Memory and time of predicting one large photograph, in tiles and at once.

    python tests/benchmarks/large_image.py --help

Each row is a fresh process that reads the file and predicts it twice with anomalib's ``Engine``, without pictures and
without keeping predictions. Memory is its peak, beyond imports and the backbone's weights. EfficientNet-Lite0 has the
settings of simplenet_edge.yaml, except one covariance for all positions: one for each takes 2 GiB at 4,096 x 4,096.
Weights are random.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from anomalib.callbacks import TilerConfigurationCallback
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from measure import peak_memory, save, show
from PIL import Image

from anomalib_simplenet import SimpleNet

EDGE = {
    "backbone": "efficientnet_lite0",
    "layers": ["blocks.4", "blocks.2"],
    "patch_size": 1,
    "pretrain_embed_dimension": None,
    "target_embed_dimension": None,
    "adapter_layers": 0,
    "discriminator_hidden": 256,
    "normalize_brightness": True,
    "whiten": True,
    "components": 90,
    "top_patches": 3,
    "averaging": True,
}
PAPER = {"backbone": "wide_resnet50_2"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="of the photograph, in pixels")
    parser.add_argument("--tiles", type=int, nargs=2, default=[1024, 672], metavar=("SIZE", "STRIDE"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--whole", action="store_true", help="also without tiles, which takes many GiB")
    parser.add_argument("--paper", action="store_true", help="also WideResNet-50-2, the paper's settings")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {"EfficientNet-Lite0": EDGE, **({"WideResNet-50-2": PAPER} if args.paper else {})}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photograph.png"
        pixels = np.random.default_rng(0).integers(0, 256, (args.side, args.side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
        cases = [(name, tiles) for name in models for tiles in ([args.tiles, None] if args.whole else [args.tiles])]
        rows = [_measure(name, models[name], path, args.side, tiles) for name, tiles in cases]
    show(f"{args.side} x {args.side} pixels, {args.threads} thread(s)", rows)
    save("large_image", vars(args), {"rows": rows})


def _measure(name: str, settings: dict, path: Path, side: int, tiles: list[int] | None) -> dict:
    weights = sum(tensor.nbytes for tensor in make_model(settings, side).model.feature_extractor.state_dict().values())
    mib = (peak_memory(make_prediction, settings, path, side, tiles) - weights) / 2**20
    predict = make_prediction(settings, path, side, tiles)
    start = time.perf_counter()
    predict()
    return {"backbone": name, "tiles": str(tiles), "MiB": round(mib), "seconds": round(time.perf_counter() - start)}


def make_model(settings: dict, side: int) -> SimpleNet:
    pre_processor = SimpleNet.configure_pre_processor((side, side))
    return SimpleNet(**settings, pre_trained=False, pre_processor=pre_processor, visualizer=False, report=False)


def make_prediction(settings: dict, path: Path, side: int, tiles: list[int] | None) -> partial:
    callbacks = [TilerConfigurationCallback(enable=True, tile_size=tiles[0], stride=tiles[1])] if tiles else []
    engine = Engine(accelerator="cpu", logger=False, default_root_dir=path.parent, callbacks=callbacks)
    data = PredictDataset(path)
    return partial(engine.predict, make_model(settings, side), dataset=data, return_predictions=False)


if __name__ == "__main__":
    main()
