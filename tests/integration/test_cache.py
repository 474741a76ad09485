"""The cache of feature maps: the same training, without reading images or running the backbone again."""

import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, LambdaCallback
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks import feature_store
from anomalib_simplenet.callbacks.feature_cache import FeatureCache
from anomalib_simplenet.callbacks.feature_store import CachedBatch

from .conftest import TINY, folder_data, tiny_model


class Watch(Callback):
    """Losses of each step, and how many training images the backbone has seen in each."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.extracted: list[int] = []

    def on_fit_start(self, _trainer: object, model: SimpleNet) -> None:
        self.hook = model.model.feature_extractor.register_forward_pre_hook(
            lambda _module, images: self.extracted.append(len(images[0])) if model.training else None
        )

    def on_train_batch_end(self, _trainer: object, _model: object, outputs: dict, *_args: object) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self, *_args: object) -> None:
        self.hook.remove()


def fit(
    pictures: Path,
    data: dict | None = None,
    trainer: dict | None = None,
    callbacks: Sequence[Callback] = (),
    **arguments: object,
) -> tuple[Watch, SimpleNet, Engine]:
    seed_everything(5, verbose=False)
    model = tiny_model(**{"layers": ["layer1", "layer2"], "adapter_layers": 1, **arguments})
    watch = Watch()
    settings = {"max_epochs": 3, "accelerator": "cpu", "default_root_dir": pictures.parent / "results"}
    engine = Engine(callbacks=[watch, *callbacks], **{**settings, **(trainer or {})})
    data = dict(data or {})
    collate = data.pop("external_collate_fn", None)
    datamodule = folder_data(pictures, **data)
    datamodule.external_collate_fn = collate
    engine.fit(model, datamodule=datamodule)
    return watch, model, engine


def head(model: SimpleNet) -> dict[str, torch.Tensor]:
    return {key: value for key, value in model.state_dict().items() if key.startswith("model.")}


@pytest.mark.parametrize(
    "settings",
    [
        {"data": {"num_workers": 2}, "trainer": {"accumulate_grad_batches": 2}},
        {"trainer": {"limit_train_batches": 2, "max_epochs": 4}},
        {"trainer": {"precision": "bf16-mixed"}, "whiten": True, "patch_fraction": 0.3},
    ],
    ids=str,
)
def test_feature_cache_trains_as_without_cache(pictures: Path, settings: dict) -> None:
    plain, plain_model, _ = fit(pictures, feature_cache=False, **settings)
    cached, cached_model, _ = fit(pictures, feature_cache=True, **settings)
    assert sum(cached.extracted) < sum(plain.extracted)
    assert len(plain.losses) == len(cached.losses) >= 6
    torch.testing.assert_close(cached.losses, plain.losses, rtol=1e-6, atol=1e-6)
    expected = head(plain_model)
    for key, value in head(cached_model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_feature_cache_reads_and_extracts_each_image_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    data = folder_data(pictures)
    data.setup()
    kind = type(data.train_data)
    original = kind.__getitem__
    monkeypatch.setattr(kind, "__getitem__", lambda self, index: (read.append(index), original(self, index))[1])
    watch, model, _ = fit(pictures, trainer={"limit_val_batches": 0})
    assert sorted(read) == [0, 1, 2, 3, 4]
    assert sum(watch.extracted) == 5
    assert len(watch.losses) == 9
    assert all(cb.store is None for cb in model.trainer.callbacks if isinstance(cb, FeatureCache))


class Planner(SimpleNet):
    """A model that asks for the number of steps before training, which makes Lightning set the data up."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_feature_cache_works_where_data_was_set_up_early(pictures: Path) -> None:
    pre_processor = SimpleNet.configure_pre_processor((64, 64))
    model, watch = Planner(**TINY, pre_processor=pre_processor), Watch()
    engine = Engine(callbacks=[watch], max_epochs=2, accelerator="cpu", default_root_dir=pictures.parent / "r")
    engine.fit(model, datamodule=folder_data(pictures))
    assert model.steps == 6
    assert sum(watch.extracted) == 5


def test_persistent_workers_stop_once_the_cache_is_complete(pictures: Path) -> None:
    data = folder_data(pictures)
    data.setup()
    loader = DataLoader(
        data.train_data, 2, collate_fn=data.train_data.collate_fn, num_workers=1, persistent_workers=True
    )
    model, watch = tiny_model(whiten=True), Watch()
    engine = Engine(callbacks=[watch], max_epochs=3, accelerator="cpu", default_root_dir=pictures.parent / "r")
    engine.fit(model, train_dataloaders=loader)
    assert len(watch.losses) == 9
    assert sum(watch.extracted) == 5
    assert not multiprocessing.active_children()


