"""Every use of a private or undocumented name of another library.

Each function says what it is for and, where there is one, the upstream thread; ``tests/unit/test_upstream.py`` says in
a sentence what changed should one stop working.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.connectors.data_connector import _DataLoaderSource
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader
from wrapt import register_post_import_hook, wrap_function_wrapper


def attach_trainer(module: LightningModule, trainer: Trainer | None, epochs: int) -> None:
    """Set ``LightningModule.trainer``; a fit that the user gave no limit of epochs, steps or time gets ``epochs``.

    Purpose: the paper's schedule by default. Lightning puts 1000 epochs in place of nothing right after this moment,
    before any hook, and the user's own 1000 cannot be told from them. ``Trainer.max_epochs`` has no setter.
    """
    LightningModule.trainer.fset(module, trainer)
    if trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return
    timed = any(isinstance(callback, Timer) for callback in trainer.callbacks)
    if trainer.max_epochs is None and trainer.max_steps == -1 and not timed:
        trainer.fit_loop.max_epochs = epochs


def run_validation(trainer: Trainer) -> None:
    """Validate in the middle of a fit, as Lightning does at an epoch's end.

    Purpose: thresholds for the last weights, whatever ended training. ``Trainer.validate`` would end the fit
    (https://github.com/Lightning-AI/pytorch-lightning/issues/4539 asked to validate on the last epoch).
    """
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True


def resample_position_embeddings_without_antialias() -> None:
    """Have timm's ViTs interpolate position embeddings for other image sizes as exported models will.

    OpenVINO's reader of ONNX ignores ``antialias``. anomalib switches it off in the whole process as soon as one of its
    models builds a ViT: scores would depend on what was built before.
    """
    from anomalib.models.components.feature_extractors.timm import _disable_pos_embed_antialiasing

    _disable_pos_embed_antialiasing()


@contextmanager
def one_try_at_the_hub() -> Iterator[Exception | None]:
    """Ask the Hugging Face Hub once; if it is not reachable, yield why, and take its cache alone.

    ``hf_hub_download`` retries five times for each of timm's file names, over a minute in all, even where the file is
    in the cache, and no argument or variable limits that. ``HF_HUB_OFFLINE=1`` in the environment does, but is read
    when huggingface_hub is imported.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        yield OSError("HF_HUB_OFFLINE is set, and they are not in the cache.")
        return
    unreachable = None
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # noqa: BLE001  # httpx's or requests', with the version of huggingface_hub
        unreachable = OSError(f"{constants.ENDPOINT} is not reachable ({error or type(error).__name__}).")
    constants.HF_HUB_OFFLINE = unreachable is not None
    try:
        yield unreachable
    finally:
        constants.HF_HUB_OFFLINE = False


def data_loops(trainer: Trainer) -> tuple[Any, ...]:
    """Loops that load data; the one that validates during a fit, ``fit_loop.epoch_loop.val_loop``, is undocumented."""
    fit = trainer.fit_loop
    return fit, fit.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop


def wrap_dataloaders(loop: Any, name: str, wrap: Callable[[Any], Any] | None) -> None:  # noqa: ANN401
    """Pass the data loaders that one of the trainer's loops is going to ask for through a function.

    Lightning has no public hook between a data loader's making and its use. Wrapping when the loop asks, not before,
    lets tuners change the batch size. ``wrap`` takes what data modules or users give, and replaces that of its name.
    """
    source = loop._data_source  # noqa: SLF001
    wraps = {**getattr(source, "wraps", {}), name: wrap}
    loop._data_source = _WrappedSource(source.instance, source.name, wraps)  # noqa: SLF001


@dataclass
class _WrappedSource(_DataLoaderSource):
    wraps: dict[str, Callable[[Any], Any] | None]

    def dataloader(self) -> Any:  # noqa: ANN401
        loaders = super().dataloader()
        for wrap in filter(None, self.wraps.values()):
            loaders = wrap(loaders)
        return loaders


def clone_dataloader(loader: DataLoader, **attributes: Any) -> DataLoader:  # noqa: ANN401
    """Copy a data loader, of whichever class, with other attributes and workers of its own.

    torch refuses another ``dataset`` after construction (https://github.com/pytorch/pytorch/pull/23744), and keeps
    persistent workers, which read the old one, in ``_iterator``. Lightning notes the arguments of construction
    on it, in ``__pl_saved_*``, to build it again for several processes: without them it takes the attributes.
    """
    clone = copy(loader)
    for name in [name for name in vars(clone) if name.startswith("__pl_saved")]:
        del vars(clone)[name]
    vars(clone).update(attributes, _iterator=None)
    return clone


def release_workers(loader: DataLoader) -> None:
    """Load in this process from the next epoch on, and stop persistent workers, which ``_iterator`` keeps.

    Lightning notes it, too, in ``__pl_attrs_record``, in all of a process after an exception in a data module: its
    ``_replace_dunder_methods`` is left without being undone.
    """
    loader.num_workers = loader.timeout = 0
    loader._iterator = None  # noqa: SLF001
    vars(loader).pop("__pl_attrs_record", None)


def batch_to_device(trainer: Trainer, batch: Any) -> Any:  # noqa: ANN401
    """Move a batch to the device as Lightning's training loop does, with all the hooks of model and data module.

    ``strategy.batch_to_device`` alone leaves out ``on_before_batch_transfer``, which the loops call
    (https://github.com/Lightning-AI/pytorch-lightning/issues/14066).
    """
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)  # noqa: SLF001
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def mark_precise(node: Any) -> None:  # noqa: ANN401
    """Keep an ``openvino.Node`` in float32 on processors that compute in bfloat16 by default.

    ``precise_0`` is the serialized name of OpenVINO's ``DisableFP16Compression`` attribute, which has no public Python
    name. The public ``INFERENCE_PRECISION_HINT`` is the user's to set and cannot be saved in a model.
    """
    node.get_rt_info()["precise_0"] = ""


