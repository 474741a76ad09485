"""Schedule, validation, reproducibility, checkpoints."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import Batch, PredictDataset
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.plugins.io import TorchCheckpointIO
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks.resume import AtomicCheckpointIO, Resume
from anomalib_simplenet.components import PretrainedWeightsError

from .conftest import TINY, folder_data, tiny_model


class Count(Callback):
    """Count what happens in a fit, and stop it early if told to."""

    def __init__(self, stop_after_batches: int | None = None, stop_after_epochs: int | None = None) -> None:
        self.epochs = self.steps = 0
        self.validated_at: list[int] = []
        self.limit: int | None = None
        self.stop_after_batches = stop_after_batches
        self.stop_after_epochs = stop_after_epochs

    def on_train_start(self, trainer: Trainer, *_args: object) -> None:
        self.limit = trainer.max_epochs
        if self.stop_after_batches == 0:
            trainer.should_stop = True

    def on_train_batch_end(self, trainer: Trainer, *_args: object) -> None:
        self.steps += 1
        if self.steps == self.stop_after_batches:
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, *_args: object) -> None:
        self.epochs += 1
        if self.epochs == self.stop_after_epochs:
            trainer.should_stop = True

    def on_validation_end(self, *_args: object) -> None:
        self.validated_at.append(self.steps)


def fit(pictures: Path, model: SimpleNet | None = None, **trainer: object) -> tuple[Count, Engine, SimpleNet]:
    count = trainer.pop("count", None) or Count()
    callbacks = [count, *trainer.pop("callbacks", [])]
    engine = Engine(callbacks=callbacks, default_root_dir=pictures.parent / "results", accelerator="cpu", **trainer)
    model = model or tiny_model()
    engine.fit(model, datamodule=folder_data(pictures))
    return count, engine, model


def stop_at_once() -> EarlyStopping:
    return EarlyStopping("train_loss", stopping_threshold=100.0, check_on_train_epoch_end=True)


def test_fit_takes_the_papers_160_epochs_and_validates_once_by_default(pictures: Path) -> None:
    count, _, model = fit(pictures, limit_train_batches=1)
    assert (count.epochs, count.steps, count.validated_at) == (160, 160, [160])
    assert not torch.isnan(model.post_processor.image_threshold)


@pytest.mark.parametrize(
    ("limits", "epochs", "steps"),
    [
        ({"max_epochs": 2}, 2, 6),
        ({"max_steps": 4}, 2, 4),
        ({"max_epochs": 1, "max_steps": 50}, 1, 3),
        ({"count": Count(stop_after_batches=5), "max_epochs": 9}, 2, 5),
        ({"count": Count(stop_after_epochs=2), "max_epochs": 9}, 2, 6),
        ({"max_epochs": 3, "check_val_every_n_epoch": 9}, 3, 9),
        ({"max_steps": 4, "check_val_every_n_epoch": 9}, 2, 4),
    ],
)
def test_fit_keeps_the_users_limit_and_validates_once_at_its_end(
    pictures: Path, limits: dict, epochs: int, steps: int
) -> None:
    count, engine, model = fit(pictures, **limits)
    assert (count.epochs, count.steps, count.validated_at) == (epochs, steps, [steps])
    saved = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["state_dict"]["post_processor._image_threshold"] == model.post_processor.image_threshold


def test_fit_keeps_a_limit_of_1000_epochs(pictures: Path) -> None:
    assert fit(pictures, max_epochs=1000, count=Count(stop_after_batches=0))[0].limit == 1000


def test_fit_takes_max_time_in_place_of_epochs(pictures: Path) -> None:
    count, _, _ = fit(pictures, max_time="00:00:00:03")
    assert count.limit == -1
    assert count.validated_at == [count.steps]


@pytest.mark.parametrize(
    ("settings", "validated_at"),
    [
        ({"check_val_every_n_epoch": 2}, [6, 12]),
        ({"check_val_every_n_epoch": 3}, [9, 12]),
        ({"check_val_every_n_epoch": 3, "count": Count(stop_after_epochs=2)}, [6]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 3}, [3, 6, 9, 12]),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, [5, 10, 12]),
        ({"val_check_interval": 1}, list(range(1, 13))),
        ({"callbacks": [EarlyStopping("train_loss", patience=9)], "max_steps": 5}, [3, 5]),
        ({"callbacks": [stop_at_once()], "check_val_every_n_epoch": 3}, [3]),
        ({"callbacks": [stop_at_once()], "check_val_every_n_epoch": None, "val_check_interval": 2}, [2, 3]),
        ({"count": Count(stop_after_batches=1), "min_epochs": 3, "check_val_every_n_epoch": 2}, [6, 9]),
        ({"callbacks": [EarlyStopping("train_loss", patience=9)]}, [3, 6, 9, 12]),
    ],
)
def test_fit_validates_as_often_as_requested(pictures: Path, settings: dict, validated_at: list[int]) -> None:
    count, engine, model = fit(pictures, max_epochs=4, **settings)
    assert count.validated_at == validated_at
    saved = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["global_step"] == engine.trainer.global_step
    assert saved["state_dict"]["post_processor._image_threshold"] == model.post_processor.image_threshold


def test_fit_validates_after_one_that_failed(pictures: Path) -> None:
    class FailOnce(Callback):
        failed = False

        def on_train_batch_end(self, *_args: object) -> None:
            if not self.failed:
                self.failed = True
                msg = "power cut"
                raise RuntimeError(msg)

    count, model, data = Count(), tiny_model(), folder_data(pictures)
    results = pictures.parent / "results"
    engine = Engine(callbacks=[FailOnce(), count], max_epochs=2, default_root_dir=results, accelerator="cpu")
    with pytest.raises(RuntimeError, match="power cut"):
        engine.fit(model, datamodule=data)
    engine.fit(model, datamodule=data)
    assert count.validated_at == [count.steps]


def test_fit_repeats_with_the_seed_and_trains_the_head_alone(pictures: Path) -> None:
    states = []
    for _ in range(2):
        seed_everything(3)
        model = tiny_model(adapter_layers=1, whiten=True, averaging=True)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fit(pictures, model, max_epochs=2)
        states.append(model.state_dict())
    changed = {key for key, value in states[0].items() if not torch.equal(value, before[key])}
    assert {key.split(".")[1] for key in changed if key.startswith("model.")} == {
        "adapter",
        "discriminator",
        "averaged",  # of these two
        "whitening",
    }
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items() if key.startswith("model."))


@pytest.mark.parametrize("whiten", [True, False])
def test_fit_repeats_with_or_without_cache_and_workers(pictures: Path, tmp_path: Path, whiten: bool) -> None:
    states = []
    for cache, workers in ((False, 0), (False, 2), (True, 0), (True, 2)):
        seed_everything(3)
        model = tiny_model(whiten=whiten, feature_cache=cache, patch_fraction=0.5)
        engine = Engine(max_epochs=3, accelerator="cpu", deterministic=True, default_root_dir=tmp_path)
        engine.fit(model, datamodule=folder_data(pictures, num_workers=workers))
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_whitening_pass_uses_the_training_images_and_is_kept_on_resuming(pictures: Path) -> None:
    arguments = {"whiten": True, "layers": ["layer2", "layer1"], "map_layer": "layer1"}
    _, engine, model = fit(pictures, tiny_model(**arguments), max_epochs=1)
    transform, net = model.pre_processor.transform, model.model
    features = net.extract(torch.cat([transform(item.image[None]) for item in folder_train(pictures)]))
    kept = {}
    for whitening, maps in (
        (net.whitening, net.patch_aggregation(features)),
        (net.fine_map.whitening, net.fine_map.cells(features)),
    ):
        white = whitening(maps).permute(0, 2, 3, 1).flatten(0, 2)
        torch.testing.assert_close(white.mean(dim=0), torch.zeros(white.shape[1]), atol=1e-3, rtol=0)
        kept[whitening] = whitening.weight.clone()
    resumed = tiny_model(**arguments)
    other = Engine(max_epochs=2, default_root_dir=pictures.parent / "again", accelerator="cpu")
    other.fit(resumed, datamodule=folder_data(pictures), ckpt_path=engine.trainer.checkpoint_callback.best_model_path)
    for whitening, weight in zip(
        (resumed.model.whitening, resumed.model.fine_map.whitening), kept.values(), strict=True
    ):
        assert torch.equal(whitening.weight, weight)


@pytest.mark.parametrize("whiten", [True, "local"])
def test_fit_on_other_images_whitens_and_averages_anew(pictures: Path, whiten: bool | str) -> None:
    model = tiny_model(whiten=whiten, averaging=True)
    fit(pictures, model, max_epochs=2)
    other = {"normal_dir": "test/bad", "abnormal_dir": "train/good", "mask_dir": None}
    both = {}
    for name, each in (("again", model), ("first", tiny_model(whiten=whiten, averaging=True))):
        each.model.feature_extractor.load_state_dict(model.model.feature_extractor.state_dict())
        engine = Engine(max_epochs=1, default_root_dir=pictures.parent / name, accelerator="cpu")
        engine.fit(each, datamodule=folder_data(pictures, **other))
        both[name] = each.model
    torch.testing.assert_close(both["again"].whitening.weight, both["first"].whitening.weight)
    assert both["again"].averaged.steps == both["first"].averaged.steps == 2
    engine.fit(model, datamodule=folder_data(pictures, **other))  # no epochs are left
    assert model.model.averaged.steps == 2


def test_checkpoint_of_before_an_argument_was_added_loads(pictures: Path) -> None:
    _, engine, model = fit(pictures, tiny_model(), max_epochs=1)
    path = engine.trainer.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)
    del saved["hyper_parameters"]["map_layer"]
    torch.save(saved, path)
    loaded = SimpleNet.load_from_checkpoint(path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images).pred_score, model.eval()(images).pred_score)


def test_whitening_pass_refuses_identical_images(pictures: Path) -> None:
    for path in (pictures / "train" / "good").iterdir():
        path.write_bytes((pictures / "test" / "good" / "000.png").read_bytes())
    with pytest.raises(ValueError, match="patches have no variance"):
        fit(pictures, tiny_model(whiten="local"), max_epochs=1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_setup_refuses_precisions_that_anomalib_cannot_use(pictures: Path, precision: str) -> None:
    with pytest.raises(ValueError, match=f"precision is {precision}, expected 32-true, 16-mixed or bf16-mixed"):
        fit(pictures, max_epochs=1, precision=precision)


def folder_train(pictures: Path) -> list:
    data = folder_data(pictures)
    data.setup()
    return list(data.train_data)


def test_training_logs_loss_and_accuracies(pictures: Path) -> None:
    _, engine, _ = fit(pictures, max_epochs=1)
    logged = engine.trainer.callback_metrics
    assert logged["train_loss"] > 0
    assert {"real_accuracy", "fake_accuracy"} <= logged.keys()


def test_training_step_returns_the_loss_of_its_scores() -> None:
    model = tiny_model()
    model.log_dict = lambda metrics, **_: logged.update(metrics)
    logged: dict = {}
    real, fake = torch.tensor([1.0, 0.2, -1.0, 0.6]), torch.tensor([-1.0, 0.0, 1.0, -0.2])
    model.model.discriminate = lambda _features: (real, fake)

    class OneBatch:
        image = torch.zeros(1, 3, 8, 8)

    loss = model.training_step(OneBatch(), 0)
    assert loss.item() == pytest.approx((0.3 + 1.5) / 4 + (0.5 + 1.5 + 0.3) / 4)
    assert (logged["real_accuracy"], logged["fake_accuracy"]) == (0.5, 0.25)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_precisions_train_and_test(pictures: Path, precision: str) -> None:
    engine = Engine(max_epochs=1, precision=precision, default_root_dir=pictures.parent / "r", accelerator="cpu")
    results = engine.train(tiny_model(), datamodule=folder_data(pictures))
    assert set(results[0]) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"}


def test_fit_trains_on_batches_of_one_patch(pictures: Path) -> None:
    model = tiny_model(layers=["layer4"], image_size=(32, 32))
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "r", accelerator="cpu")
    engine.fit(model, datamodule=folder_data(pictures, train_batch_size=1))
    assert all(torch.isfinite(value).all() for key, value in model.state_dict().items() if key.startswith("model."))


def test_checkpoint_loads_without_the_weights_folder(real: Path, pictures: Path) -> None:
    folder = real / "moving"
    folder.mkdir()
    for path in (real / "efficientnet_lite0").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    model = tiny_model(backbone=f"local-dir:{folder}", layers=["blocks.2", "blocks.4"], pre_trained=True)
    _, engine, _ = fit(pictures, model, max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    folder.rename(real / "moved")

    images = torch.rand(2, 3, 70, 90)
    expected = model.eval()(images)
    loaded = SimpleNet.load_from_checkpoint(checkpoint).eval()
    assert torch.equal(loaded(images).pred_score, expected.pred_score)
    assert not loaded.model.feature_extractor.missing_weights
    # A model of another architecture takes that of the checkpoint.
    other = tiny_model(noise_std=0.5)
    fresh = Engine(default_root_dir=pictures.parent / "fresh", accelerator="cpu")
    data = DataLoader(folder_data_test(pictures), collate_fn=folder_data_test(pictures).collate_fn)
    fresh.predict(other, dataloaders=data, ckpt_path=checkpoint)
    assert torch.equal(other.eval()(images).pred_score, expected.pred_score)
    assert other.hparams["layers"] == ["blocks.2", "blocks.4"]


def folder_data_test(pictures: Path) -> object:
    data = folder_data(pictures)
    data.setup()
    return data.test_data


def test_checkpoint_with_a_module_as_backbone_needs_it_again(pictures: Path) -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.ReLU())
    _, engine, model = fit(pictures, tiny_model(backbone=backbone, layers=["1"]), max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="trained with a module as backbone"):
        SimpleNet.load_from_checkpoint(checkpoint)
    again = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.ReLU())
    images = torch.rand(1, 3, 64, 64)
    loaded = SimpleNet.load_from_checkpoint(checkpoint, backbone=again).eval()
    assert torch.equal(loaded(images).pred_score, model.eval()(images).pred_score)


def test_checkpoint_with_an_unpicklable_backbone_names_what_to_build(pictures: Path) -> None:
    class Local(torch.nn.Sequential):
        pass

    def build(**arguments: object) -> SimpleNet:
        return tiny_model(backbone=Local(torch.nn.Conv2d(3, 8, 3, 4)), layers=["0"], **arguments)

    _, engine, _ = fit(pictures, build(adapter_layers=2), max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    engine.test(build(adapter_layers=2), datamodule=folder_data(pictures), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match=r"trained with \{'adapter_layers': 2\}: build the model with these"):
        engine.test(build(adapter_layers=1), datamodule=folder_data(pictures), ckpt_path=checkpoint)


def test_averaging_happens_once_a_step_and_is_kept_in_checkpoints(pictures: Path, tmp_path: Path) -> None:
    engine, model = (
        Engine(max_epochs=2, accumulate_grad_batches=2, default_root_dir=tmp_path),
        tiny_model(averaging=True),
    )
    engine.fit(model, datamodule=folder_data(pictures))
    assert int(model.model.averaged.steps) == engine.trainer.global_step == 4
    loaded = SimpleNet.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images).pred_score, model.eval()(images).pred_score)


def test_checkpoint_of_another_format_is_refused(pictures: Path, tmp_path: Path) -> None:
    _, engine, _ = fit(pictures, max_epochs=1)
    checkpoint = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)
    del checkpoint["simplenet_format"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match=r"format None, expected 3: .* Use that version, or train again"):
        SimpleNet.load_from_checkpoint(tmp_path / "old.ckpt")


def test_checkpoint_of_another_model_is_refused(pictures: Path) -> None:
    from anomalib.models import Padim

    engine = Engine(default_root_dir=pictures.parent / "padim", accelerator="cpu")
    engine.fit(Padim("resnet18", pre_trained=False), datamodule=folder_data(pictures))
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="no checkpoint of SimpleNet"):
        Engine(accelerator="cpu").test(tiny_model(), datamodule=folder_data(pictures), ckpt_path=checkpoint)


def test_fit_refuses_a_backbone_whose_weights_could_not_be_loaded(pictures: Path) -> None:
    with pytest.raises(PretrainedWeightsError, match="could not be loaded"):
        fit(pictures, tiny_model(backbone="resnet18.tv_in1k", pre_trained=True), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_lr": 0}, "adapter_lr is 0, expected a finite number above 0"),
        ({"discriminator_lr": -1.0}, "discriminator_lr is -1.0, expected"),
        (
            {"discriminator_weight_decay": -1},
            "discriminator_weight_decay is -1, expected a finite number of",
        ),
    ],
)
def test_model_refuses_wrong_arguments_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_configure_pre_processor_refuses_a_crop_larger_than_the_image() -> None:
    with pytest.raises(ValueError, match=r"center_crop_size is \(300, 300\), expected at most image_size"):
        SimpleNet.configure_pre_processor(center_crop_size=(300, 300))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["layer4"], "image_size": (64, 16)}, "images of .* expected at least 32, the stride"),
        (
            {"backbone": "vit_small_patch14_dinov2", "layers": ["blocks.1"], "image_size": (64, 64)},
            "expected multiples of 14, the backbone's patch size",
        ),
    ],
)
def test_setup_refuses_image_sizes_that_the_backbone_cannot_take(pictures: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(pictures, tiny_model(**arguments), max_epochs=1)


def test_fit_trains_and_validates_after_the_batch_size_finder(pictures: Path) -> None:
    finder = BatchSizeFinder("power", steps_per_trial=2, init_val=1, max_trials=1, batch_arg_name="train_batch_size")
    count, engine, model = fit(pictures, max_epochs=2, callbacks=[finder])
    assert engine.trainer.current_epoch == 2
    assert count.validated_at[-1] == count.steps
    assert model.post_processor.image_threshold.isfinite()
    assert Path(engine.trainer.checkpoint_callback.best_model_path).is_file()


class Swap(Callback):
    """Put other weights in place at one moment, as Lightning's EMA callbacks do."""

    def __init__(self, moment: str) -> None:
        setattr(self, moment, self.swap)

    def swap(self, _trainer: Trainer, model: SimpleNet, *_args: object) -> None:
        for parameter in model.model.discriminator.parameters():
            parameter.data.mul_(1.5)