class Nosy(Callback):
    """Uses the batch's images."""

    def __init__(self, use: Callable[[ImageBatch], object], hook: str) -> None:
        setattr(self, hook, lambda _trainer, _model, *arguments: use(next(filter(is_batch, arguments))))


def is_batch(argument: object) -> bool:
    return isinstance(argument, ImageBatch | CachedBatch)


USES = [
    lambda batch: batch.image.mean(),
    lambda batch: batch.image + 0.1,
    lambda batch: torch.rand_like(batch.image),
    lambda batch: torch.ones(()) * batch.image,
    lambda batch: len(batch.image),
    lambda batch: batch.image[0],
    lambda batch: batch.image_path[0],
]
HINT = r"not read again\. Set feature_cache to false"


@pytest.mark.parametrize("use", USES, ids=range(len(USES)))
def test_cached_batch_says_how_to_get_its_images(use: Callable[[CachedBatch], object]) -> None:
    batch = pickle.loads(pickle.dumps(CachedBatch([0, 1])))  # as workers send it
    with pytest.raises(AttributeError, match=HINT):
        use(batch)


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
def test_callback_that_reads_images_is_told_to_switch_the_cache_off(pictures: Path, hook: str) -> None:
    callbacks, trainer = [Nosy(USES[0], hook)], {"max_epochs": 2, "limit_val_batches": 0}
    with pytest.raises(AttributeError, match=HINT):
        fit(pictures, trainer=trainer, callbacks=callbacks, feature_cache=True)
    fit(pictures, trainer=trainer, callbacks=callbacks, feature_cache=False)


def test_feature_cache_resumes_as_without_cache(pictures: Path) -> None:
    losses = []
    for cache in (False, True):
        _, _, engine = fit(pictures, trainer={"max_epochs": 2}, feature_cache=cache)
        seed_everything(7, verbose=False)
        resumed = tiny_model(layers=["layer1", "layer2"], adapter_layers=1, feature_cache=cache)
        watch = Watch()
        again = Engine(callbacks=[watch], max_epochs=4, accelerator="cpu", default_root_dir=pictures.parent / "again")
        checkpoint = engine.trainer.checkpoint_callback.best_model_path
        again.fit(resumed, datamodule=folder_data(pictures), ckpt_path=checkpoint)
        assert sum(watch.extracted) == (5 if cache else 10)
        losses.append(watch.losses)
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-6, abs=1e-6)


class Recoded(Dataset):
    """Images from somewhere else than anomalib."""

    def __init__(self, pictures: Path) -> None:
        data = folder_data(pictures)
        data.setup()
        self.items = list(data.train_data)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> ImageItem:
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[ImageItem]:
        return iter(self.dataset[index] for index in range(len(self.dataset)))


class AugmentingLoader(DataLoader):
    """May do anything to the batches."""


def loader(pictures: Path, kind: str) -> DataLoader:
    data = folder_data(pictures)
    data.setup()
    if kind == "anomalib":
        sampler = torch.utils.data.RandomSampler(data.train_data, replacement=True, num_samples=12)
        return DataLoader(data.train_data, batch_size=2, collate_fn=data.train_data.collate_fn, sampler=sampler)
    if kind == "augmenting":
        return AugmentingLoader(data.train_data, batch_size=2, collate_fn=data.train_data.collate_fn)
    dataset = Recoded(pictures) if kind == "foreign" else Stream(Recoded(pictures))
    return DataLoader(dataset, batch_size=2, collate_fn=data.train_data.collate_fn)


@pytest.mark.parametrize(
    ("kind", "mode", "extracted"),
    [
        ("anomalib", "auto", "once"),
        ("foreign", "auto", "always"),
        ("stream", "auto", "always"),
        ("augmenting", "auto", "always"),
        ("augmenting", True, "once"),
    ],
)
def test_feature_cache_takes_own_data_loaders(pictures: Path, kind: str, mode: bool | str, extracted: str) -> None:
    seed_everything(0, verbose=False)
    model, watch = tiny_model(feature_cache=mode), Watch()
    own = loader(pictures, kind)
    dataset, collate = own.dataset, own.collate_fn
    engine = Engine(callbacks=[watch], max_epochs=3, accelerator="cpu", default_root_dir=pictures.parent / "r")
    engine.fit(model, train_dataloaders=own)
    assert (sum(watch.extracted) < 10) == (extracted == "once")  # a sampler may assign an image twice in a batch
    assert (own.dataset, own.collate_fn) == (dataset, collate)


class Augmenting(v2.Compose):
    """What is not in its list of transforms may be anything."""


