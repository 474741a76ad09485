"""What anomalib, Lightning and torch do not promise and this package leans on: each with what breaks without it."""

from importlib import import_module
from inspect import signature
from operator import attrgetter

import pytest

INTERNALS = [
    ("anomalib.models.image", "Padim", "registry.py imports SimpleNet right after this module, which holds the models"),
    ("anomalib.models", "get_model", "registry.py publishes SimpleNet where this looks models up"),
    (
        "anomalib.models.components",
        "AnomalibModule.trainer.fset",
        "the paper's 160 epochs are set when a trainer comes",
    ),
    ("anomalib.models.components.base.export_mixin", "ExportMixin.to_onnx", "export/exporter.py exports through it"),
    (
        "anomalib.pipelines.benchmark",
        "Benchmark",
        "models built from this package have no AUPRO: its table fails on it",
    ),
    ("anomalib.utils.path", "generate_output_filename", "report.py finds the visualizer's pictures by it"),
    ("anomalib.post_processing", "PostProcessor.normalized_image_threshold", "the report's thresholds"),
    ("anomalib.post_processing", "PostProcessor.normalized_pixel_threshold", "the report's thresholds"),
    ("anomalib.visualization", "ImageVisualizer.on_test_batch_end", "visualizer.py draws image by image through it"),
    ("anomalib.data", "PredictDataset", "trainer.py takes image_filenames from it"),
    ("lightning.pytorch.trainer.connectors.data_connector", "_DataLoaderSource.dataloader", "trainer.py wraps it"),
    ("lightning.pytorch.overrides.distributed", "UnrepeatedDistributedSampler", "tests by several processes"),
    (
        "anomalib.models.components.feature_extractors.timm",
        "_disable_pos_embed_antialiasing",
        "compat.py has ViTs resize position embeddings as exports do",
    ),
    ("huggingface_hub.constants", "HF_HUB_OFFLINE", "compat.py takes the cache alone where the hub is unreachable"),
    ("huggingface_hub.constants", "ENDPOINT", "compat.py asks the hub once whether it is reachable"),
    ("huggingface_hub.constants", "HF_HUB_ETAG_TIMEOUT", "compat.py waits for the hub's answer as long"),
    ("huggingface_hub.utils", "get_session", "compat.py asks the hub once whether it is reachable"),
    ("torch.distributed.nn.functional", "all_reduce", "batch norm over several processes"),
]
ATTRIBUTES = [
    ("fit_loop._data_source.instance", "feature_cache.py and trainer.py put their data loaders there"),
    ("fit_loop._combined_loader", "feature_cache.py clears it"),
    ("fit_loop.epoch_loop.val_loop._data_source", "trainer.py wraps it"),
    ("validate_loop._data_source", "trainer.py wraps it"),
    ("test_loop._data_source", "trainer.py wraps it"),
    ("predict_loop._data_source", "trainer.py wraps it"),
    ("predict_loop.max_batches", "the warning about predictions that are kept"),
    ("strategy.checkpoint_io", "trainer.py checks checkpoints there"),
    ("_default_root_dir", "trainer.py has all processes write to one folder"),
    ("_accelerator_connector.use_distributed_sampler", "trainer.py leaves samplers alone where the user said so"),
    ("check_val_every_n_epoch", "validation after the last epoch only"),
    ("fit_loop._can_stop_early", "validation at a stop, but not at one that min_epochs holds back"),
    ("fit_loop.epoch_loop.val_loop.run", "validation after the last epoch if a callback ended training there"),
]


@pytest.mark.parametrize(("module", "name", "use"), INTERNALS, ids=[name for _, name, _ in INTERNALS])
def test_what_this_package_leans_on_is_there(module: str, name: str, use: str) -> None:
    try:
        attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{module}.{name} has gone, which this package needs ({use}): {error}")


@pytest.mark.parametrize(("name", "use"), ATTRIBUTES, ids=[name for name, _ in ATTRIBUTES])
def test_what_this_package_leans_on_in_the_trainer_is_there(name: str, use: str) -> None:
    from lightning.pytorch import Trainer

    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    try:
        attrgetter(name)(trainer)
    except AttributeError as error:
        pytest.fail(f"Trainer.{name} has gone, which this package needs ({use}): {error}")


def test_the_engine_still_asks_models_for_trainer_arguments() -> None:
    from anomalib.engine import Engine
    from anomalib.models.components import AnomalibModule

    assert hasattr(AnomalibModule, "trainer_arguments"), "models can no longer switch off the sanity check"
    assert "ckpt_path" in signature(Engine.predict).parameters, "Engine.predict no longer takes a checkpoint"


def test_mark_precise_keeps_a_product_in_float32() -> None:
    """Where it fails: OpenVINO's attribute ``precise`` was renamed or dropped (``DisableFP16Compression``)."""
    import numpy as np
    import openvino as ov
    from openvino import opset13

    from anomalib_simplenet.compat import mark_precise

    def precisions(mark: bool) -> set[str]:
        image = opset13.parameter([1, 64, 64], np.float32)
        product = opset13.matmul(image, opset13.constant(np.ones((64, 64), np.float32)), False, False)
        if mark:
            mark_precise(product)
        model = ov.Core().compile_model(ov.Model([product], [image]), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
        nodes = model.get_runtime_model().get_ops()
        return {
            str(node.get_rt_info()["runtimePrecision"].value)
            for node in nodes
            if "runtimePrecision" in node.get_rt_info()
        }

    if "bf16" not in precisions(mark=False):
        pytest.skip("this processor does not compute in bfloat16")
    assert "bf16" not in precisions(mark=True)
