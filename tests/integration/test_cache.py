"""The cache of feature maps: the same training, without reading images or running the backbone again."""

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import v2

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks import feature_cache

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
        {},
        {"whiten": True, "patch_fraction": 0.3},
        {"data": {"num_workers": 2}},
        {"trainer": {"accumulate_grad_batches": 2}},
        {"trainer": {"limit_train_batches": 2, "max_epochs": 4}},
        {"trainer": {"precision": "bf16-mixed"}},
        {"trainer": {"precision": "bf16-mixed"}, "whiten": True},
    ],
    ids=str,
)
def test_in_float32_the_training_is_that_without_cache(pictures: Path, settings: dict) -> None:
    plain, plain_model, _ = fit(pictures, feature_cache=False, **settings)
    cached, cached_model, _ = fit(pictures, feature_cache=True, feature_cache_dtype="float32", **settings)
    assert sum(cached.extracted) < sum(plain.extracted)
    assert len(plain.losses) == len(cached.losses) >= 6
    torch.testing.assert_close(cached.losses, plain.losses, rtol=1e-6, atol=1e-6)
    expected = head(plain_model)
    for key, value in head(cached_model).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_each_image_is_read_and_extracted_once(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert model._cache is None


def test_half_precision_changes_the_training_little(pictures: Path) -> None:
    plain, _, _ = fit(pictures, feature_cache=False)
    half, _, _ = fit(pictures)
    assert half.losses != plain.losses
    torch.testing.assert_close(half.losses, plain.losses, rtol=1e-3, atol=1e-3)


def test_maps_beyond_half_precision_are_kept_in_full(pictures: Path) -> None:
    class Large(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Conv2d(3, 4, 3, stride=4, bias=False)
            torch.nn.init.constant_(self.layer.weight, 1e5)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.layer(images)

    plain, _, _ = fit(pictures, backbone=Large(), layers=["layer"], feature_cache=False)
    cached, _, _ = fit(pictures, backbone=Large(), layers=["layer"])
    assert cached.losses == pytest.approx(plain.losses, rel=1e-5)


def test_maps_that_outgrow_the_memory_in_float32_say_so(pictures: Path) -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 4, stride=4, bias=False))
    torch.nn.init.constant_(backbone[0].weight, 1e5)
    half = 5 * 4 * 16 * 16 * 2 / 2**30
    with pytest.raises(ValueError, match=r"Features of .*e\+06 need float32, but .* feature_cache to false"):
        fit(pictures, backbone=backbone, layers=["0"], feature_cache_memory=1.5 * half)