class Augmenter(Callback):
    """Alters images in each step, but for cached batches."""

    def on_train_batch_start(self, _trainer: object, _model: object, batch: ImageBatch, _index: int) -> None:
        if isinstance(batch.image, torch.Tensor):
            batch.image = batch.image + torch.rand_like(batch.image)


FLIP = v2.RandomHorizontalFlip()
REASONS = [
    ({"data": {"train_augmentations": FLIP}}, "RandomHorizontalFlip may change the training images"),
    (
        {"pre_processor": v2.Compose([v2.Resize((64, 64)), v2.ColorJitter(0.5)])},
        "ColorJitter may change the training images",
    ),
    ({"pre_processor": Augmenting([v2.Resize((64, 64))])}, "Augmenting may change the training images"),
    ({"callbacks": [Augmenter()]}, "Augmenter.on_train_batch_start may give other images"),
    (
        {"callbacks": [LambdaCallback(on_train_batch_start=lambda *_: None)]},
        "LambdaCallback.on_train_batch_start may give other images",
    ),
    (
        {"data": {"external_collate_fn": lambda items: ImageBatch.collate(list(items))}},
        "collate_fn may give other images",
    ),
    ({"trainer": {"reload_dataloaders_every_n_epochs": 1}}, "set reload_dataloaders_every_n_epochs to 0"),
    ({"feature_cache_memory": 1e-4}, r"5 training images take .* GiB, more than .* feature_cache_memory"),
]


