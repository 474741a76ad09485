"""Schedule, validation, reproducibility, checkpoints."""

from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch.utils.data import DataLoader

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.components import PretrainedWeightsError

from .conftest import folder_data, tiny_model


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


def test_trains_for_the_papers_160_epochs_and_validates_once_where_nothing_is_said(pictures: Path) -> None:
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
def test_the_users_limit_wins_and_validation_runs_once_at_its_end(
    pictures: Path, limits: dict, epochs: int, steps: int
) -> None:
    count, engine, model = fit(pictures, **limits)
    assert (count.epochs, count.steps, count.validated_at) == (epochs, steps, [steps])
    saved = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["state_dict"]["post_processor._image_threshold"] == model.post_processor.image_threshold


def test_a_thousand_epochs_are_a_thousand_where_the_user_says_so(pictures: Path) -> None:
    assert fit(pictures, max_epochs=1000, count=Count(stop_after_batches=0))[0].limit == 1000


def test_max_time_takes_the_place_of_epochs(pictures: Path) -> None:
    count, _, _ = fit(pictures, max_time="00:00:00:03")
    assert count.limit == -1
    assert count.validated_at == [count.steps]


@pytest.mark.parametrize(
    ("wish", "validated_at"),
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
def test_who_asks_for_more_validation_gets_it(pictures: Path, wish: dict, validated_at: list[int]) -> None:
    count, engine, model = fit(pictures, max_epochs=4, **wish)
    assert count.validated_at == validated_at
    saved = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)
    assert saved["global_step"] == engine.trainer.global_step
    assert saved["state_dict"]["post_processor._image_threshold"] == model.post_processor.image_threshold


def test_a_fit_that_failed_does_not_keep_the_next_from_validating(pictures: Path) -> None:
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


def test_same_seed_same_weights_and_only_the_head_trains(pictures: Path) -> None:
    states = []
    for _ in range(2):
        seed_everything(3)
        model = tiny_model(adapter_layers=1, whiten=True)
        before = {key: value.clone() for key, value in model.state_dict().items()}
        fit(pictures, model, max_epochs=2)
        states.append(model.state_dict())
    changed = {key for key, value in states[0].items() if not torch.equal(value, before[key])}
    assert {key.split(".")[1] for key in changed if key.startswith("model.")} == {
        "adapter",
        "discriminator",
        "averaged",  # of these two
        "averaged_steps",
        "whitening",
    }
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items() if key.startswith("model."))


@pytest.mark.parametrize("whiten", [True, False])
def test_same_seed_same_weights_with_cache_or_without_and_whoever_reads_the_images(
    pictures: Path, tmp_path: Path, whiten: bool
) -> None:
    states = []
    for cache, workers in ((False, 0), (False, 2), (True, 0), (True, 2)):
        seed_everything(3)
        model = tiny_model(whiten=whiten, feature_cache=cache, feature_cache_dtype="float32", patch_fraction=0.5)
        engine = Engine(max_epochs=3, accelerator="cpu", deterministic=True, default_root_dir=tmp_path)
        engine.fit(model, datamodule=folder_data(pictures, num_workers=workers))
        states.append(model.state_dict())
    for state in states[1:]:
        assert all(torch.equal(state[key], value) for key, value in states[0].items())


def test_whitening_is_that_of_the_training_images_and_kept_on_resuming(pictures: Path) -> None:
    model = tiny_model(whiten=True)
    _, engine, _ = fit(pictures, model, max_epochs=1)
    transform = model.pre_processor.transform
    maps = torch.cat([model.model.embed(transform(item.image[None])) for item in folder_train(pictures)])
    white = model.model.whitening(maps.permute(0, 2, 3, 1).flatten(0, 2))
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(16), atol=1e-3, rtol=0)
    kept = model.model.whitening.weight.clone()
    resumed = tiny_model(whiten=True)
    other = Engine(max_epochs=2, default_root_dir=pictures.parent / "again", accelerator="cpu")
    other.fit(resumed, datamodule=folder_data(pictures), ckpt_path=engine.trainer.checkpoint_callback.best_model_path)
    assert torch.equal(resumed.model.whitening.weight, kept)