class Planner(SimpleNet):
    """A model that asks for the number of steps before training, which makes Lightning set the data up."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.steps = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


def test_data_that_was_set_up_early_is_set_up_again(pictures: Path) -> None:
    pre_processor = SimpleNet.configure_pre_processor((64, 64))
    model, watch = Planner(**TINY, pre_processor=pre_processor), Watch()
    engine = Engine(callbacks=[watch], max_epochs=2, accelerator="cpu", default_root_dir=pictures.parent / "r")
    engine.fit(model, datamodule=folder_data(pictures))
    assert model.steps == 6
    assert sum(watch.extracted) == 5


def test_workers_that_stay_have_the_first_epochs_images_and_leave_in_the_end(pictures: Path) -> None:
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
    def on_train_batch_end(self, _trainer: object, _model: object, _outputs: object, batch: object, _n: int) -> None:
        self.paths = batch.image_path


def test_a_callback_that_needs_the_images_is_told_what_to_set(pictures: Path) -> None:
    with pytest.raises(AttributeError, match=r"no image_path: images are not read again\. Set feature_cache"):
        fit(pictures, trainer={"max_epochs": 1}, callbacks=[Nosy()])
    fit(pictures, trainer={"max_epochs": 1}, callbacks=[Nosy()], feature_cache=False)


def test_resuming_fills_it_again_and_goes_on_as_without_cache(pictures: Path) -> None:
    losses = []
    for cache in (False, True):
        settings = {"feature_cache": cache, "feature_cache_dtype": "float32"}
        _, _, engine = fit(pictures, trainer={"max_epochs": 2}, **settings)
        seed_everything(7, verbose=False)
        resumed = tiny_model(layers=["layer1", "layer2"], adapter_layers=1, **settings)
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


def loader(pictures: Path, kind: str) -> DataLoader:
    data = folder_data(pictures)
    data.setup()
    if kind == "anomalib":
        sampler = torch.utils.data.RandomSampler(data.train_data, replacement=True, num_samples=12)
        return DataLoader(data.train_data, batch_size=2, collate_fn=data.train_data.collate_fn, sampler=sampler)
    dataset = Recoded(pictures) if kind == "foreign" else Stream(Recoded(pictures))
    return DataLoader(dataset, batch_size=2, collate_fn=data.train_data.collate_fn)


@pytest.mark.parametrize(
    ("kind", "wish", "extracted"),
    [
        ("anomalib", "auto", "once"),
        ("foreign", "auto", "always"),
        ("foreign", True, "once"),
        ("stream", "auto", "always"),
    ],
)
def test_the_users_own_data_loaders(pictures: Path, kind: str, wish: bool | str, extracted: str) -> None:
    seed_everything(0, verbose=False)
    model, watch = tiny_model(feature_cache=wish), Watch()
    own = loader(pictures, kind)
    dataset, collate = own.dataset, own.collate_fn
    engine = Engine(callbacks=[watch], max_epochs=3, accelerator="cpu", default_root_dir=pictures.parent / "r")
    engine.fit(model, train_dataloaders=own)
    assert (sum(watch.extracted) < 10) == (extracted == "once")  # a sampler may deal an image twice in a batch
    assert (own.dataset, own.collate_fn) == (dataset, collate)


FLIP = v2.RandomHorizontalFlip()
REASONS = [
    ({"data": {"train_augmentations": FLIP}}, "RandomHorizontalFlip may change the training images"),
    (
        {"pre_processor": v2.Compose([v2.Resize((64, 64)), v2.ColorJitter(0.5)])},
        "ColorJitter may change the training images",
    ),
    ({"pre_processor": v2.Compose([v2.Normalize([0.5] * 3, [0.5] * 3)])}, "images may differ in size"),
    (
        {"data": {"external_collate_fn": lambda items: ImageBatch.collate(list(items))}},
        "collate_fn may give other images",
    ),
    ({"trainer": {"reload_dataloaders_every_n_epochs": 1}}, "set reload_dataloaders_every_n_epochs to 0"),
    ({"feature_cache_memory": 1e-4}, r"5 training images take .* GiB as float16, more than .* feature_cache_memory"),
]


@pytest.mark.parametrize(("settings", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_where_images_may_change_or_maps_do_not_fit_auto_is_off_and_true_raises(
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
        ({"feature_cache_memory": 0}, "feature_cache_memory is 0, expected GiB above 0"),
        ({"feature_cache_dtype": "int8"}, "feature_cache_dtype is 'int8', expected 'float16' or 'float32'"),
        ({"patch_fraction": 0}, "patch_fraction is 0, expected a number above 0, up to 1"),
        ({"patch_fraction": 1.5}, "patch_fraction is 1.5, expected"),
        ({"distance_weight": -1, "whiten": True}, "distance_weight is -1, expected 0"),
        ({"top_patches": 0}, "top_patches is 0, expected 1"),
        ({"distance_weight": 2.4}, "distance_weight is 2.4, .* set whiten to true"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_the_memory_of_a_container_is_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "_CONTAINER", tmp_path)
    of_the_machine = feature_cache._free_memory()
    for folder, names in (
        (tmp_path, ("memory.max", "memory.current", "inactive_file")),
        (tmp_path / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        folder.mkdir(exist_ok=True)
        for limit, expected in (("3000\n", 2200), ("500\n", 0), ("max\n", of_the_machine)):
            (folder / names[0]).write_text(limit)
            (folder / names[1]).write_text("1000\n")
            (folder / "memory.stat").write_text(f"anon 800\n{names[2]} 200\n")
            assert feature_cache._free_memory() == pytest.approx(expected, rel=0.2)


TWO_PROCESSES = """
import os, sys, torch
from pathlib import Path
from anomalib.engine import Engine
from lightning import seed_everything
from tests.integration.conftest import folder_data, tiny_model
from tests.integration.test_cache import Watch

if __name__ == "__main__":
    pictures, cache = Path(sys.argv[1]), sys.argv[2] == "cached"
    seed_everything(5)
    model = tiny_model(adapter_layers=1, whiten=True, feature_cache=cache, feature_cache_dtype="float32")
    watch = Watch()
    engine = Engine(
        callbacks=[watch], max_epochs=4, accelerator="cpu", strategy="ddp", devices=2, limit_val_batches=0,
        default_root_dir=pictures.parent / sys.argv[2],
    )
    engine.fit(model, datamodule=folder_data(pictures, train_batch_size=1))
    figures = {"losses": watch.losses, "extracted": sum(watch.extracted)}
    torch.save(figures, pictures.parent / f"{sys.argv[2]}{engine.trainer.global_rank}.pt")
"""


def test_two_processes_train_as_without_cache_though_the_sampler_deals_anew(pictures: Path, tmp_path: Path) -> None:
    script = tmp_path / "two_processes.py"
    script.write_text(TWO_PROCESSES)
    root = Path(__file__).parents[2]
    for kind in ("plain", "cached"):
        command = [sys.executable, str(script), str(pictures), kind]
        process = subprocess.run(
            command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, check=False
        )
        assert process.returncode == 0, process.stderr[-3000:]
    for rank in (0, 1):
        plain, cached = (torch.load(tmp_path / f"{kind}{rank}.pt") for kind in ("plain", "cached"))
        assert len(plain["losses"]) == 12
        assert cached["losses"] == pytest.approx(plain["losses"], rel=1e-6)
        assert plain["extracted"] == 15  # 3 of 5 images to a process, with whitening in 5 passes
        assert 3 <= cached["extracted"] <= 5