@pytest.mark.parametrize(("settings", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_feature_cache_is_off_or_raises_with_a_reason(
    pictures: Path, settings: dict, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    from anomalib.pre_processing import PreProcessor

    if "pre_processor" in settings:
        settings = {**settings, "pre_processor": PreProcessor(transform=settings["pre_processor"])}
    with caplog.at_level(logging.INFO):
        watch, _, _ = fit(pictures, **settings)
    assert sum(watch.extracted) == 15
    off = [record.message for record in caplog.records if "feature_cache is off" in record.message]
    assert len(off) == 1
    if "may give" in reason:  # not known: then the user knows
        assert sum(fit(pictures, feature_cache=True, **settings)[0].extracted) == 5
        return
    with pytest.raises(ValueError, match=f"feature_cache is True, but .*{reason}.*feature_cache to auto or false"):
        fit(pictures, feature_cache=True, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_cache": "yes"}, "feature_cache is 'yes', expected True, False or 'auto'"),
        ({"feature_cache": 0}, "feature_cache is 0, expected"),
        ({"feature_cache_memory": 0}, "feature_cache_memory is 0, expected a finite number above 0 GiB"),
        ({"patch_fraction": 0}, "patch_fraction is 0, expected a finite number above 0 and of at most 1"),
        ({"components": 0, "whiten": True}, "components is 0, expected an integer of at least 1 and of at most"),
        ({"top_patches": 0}, "top_patches is 0, expected an integer of at least 1"),
        ({"components": 4}, "components is 4, but only whitening keeps components: set whiten to true"),
        ({"noise": "radial"}, "whiten is False, expected .* noise is radial"),
        ({"noise": "loud"}, "noise is 'loud', expected 'gaussian'"),
    ],
)
def test_simplenet_names_wrong_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


@pytest.mark.parametrize(
    ("line", "root", "names"),
    [
        ("0::/jobs/mine", "", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/jobs/mine",
            "memory",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
@pytest.mark.parametrize("limited", ["", "jobs", "jobs/mine"])
def test_free_memory_respects_each_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, root: str, names: tuple[str, ...], limited: str
) -> None:
    monkeypatch.setattr(feature_store, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(feature_store, "_OWN_CONTROL_GROUPS", tmp_path / "own")
    of_the_machine = feature_store.free_memory()
    (tmp_path / "own").write_text(f"9:name=systemd:/\n{line}\n")
    for limit, expected in (("3000\n", 2200), ("500\n", 0), ("max\n", of_the_machine)):
        for folder in ("", "jobs", "jobs/mine"):
            group = tmp_path / root / folder
            group.mkdir(parents=True, exist_ok=True)
            (group / names[0]).write_text(limit if folder == limited else f"{2**62}\n")
            (group / names[1]).write_text("1000\n")
            (group / "memory.stat").write_text(f"anon 800\n{names[2]} 200\n")
        assert feature_store.free_memory() == pytest.approx(expected, rel=0.2)


def test_feature_cache_is_off_where_images_differ_in_size(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    from anomalib.pre_processing import PreProcessor

    crop = v2.Compose([v2.CenterCrop((64, 64)), v2.Normalize([0.5] * 3, [0.5] * 3)])
    Image.new("RGB", (200, 100), (10, 90, 40)).save(pictures / "train" / "good" / "004.png")
    plain, _, _ = fit(pictures, pre_processor=PreProcessor(transform=crop), feature_cache=False)
    with caplog.at_level(logging.INFO):
        mixed, _, _ = fit(pictures, pre_processor=PreProcessor(transform=crop))
    assert mixed.losses == pytest.approx(plain.losses, rel=1e-5)
    assert sum(mixed.extracted) > 10
    assert "feature_cache is off: training images differ in size ([(3, 80, 64), (3, 100, 200)])" in caplog.text
    with pytest.raises(ValueError, match=r"feature_cache is True, but training images differ in size .* a Resize"):
        fit(pictures, pre_processor=PreProcessor(transform=crop), feature_cache=True)


class OwnStep(SimpleNet):
    """Alters images in a hook of the model."""

    def training_step(self, batch: ImageBatch, *args: object) -> torch.Tensor:
        batch.image = batch.image + torch.rand_like(batch.image)
        return super().training_step(batch, *args)


class OwnTransfer(SimpleNet):
    """Counts the batches that go through a hook of the model."""

    batches = 0

    def on_before_batch_transfer(self, batch: ImageBatch, _loader: int) -> ImageBatch:
        self.batches += self.training
        return batch


@pytest.mark.parametrize("kind", [OwnStep, OwnTransfer])
def test_feature_cache_is_off_where_a_subclass_handles_batches(pictures: Path, kind: type[SimpleNet]) -> None:
    model, watch = kind(**TINY, pre_processor=SimpleNet.configure_pre_processor((64, 64))), Watch()
    engine = Engine(callbacks=[watch], max_epochs=3, accelerator="cpu", default_root_dir=pictures.parent / "r")
    engine.fit(model, datamodule=folder_data(pictures))
    assert sum(watch.extracted) == 15


def test_whitening_pass_calls_the_models_transfer_hooks(pictures: Path) -> None:
    model = OwnTransfer(**TINY, pre_processor=SimpleNet.configure_pre_processor((64, 64)), whiten=True)
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=pictures.parent / "r", limit_val_batches=0)
    engine.fit(model, datamodule=folder_data(pictures))
    assert model.batches == 3 + 3


def test_whitening_pass_over_a_stream_needs_a_number_of_batches(pictures: Path) -> None:
    settings = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": pictures.parent / "r"}
    stream = loader(pictures, "stream")
    with pytest.raises(ValueError, match=r"Whitening needs one pass .* number is unknown: set limit_train_batches"):
        Engine(**settings).fit(tiny_model(whiten=True), train_dataloaders=stream)
    model = tiny_model(whiten=True)
    Engine(**settings, limit_train_batches=3).fit(model, train_dataloaders=stream)
    assert model.model.whitening.fitted


@pytest.mark.parametrize("shown", [True, False])
def test_whitening_pass_shows_progress_where_the_trainer_does(
    pictures: Path, shown: bool, capfd: pytest.CaptureFixture
) -> None:
    trainer = {"max_epochs": 1, "limit_val_batches": 0, "enable_progress_bar": shown}
    fit(pictures, trainer=trainer, whiten=True)
    assert ("Whitening" in capfd.readouterr().err) == shown


TWO_PROCESSES = """
import os, sys, torch
from pathlib import Path
from anomalib.engine import Engine
from lightning import seed_everything
from tests.integration.conftest import folder_data, tiny_model
from tests.integration.test_cache import Watch

if __name__ == "__main__":
    pictures = Path(sys.argv[1])
    for kind in ("plain", "cached"):
        seed_everything(5)
        model = tiny_model(adapter_layers=1, whiten=True, feature_cache=kind == "cached")
        watch = Watch()
        engine = Engine(
            callbacks=[watch], max_epochs=4, accelerator="cpu", strategy="ddp", devices=2, limit_val_batches=0,
            default_root_dir=pictures.parent / kind,
        )
        engine.fit(model, datamodule=folder_data(pictures, train_batch_size=1))
        metrics = {"losses": watch.losses, "extracted": sum(watch.extracted)}
        torch.save(metrics, pictures.parent / f"{kind}{engine.trainer.global_rank}.pt")
"""


def test_feature_cache_trains_two_processes_as_without_cache(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(script), str(pictures)]
    process = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-3000:]
    for rank in (0, 1):
        plain, cached = (torch.load(tmp_path / f"{kind}{rank}.pt") for kind in ("plain", "cached"))
        assert len(plain["losses"]) == 12
        assert cached["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert plain["extracted"] == 15  # 3 of 5 images to a process, with whitening in 5 passes
        assert 3 <= cached["extracted"] <= 5