@cache
def adapt_engine() -> None:
    """Have anomalib's ``Engine``, and so its command line, treat checkpoints of models that have ``as_requested`` well.

    ``Engine.export`` builds the model anew from its class and the checkpoint, without the arguments that the user gave:
    ``as_requested`` loads it. ``Engine.train`` resumes from a checkpoint, and then tests that one: here it tests the
    weights just trained. Not to be called while anomalib is being imported.
    """

    def export(wrapped: Callable[..., Any], _engine: Any, args: tuple, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        call = signature(wrapped).bind(*args, **kwargs)
        model, path = call.arguments["model"], call.arguments.get("ckpt_path")
        if path and hasattr(model, "as_requested"):
            call.arguments.update(model=model.as_requested(Path(path).resolve()), ckpt_path=None)
        return wrapped(*call.args, **call.kwargs)

    def train(wrapped: Callable[..., Any], engine: Any, args: tuple, kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        given = signature(wrapped).bind(*args, **kwargs).arguments
        if not given.get("ckpt_path") or not hasattr(given["model"], "as_requested"):
            return wrapped(*args, **kwargs)
        tested = given.pop("test_dataloaders", None)
        engine.fit(**given)
        return engine.trainer.test(given["model"], tested, datamodule=given.get("datamodule"))

    for name, wrapper in {"Engine.export": export, "Engine.train": train}.items():
        patch = partial(wrap_function_wrapper, name=name, wrapper=wrapper)
        register_post_import_hook(patch, "anomalib.engine.engine")


def add_batch_field(name: str) -> None:
    """Add an optional field to anomalib's batches of images and their items.

    They take no field that they do not know: ``OpenVINOInferencer`` and ``TorchInferencer`` fail on an exported model
    with an output of another name, and ``Batch.update`` ignores it.
    """
    from anomalib.data import ImageBatch, ImageItem, NumpyImageBatch, NumpyImageItem

    for kind in (ImageItem, ImageBatch, NumpyImageItem, NumpyImageBatch):
        if name not in kind.__dataclass_fields__:
            kind.__annotations__[name] = Any
            setattr(kind, name, None)
            for method in ("__init__", "__repr__", "__eq__"):
                delattr(kind, method)  # dataclass keeps what is there
            dataclass(kind)


def set_pixel_threshold(processor: nn.Module, threshold: torch.Tensor | float) -> None:
    """Set the raw threshold of maps that an anomalib post-processor chooses in validation; NaN for that of scores.

    ``_pixel_threshold`` is a private buffer, and ``pixel_threshold`` has no setter.
    """
    processor._pixel_threshold.fill_(threshold)  # noqa: SLF001
