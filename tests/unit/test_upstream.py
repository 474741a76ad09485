"""What anomalib, Lightning and torch do not promise and this package leans on: each with what breaks without it."""

import multiprocessing
from importlib import import_module
from inspect import signature
from operator import attrgetter

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from anomalib_simplenet.compat import batch_to_device, clone_dataloader, release_workers, wrap_dataloaders

INTERNALS = [
    ("anomalib.models.image", "Padim", "registry.py imports SimpleNet right after this module, which holds the models"),
    ("anomalib.models", "get_model", "registry.py publishes SimpleNet where this looks models up"),
    (
        "anomalib.models.components",
        "AnomalibModule.trainer.fset",
        "the paper's 160 epochs are set when a trainer comes",
    ),
    ("anomalib.models.components.base.export_mixin", "ExportMixin.to_onnx", "export/exporter.py exports through it"),
    ("anomalib.utils.path", "generate_output_filename", "report.py finds the visualizer's pictures by it"),
    ("anomalib.post_processing", "PostProcessor.normalized_image_threshold", "the report's thresholds"),
    ("anomalib.post_processing", "PostProcessor.normalized_pixel_threshold", "the report's thresholds"),
    ("anomalib.visualization", "ImageVisualizer.on_test_batch_end", "visualizer.py draws image by image through it"),
    (
        "anomalib.models.components.feature_extractors.timm",
        "_disable_pos_embed_antialiasing",
        "compat.py has ViTs resize position embeddings as exports do",
    ),
    ("huggingface_hub.constants", "HF_HUB_OFFLINE", "compat.py takes the cache alone where the hub is unreachable"),
    ("huggingface_hub.constants", "ENDPOINT", "compat.py asks the hub once whether it is reachable"),
    ("huggingface_hub.constants", "HF_HUB_ETAG_TIMEOUT", "compat.py waits for the hub's answer as long"),
    ("huggingface_hub.utils", "get_session", "compat.py asks the hub once whether it is reachable"),
    ("anomalib.data", "PredictDataset", "unreadable_images.py takes image_filenames from it"),
]
ATTRIBUTES = [
    ("check_val_every_n_epoch", "validation after the last epoch only"),
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


class Numbers(LightningModule):
    """Collects what it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[list[int]] = []

    def on_before_batch_transfer(self, batch: torch.Tensor, _loader: int) -> torch.Tensor:
        return batch + 100

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        self.batches.append(batch.tolist())
        return self.weight * 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def numbers_trainer() -> Trainer:
    return Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


def test_wrap_dataloaders_is_used_by_the_trainers_loops() -> None:
    trainer, loader = numbers_trainer(), DataLoader([0, 1, 2], batch_size=2)
    loops = [trainer.fit_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop]
    for loop in [*loops, trainer.fit_loop.epoch_loop.val_loop]:
        wrap_dataloaders(loop, "first", lambda _: DataLoader([5, 6, 7], batch_size=3))
        wrap_dataloaders(loop, "second", lambda given: [*given, [8]])
        wrap_dataloaders(loop, "second", lambda given: given)  # replaces
    model = Numbers()
    trainer.fit(model, loader)
    assert model.batches == [[105, 106, 107]], "Lightning's loops no longer ask their _data_source for data loaders"
    wrap_dataloaders(trainer.fit_loop, "first", None)
    again = numbers_trainer()
    again.fit(model, loader)
    assert model.batches[1:] == [[100, 101], [102]]


def test_clone_dataloader_reads_other_data_with_workers_of_its_own() -> None:
    loader = DataLoader([0, 1], batch_size=2, num_workers=1, persistent_workers=True)
    assert [batch.tolist() for batch in loader] == [[0, 1]]
    clone = clone_dataloader(loader, dataset=[3, 4])
    changed = "torch's DataLoader no longer reads the dataset attribute, or keeps workers elsewhere than in _iterator"
    assert [batch.tolist() for batch in clone] == [[3, 4]], changed
    assert [batch.tolist() for batch in loader] == [[0, 1]], changed


def test_release_workers_stops_persistent_workers() -> None:
    before = set(multiprocessing.active_children())
    loader = DataLoader([0, 1], batch_size=2, num_workers=1, persistent_workers=True)
    list(loader)
    assert set(multiprocessing.active_children()) > before
    release_workers(loader)
    left = set(multiprocessing.active_children()) - before
    assert not left, "torch's DataLoader keeps persistent workers elsewhere than in _iterator"
    assert [batch.tolist() for batch in loader] == [[0, 1]]


def test_batch_to_device_calls_the_transfer_hooks() -> None:
    trainer, model = numbers_trainer(), Numbers()
    trainer.fit(model, DataLoader([0], batch_size=1))
    moved = batch_to_device(trainer, torch.tensor([1]))
    assert moved.tolist() == [101], "Lightning's LightningModule._on_before_batch_transfer no longer calls the hook"
