"""Names and behaviour that other libraries do not promise and this package uses, each with what breaks without it."""

import multiprocessing
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.post_processing import PostProcessor
from lightning.fabric.utilities.data import _replace_dunder_methods
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from anomalib_simplenet.compat import (
    adapt_engine,
    add_batch_field,
    attach_trainer,
    batch_to_device,
    clone_dataloader,
    data_loops,
    release_workers,
    run_validation,
    set_pixel_threshold,
    wrap_dataloaders,
)

INTERNALS = [
    ("anomalib.models.image", "Padim", "registry.py imports SimpleNet right after this module, which holds the models"),
    ("anomalib.models", "get_model", "registry.py publishes SimpleNet where this looks models up"),
    ("lightning.pytorch", "LightningModule.trainer.fset", "compat.py sets the paper's 160 epochs with the trainer"),
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


@pytest.mark.parametrize(("module", "name", "use"), INTERNALS, ids=[name for _, name, _ in INTERNALS])
def test_upstream_name_exists(module: str, name: str, use: str) -> None:
    try:
        attrgetter(name)(import_module(module))
    except (ImportError, AttributeError) as error:
        pytest.fail(f"{module}.{name} has gone, which this package needs ({use}): {error}")


def test_post_processor_takes_its_pixel_threshold_from_a_buffer() -> None:
    processor = PostProcessor()
    set_pixel_threshold(processor, torch.tensor(2.0))
    assert processor.pixel_threshold == 2


def test_engine_asks_models_for_trainer_arguments() -> None:
    from anomalib.engine import Engine
    from anomalib.models.components import AnomalibModule

    assert hasattr(AnomalibModule, "trainer_arguments"), "models can no longer switch off the sanity check"
    assert "ckpt_path" in signature(Engine.predict).parameters, "Engine.predict no longer takes a checkpoint"


def test_mark_precise_keeps_a_product_in_float32(tmp_path: Path) -> None:
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
        ov.save_model(ov.Model([product], [image]), tmp_path / "model.xml")  # only files carry the mark
        model = ov.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "bf16"})
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


def numbers_trainer(**limits: int) -> Trainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", **quiet, **(limits or {"max_epochs": 1}))


@pytest.mark.parametrize(
    ("limits", "expected"), [({"max_steps": -1}, 2), ({"max_epochs": 1}, 1), ({"max_steps": 1}, -1)]
)
def test_attach_trainer_limits_a_fit_that_has_no_limit(limits: dict[str, int], expected: int) -> None:
    class Limited(Numbers):
        @property
        def trainer(self) -> Trainer:
            return super().trainer

        @trainer.setter
        def trainer(self, trainer: Trainer | None) -> None:
            attach_trainer(self, trainer, 2)

    trainer, model = numbers_trainer(**limits), Limited()
    trainer.fit(model, DataLoader([0], batch_size=1))
    changed = "Lightning no longer sets LightningModule.trainer before its 1000 epochs, or moved fit_loop.max_epochs"
    assert (trainer.max_epochs, len(model.batches)) == (expected, abs(expected)), changed


def test_run_validation_validates_during_a_fit() -> None:
    class Validating(Numbers):
        def validation_step(self, batch: torch.Tensor) -> None:
            self.batches.append(batch.tolist())

        def on_train_epoch_end(self) -> None:
            run_validation(self.trainer)

    trainer, model = numbers_trainer(max_epochs=2), Validating()
    trainer.check_val_every_n_epoch = 9  # FinalValidation sets it, too
    trainer.num_sanity_val_steps = 0
    trainer.fit(model, DataLoader([1], batch_size=1), DataLoader([2], batch_size=1))
    changed = "Lightning's fit_loop.epoch_loop.val_loop no longer validates when it is run by hand"
    assert model.batches == [[101], [102]] * 2, changed


def test_wrap_dataloaders_is_used_by_the_trainers_loops() -> None:
    trainer, loader = numbers_trainer(), DataLoader([0, 1, 2], batch_size=2)
    for loop in data_loops(trainer):
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


@pytest.mark.parametrize("noted", [False, True], ids=["", "noted by Lightning"])
def test_release_workers_stops_persistent_workers(noted: bool) -> None:
    before = set(multiprocessing.active_children())
    with _replace_dunder_methods(DataLoader, "dataset") if noted else nullcontext():
        loader = DataLoader([0, 1], batch_size=2, num_workers=1, persistent_workers=True)
        list(loader)
    assert set(multiprocessing.active_children()) > before
    release_workers(loader)
    left = set(multiprocessing.active_children()) - before
    changed = "torch's DataLoader keeps persistent workers elsewhere than in _iterator, or Lightning than in its record"
    assert not left, changed
    assert [batch.tolist() for batch in loader] == [[0, 1]]


def test_batch_to_device_calls_the_transfer_hooks() -> None:
    trainer, model = numbers_trainer(), Numbers()
    trainer.fit(model, DataLoader([0], batch_size=1))
    moved = batch_to_device(trainer, torch.tensor([1]))
    assert moved.tolist() == [101], "Lightning's LightningModule._on_before_batch_transfer no longer calls the hook"


def test_add_batch_field_is_taken_by_batches_and_by_their_items() -> None:
    import numpy as np
    from anomalib.data import ImageBatch, NumpyImageBatch

    add_batch_field("p_value")
    changed = "anomalib's batches take their fields from elsewhere than __dataclass_fields__ or dataclass's methods"
    for kind, new, other in ((ImageBatch, torch.zeros, torch.ones), (NumpyImageBatch, np.zeros, np.ones)):
        batch = kind(image=new((2, 3, 4, 4)) if kind is ImageBatch else new((2, 4, 4, 3)), p_value=other(2))
        assert [item.p_value for item in batch.items] == [1, 1], changed
        assert batch.update(p_value=new(2)).p_value.sum() == 0, changed
        assert kind(image=batch.image).p_value is None, changed


def test_adapt_engine_loads_the_checkpoint_to_export_by_the_model() -> None:
    from anomalib.engine import Engine

    class Asked:
        def as_requested(self, path: object) -> object:
            raise FileNotFoundError(path)

    adapt_engine()
    changed = "Engine.export of anomalib was renamed, or its arguments model and ckpt_path"
    assert {"model", "ckpt_path"} <= set(signature(Engine.export).parameters), changed
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Engine(logger=False).export(Asked(), "torch", ckpt_path="nowhere.ckpt")


def test_adapt_engine_tests_what_train_has_trained() -> None:
    from anomalib.engine import Engine

    class Resumed(Engine):
        def fit(self, model: object, **given: object) -> None:
            assert (type(model), given) == (Asked, {"ckpt_path": "first.ckpt"})
            self._trainer = SimpleNamespace(test=lambda *args, **given: (args[1:], given))

    class Asked:
        as_requested = None

    adapt_engine()
    changed = "Engine.train of anomalib was renamed, or its arguments model, ckpt_path, test_dataloaders and datamodule"
    assert {"model", "ckpt_path", "test_dataloaders", "datamodule"} <= set(signature(Engine.train).parameters), changed
    tested = Resumed(logger=False).train(Asked(), test_dataloaders=[1], ckpt_path="first.ckpt")
    assert tested == (([1],), {"datamodule": None}), changed