@pytest.mark.parametrize("whiten", [True, "local"])
def test_training_on_other_images_whitens_by_these_and_averages_anew(pictures: Path, whiten: bool | str) -> None:
    model = tiny_model(whiten=whiten)
    fit(pictures, model, max_epochs=2)
    other = {"normal_dir": "test/bad", "abnormal_dir": "train/good", "mask_dir": None}
    both = {}
    for name, each in (("again", model), ("first", tiny_model(whiten=whiten))):
        each.model.feature_extractor.load_state_dict(model.model.feature_extractor.state_dict())
        engine = Engine(max_epochs=1, default_root_dir=pictures.parent / name, accelerator="cpu")
        engine.fit(each, datamodule=folder_data(pictures, **other))
        both[name] = each.model
    torch.testing.assert_close(both["again"].whitening.weight, both["first"].whitening.weight)
    assert both["again"].averaged_steps == both["first"].averaged_steps == 2
    engine.fit(model, datamodule=folder_data(pictures, **other))  # no epochs are left
    assert model.model.averaged_steps == 2


def test_local_whitening_of_copies_is_refused(pictures: Path) -> None:
    for path in (pictures / "train" / "good").iterdir():
        path.write_bytes((pictures / "test" / "good" / "000.png").read_bytes())
    with pytest.raises(ValueError, match="training images' patches do not differ"):
        fit(pictures, tiny_model(whiten="local"), max_epochs=1)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_precision_that_batches_do_not_go_with_is_refused(pictures: Path, precision: str) -> None:
    with pytest.raises(ValueError, match=f"precision is {precision}, expected 32-true, 16-mixed or bf16-mixed"):
        fit(pictures, max_epochs=1, precision=precision)


def folder_train(pictures: Path) -> list:
    data = folder_data(pictures)
    data.setup()
    return list(data.train_data)


def test_health_figures_are_logged(pictures: Path) -> None:
    _, engine, _ = fit(pictures, max_epochs=1)
    figures = engine.trainer.callback_metrics
    assert figures["train_loss"] > 0
    assert 0 <= figures["p_true"] <= 1
    assert 0 <= figures["p_fake"] <= 1


def test_training_step_returns_the_loss_of_its_scores() -> None:
    model = tiny_model()
    model.log_dict = lambda figures, **_: logged.update(figures)
    logged: dict = {}
    real, fake = torch.tensor([1.0, 0.2, -1.0, 0.6]), torch.tensor([-1.0, 0.0, 1.0, -0.2])
    model.model.discriminate = lambda _features: (real, fake)

    class OneBatch:
        image = torch.zeros(1, 3, 8, 8)

    loss = model.training_step(OneBatch(), 0)
    assert loss.item() == pytest.approx((0.3 + 1.5) / 4 + (0.5 + 1.5 + 0.3) / 4)
    assert (logged["p_true"], logged["p_fake"]) == (0.5, 0.25)


@pytest.mark.parametrize("precision", ["bf16-mixed", "32"])
def test_precisions_train_and_test(pictures: Path, precision: str) -> None:
    engine = Engine(max_epochs=1, precision=precision, default_root_dir=pictures.parent / "r", accelerator="cpu")
    results = engine.train(tiny_model(), datamodule=folder_data(pictures))
    assert set(results[0]) == {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score", "pixel_AUPRO"}


def test_a_last_batch_of_one_image_and_one_patch_trains(pictures: Path) -> None:
    model = tiny_model(layers=["layer4"], image_size=(32, 32))
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "r", accelerator="cpu")
    engine.fit(model, datamodule=folder_data(pictures, train_batch_size=1))
    assert all(torch.isfinite(value).all() for key, value in model.state_dict().items() if key.startswith("model."))


def test_checkpoint_moves_to_a_machine_without_the_weights_folder(real: Path, pictures: Path) -> None:
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