@pytest.mark.parametrize("moment", ["on_test_start", "on_test_epoch_start"])
def test_test_scores_with_weights_that_a_callback_swapped_in(pictures: Path, moment: str) -> None:
    model, scores = tiny_model(post_processor=False, evaluator=False, visualizer=False, report=False), []
    fit(pictures, model, max_epochs=1)

    class Scores(Callback):
        def on_test_batch_end(self, _trainer: Trainer, _model: SimpleNet, outputs: object, *_args: object) -> None:
            scores.append(outputs.pred_score)

    for callbacks in ([], [Swap(moment)]):
        engine = Engine([Scores(), *callbacks], accelerator="cpu", default_root_dir=pictures.parent / "swapped")
        engine.test(model, datamodule=folder_data(pictures))
    before, after = torch.cat(scores).chunk(2)
    assert not torch.allclose(before, after, rtol=1e-3)


@pytest.mark.parametrize("kind", [WeightAveraging, EMAWeightAveraging])
def test_whitening_goes_with_lightnings_weight_averaging(pictures: Path, kind: type) -> None:
    _, engine, model = fit(pictures, tiny_model(whiten=True), max_epochs=2, callbacks=[kind()])
    assert model.model.whitening.fitted == 1
    assert engine.trainer.current_epoch == 2
    with pytest.raises(ValueError, match="WeightAveraging cannot average: set averaging to true instead"):
        fit(pictures, tiny_model(whiten="local"), max_epochs=1, callbacks=[kind()])


def test_resuming_for_more_epochs_trains_as_if_all_had_been_asked_for(pictures: Path) -> None:
    def trained(epochs: int, checkpoint: str | None = None) -> tuple[SimpleNet, str]:
        torch.manual_seed(0)
        model = tiny_model(visualizer=False, report=False)
        engine = Engine(max_epochs=epochs, default_root_dir=pictures.parent / "results", accelerator="cpu")
        engine.fit(model, datamodule=folder_data(pictures), ckpt_path=checkpoint)
        return model, engine.trainer.checkpoint_callback.best_model_path

    resumed, _ = trained(2, trained(1)[1])
    for value, other in zip(resumed.state_dict().values(), trained(2)[0].state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=0, equal_nan=True)


def test_resume_gives_each_process_noise_of_its_own() -> None:
    class OfRank:
        ckpt_path = None

        def __init__(self, rank: int) -> None:
            self.global_rank = rank

    def drawn(rank: int, resumed: dict | None = None) -> list[float]:
        seed_everything(7, verbose=False)
        resume, trainer = Resume(), OfRank(rank)
        if resumed is not None:
            trainer.ckpt_path = "model.ckpt"
            resume.load_state_dict(resumed)
        resume.on_fit_start(trainer, None)
        return torch.rand(3).tolist()

    saved = Resume().state_dict()
    for state in (None, saved):
        assert drawn(1, state) == drawn(1, state) != drawn(0, state)
        assert drawn(2, state) != drawn(1, state)