def test_a_module_as_backbone_is_given_again_on_loading(pictures: Path) -> None:
    backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.ReLU())
    _, engine, model = fit(pictures, tiny_model(backbone=backbone, layers=["1"]), max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="trained with a module as backbone"):
        SimpleNet.load_from_checkpoint(checkpoint)
    again = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, 4), torch.nn.ReLU())
    images = torch.rand(1, 3, 64, 64)
    loaded = SimpleNet.load_from_checkpoint(checkpoint, backbone=again).eval()
    assert torch.equal(loaded(images).pred_score, model.eval()(images).pred_score)


def test_a_backbone_of_a_class_that_cannot_be_pickled_trains_and_says_what_it_lacks(pictures: Path) -> None:
    class Local(torch.nn.Sequential):
        pass

    def build(**arguments: object) -> SimpleNet:
        return tiny_model(backbone=Local(torch.nn.Conv2d(3, 8, 3, 4)), layers=["0"], **arguments)

    _, engine, _ = fit(pictures, build(adapter_layers=2), max_epochs=1)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    engine.test(build(adapter_layers=2), datamodule=folder_data(pictures), ckpt_path=checkpoint)
    with pytest.raises(ValueError, match=r"trained with \{'adapter_layers': 2\}: build the model with these"):
        engine.test(build(adapter_layers=1), datamodule=folder_data(pictures), ckpt_path=checkpoint)


def test_weights_are_averaged_once_a_step_and_a_checkpoint_keeps_them(pictures: Path, tmp_path: Path) -> None:
    engine, model = Engine(max_epochs=2, accumulate_grad_batches=2, default_root_dir=tmp_path), tiny_model()
    engine.fit(model, datamodule=folder_data(pictures))
    assert int(model.model.averaged_steps) == engine.trainer.global_step == 4
    loaded = SimpleNet.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded.eval()(images).pred_score, model.eval()(images).pred_score)


def test_a_checkpoint_from_before_averaging_loads(pictures: Path, tmp_path: Path) -> None:
    engine, model = Engine(max_epochs=1, default_root_dir=tmp_path), tiny_model(averaging=False)
    engine.fit(model, datamodule=folder_data(pictures))
    path = tmp_path / "old.ckpt"
    checkpoint = torch.load(engine.trainer.checkpoint_callback.best_model_path, weights_only=True)
    for name in ("averaging", "distance_weight", "top_patches"):
        del checkpoint["hyper_parameters"][name]
    torch.save(checkpoint, path)
    loaded = SimpleNet.load_from_checkpoint(path).eval()
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(loaded(images).pred_score, model.eval()(images).pred_score)


def test_a_checkpoint_of_another_model_is_refused(pictures: Path) -> None:
    from anomalib.models import Padim

    engine = Engine(default_root_dir=pictures.parent / "padim", accelerator="cpu")
    engine.fit(Padim("resnet18", pre_trained=False), datamodule=folder_data(pictures))
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="no checkpoint of SimpleNet"):
        Engine(accelerator="cpu").test(tiny_model(), datamodule=folder_data(pictures), ckpt_path=checkpoint)


def test_training_without_the_backbones_weights_is_refused(pictures: Path) -> None:
    with pytest.raises(PretrainedWeightsError, match="could not be loaded"):
        fit(pictures, tiny_model(backbone="resnet18.tv_in1k", pre_trained=True), max_epochs=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapter_lr": 0}, "adapter_lr is 0, expected a number above 0"),
        ({"discriminator_lr": -1.0}, "discriminator_lr is -1.0, expected"),
        ({"discriminator_weight_decay": -1}, "discriminator_weight_decay is -1, expected 0 or more"),
        ({"layers": ["layer4"], "image_size": (64, 16)}, "images of .*smaller than the 32 pixels"),
        (
            {"backbone": "vit_small_patch14_dinov2", "layers": ["blocks.1"], "image_size": (64, 64)},
            "no multiple of the backbone's patches of 14 pixels",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(**arguments)


def test_center_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match=r"center_crop_size \(300, 300\) is larger than image_size \(288, 288\)"):
        SimpleNet.configure_pre_processor(center_crop_size=(300, 300))