def test_checkpoint_io_keeps_the_earlier_file_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, writer = tmp_path / "model.ckpt", AtomicCheckpointIO(TorchCheckpointIO())
    writer.save_checkpoint({"epoch": 1}, path)

    def half(target: Path, content: memoryview) -> None:
        with target.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="No space left"):
        writer.save_checkpoint({"epoch": 2}, path)
    assert writer.load_checkpoint(path) == {"epoch": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["model.ckpt"]


def test_fit_writes_checkpoints_without_a_detour_through_the_temporary_folder(pictures: Path) -> None:
    _, engine, _ = fit(pictures, max_epochs=1)
    assert type(engine.trainer.strategy.checkpoint_io) is AtomicCheckpointIO


def test_test_of_a_checkpoint_scores_as_predict_does(pictures: Path) -> None:
    for path in (pictures / "test").rglob("*.png"):
        with Image.open(path) as image:
            image.resize((600, 1200)).save(path)
    for path in (pictures / "ground_truth").rglob("*.png"):
        with Image.open(path) as image:
            image.resize((600, 1200)).save(path)
    _, engine, _ = fit(pictures, tiny_model(image_size=(96, 64)), max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    scores: dict[str, dict[str, float]] = {}
    other = {key: value for key, value in TINY.items() if key != "pre_trained"}
    for name, run in (("test", "test"), ("predict", "predict")):
        fresh = Engine(accelerator="cpu", default_root_dir=pictures.parent / name)
        model = SimpleNet(pre_trained=False, **other)  # with the default pre-processor's 288 x 288
        data = folder_data(pictures, val_split_mode="same_as_test", eval_batch_size=1)
        if run == "test":
            fresh.test(model, datamodule=data, ckpt_path=checkpoint)
        else:
            images = PredictDataset(pictures / "test")
            loader = DataLoader(images, batch_size=1, collate_fn=images.collate_fn)
            fresh.predict(model, dataloaders=loader, ckpt_path=checkpoint)
        with (Path(fresh.trainer.default_root_dir) / "predictions.csv").open() as file:
            scores[name] = {
                Path(row["image_path"]).parts[-2:]: float(row["pred_score"]) for row in csv.DictReader(file)
            }
    assert scores["test"].keys() == scores["predict"].keys()
    assert scores["test"] == pytest.approx(scores["predict"], abs=1e-6)


@pytest.mark.parametrize("change", ["bias", "running_mean", "noise_std"])
def test_checkpoint_with_weights_that_are_not_finite_is_refused(pictures: Path, change: str) -> None:
    class Break(Callback):
        def on_train_batch_end(self, _trainer: Trainer, model: SimpleNet, *_args: object) -> None:
            linear, norm, _ = model.model.discriminator.body[0]
            if change == "noise_std":
                model.model.anomaly_generator.noise_std = 1e30
            else:
                (linear.bias if change == "bias" else norm.running_mean).data.fill_(torch.nan)

    with pytest.raises(ValueError, match=r"NaN or infinite"):
        fit(pictures, max_epochs=1, callbacks=[Break()], limit_val_batches=0)
    message = "is NaN or infinite" if change == "noise_std" else "scores are NaN or infinite: the model's weights"
    with pytest.raises(ValueError, match=message):
        fit(pictures, max_epochs=1, callbacks=[Break()])
    assert not list((pictures.parent / "results").rglob("*.ckpt"))


def test_model_takes_numpy_numbers_and_keeps_them_plain_in_checkpoints(pictures: Path) -> None:
    model = tiny_model(patch_size=np.int64(3), noise_std=np.float32(0.1), adapter_lr=np.float64(1e-4))
    _, engine, _ = fit(pictures, model, max_epochs=1)
    saved = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)["hyper_parameters"]
    assert (type(saved["patch_size"]), type(saved["noise_std"])) == (int, float)


def test_checkpoint_keeps_top_patches_unless_others_are_requested(
    pictures: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, engine, _ = fit(pictures, tiny_model(top_patches=3), max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    for requested, expected in ((1, 3), (3, 3), (5, 5)):
        model = tiny_model(top_patches=requested)
        Engine(accelerator="cpu", default_root_dir=pictures.parent / "r").test(
            model, datamodule=folder_data(pictures), ckpt_path=checkpoint
        )
        assert model.model.top_patches == expected
    warning = "top_patches is 5, but thresholds and p-values of the checkpoint are those of 3: validate anew."
    assert [record.getMessage() for record in caplog.records].count(warning) == 1
    caplog.clear()
    SimpleNet.load_from_checkpoint(checkpoint, top_patches=5)
    assert warning in caplog.text

    saved = torch.load(checkpoint, weights_only=True)
    assert saved.pop("simplenet_top_patches") == 3
    saved["hyper_parameters"]["top_patches"], saved["simplenet_format"] = 3, 2  # as before
    torch.save(saved, pictures / "format2.ckpt")
    assert SimpleNet.load_from_checkpoint(pictures / "format2.ckpt").model.top_patches == 3


def test_train_that_resumes_tests_the_weights_just_trained(pictures: Path) -> None:
    _, engine, _ = fit(pictures, tiny_model(), max_epochs=1)
    first = engine.trainer.checkpoint_callback.best_model_path
    resumed, model = Engine(max_epochs=3, accelerator="cpu", default_root_dir=pictures.parent / "r"), tiny_model()
    metrics = resumed.train(model, datamodule=folder_data(pictures), ckpt_path=first)
    last = resumed.trainer.checkpoint_callback.best_model_path
    assert last != first
    saved = torch.load(last, weights_only=True)["state_dict"]["model.discriminator.tail.weight"]
    assert torch.equal(model.model.discriminator.tail.weight, saved)
    again = Engine(accelerator="cpu", default_root_dir=pictures.parent / "r2")
    assert metrics == again.test(tiny_model(), datamodule=folder_data(pictures), ckpt_path=last)


def test_metrics_forget_a_run_that_an_exception_ended(pictures: Path) -> None:
    model = tiny_model()
    _, engine, _ = fit(pictures, model, max_epochs=1)
    path, data = engine.trainer.checkpoint_callback.best_model_path, {"val_split_mode": "same_as_test"}

    def ranges() -> list[float]:
        processor = model.post_processor
        return [processor.image_threshold.item(), processor.image_min.item(), processor.pixel_max.item()]

    def run(name: str) -> object:
        runner = Engine(accelerator="cpu", default_root_dir=pictures.parent / "again")
        return getattr(runner, name)(model, datamodule=folder_data(pictures, eval_batch_size=1, **data), ckpt_path=path)

    run("validate")
    expected, metrics = ranges(), run("test")
    for name in ("validate", "test"):
        step = model.predict_step

        def broken(batch: Batch, index: int, step: Callable = step) -> Batch:
            if index == 3:
                raise InterruptedError
            batch = step(batch)
            return batch.update(pred_score=batch.pred_score - 9, anomaly_map=batch.anomaly_map + 9)

        setattr(model, f"{name.replace('date', 'dation')}_step", broken)
        with pytest.raises(InterruptedError):
            run(name)
        delattr(model, f"{name.replace('date', 'dation')}_step")
    run("validate")
    assert ranges() == expected
    assert run("test") == metrics


@pytest.mark.parametrize("processor", [False, PostProcessor(enable_thresholding=False)])
def test_test_without_thresholds_gives_the_metrics_that_need_none(pictures: Path, processor: object) -> None:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "r", accelerator="cpu")
    results = engine.train(tiny_model(post_processor=processor), datamodule=folder_data(pictures))
    assert set(results[0]) == {"image_AUROC", "pixel_AUROC"}


@pytest.mark.parametrize(("arguments", "warned"), [({}, True), ({"noise_std": 0.5}, False), ({"whiten": True}, False)])
def test_setup_warns_of_the_papers_noise_with_another_backbone(
    pictures: Path, caplog: pytest.LogCaptureFixture, arguments: dict, warned: bool
) -> None:
    fit(pictures, tiny_model(**arguments), max_epochs=1)
    assert any("noise_std is 0.015, for WideResNet-50-2" in each.getMessage() for each in caplog.records) is warned


def test_checkpoint_without_a_pre_processor_scores_alike_through_a_model_with_one(pictures: Path) -> None:
    _, engine, model = fit(pictures, tiny_model(pre_processor=False), max_epochs=1)
    scores: list[torch.Tensor] = []

    class Scores(Callback):
        def on_test_batch_end(self, _trainer: Trainer, _model: SimpleNet, outputs: object, *_args: object) -> None:
            scores.append(outputs.pred_score)

    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    for each, path in ((model, None), (tiny_model(), checkpoint)):
        fresh = Engine([Scores()], accelerator="cpu", default_root_dir=pictures.parent / "r")
        fresh.test(each, datamodule=folder_data(pictures), ckpt_path=path)
    expected, found = torch.cat(scores).chunk(2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
