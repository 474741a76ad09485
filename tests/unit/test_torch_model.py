"""SimpleNetModel."""

import itertools
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_simplenet.extensions.patch_sampling import sample_patches
from anomalib_simplenet.loss import TruncatedL1Loss
from anomalib_simplenet.torch_model import SimpleNetModel
from tests.unit.conftest import TwoStages

SMALL = {"pretrain_embed_dimension": 24, "target_embed_dimension": 32, "discriminator_hidden": 16}


def make(backbone: str | nn.Module = "resnet18", **arguments: object) -> SimpleNetModel:
    torch.manual_seed(0)
    return SimpleNetModel(backbone, pre_trained=False, **{**SMALL, **arguments})


def train_a_little(model: SimpleNetModel, images: torch.Tensor) -> None:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(3):
        real, fake = model(images)
        optimizer.zero_grad()
        (fake - real).mean().backward()
        optimizer.step()
        if model.averaged is not None:
            model.averaged.update(model.trained)


def rows(embedding: torch.Tensor) -> torch.Tensor:
    return embedding.permute(0, 2, 3, 1).flatten(0, 2)


def whitened(model: SimpleNetModel, images: torch.Tensor) -> torch.Tensor:
    embedding = model.embed(images)
    return rows(embedding if model.whitening is None else model.whitening(embedding))


def plain_scores(model: SimpleNetModel, images: torch.Tensor) -> torch.Tensor:
    """Scores of patches without fusing anything, ``(N, h * w)``."""
    white = whitened(model, images)
    averaged = model.averaged is not None and model.averaged.steps > 0
    adapter, discriminator = model.averaged.module if averaged else (model.adapter, model.discriminator)
    return -discriminator(adapter(white)).reshape(len(images), -1)


CONFIGURATIONS = {
    "adapter_layers": st.integers(0, 2),
    "discriminator_layers": st.integers(1, 3),
    "discriminator_hidden": st.sampled_from([None, 8]),
    "pretrain_embed_dimension": st.sampled_from([None, 24]),
    "target_embed_dimension": st.sampled_from([None, 5, 23, 48, 70]),
    "layers": st.sampled_from([("early",), ("early", "late"), ("late", "early")]),
    "whiten": st.sampled_from([False, True, "local"]),
    "components": st.sampled_from([None, 4]),
    "noise": st.sampled_from(["gaussian", "radial"]),
    "normalize_brightness": st.booleans(),
    "top_patches": st.sampled_from([1, 3, 1000]),
    "averaging": st.booleans(),
}


def make_whitened(**arguments: object) -> SimpleNetModel:
    if arguments["discriminator_hidden"] is None and arguments["target_embed_dimension"] == 5:
        arguments["target_embed_dimension"] = 12
    if not arguments["whiten"]:
        arguments |= {"noise": "gaussian", "components": None}
    model = make(TwoStages(), **arguments)
    if model.whitening:
        model.whitening.fit(model.whitening.moments([model.embed(torch.randn(4, 3, 32, 48))]))
    return model


@settings(max_examples=20, deadline=None)
@given(**CONFIGURATIONS)
def test_fused_eval_equals_the_plain_path(**arguments: object) -> None:
    model, images = make_whitened(**arguments), torch.randn(2, 3, 32, 48)
    train_a_little(model, images)
    model.eval()
    with torch.no_grad():
        highest = plain_scores(model, images).sort(dim=1, descending=True).values[:, : arguments["top_patches"]]
        expected = highest.mean(dim=1)
        torch.testing.assert_close(model(images).pred_score, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(deepcopy(model)(images).pred_score, expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=30, deadline=None)
@given(**CONFIGURATIONS)
def test_training_step_equals_the_plain_path(**arguments: object) -> None:
    # in double precision: in single, rounding near the bend of LeakyReLU may flip a gradient
    model, images = make_whitened(**arguments).double(), torch.randn(2, 3, 32, 48, dtype=torch.float64)
    plain = deepcopy(model)
    torch.manual_seed(1)
    real, fake = model.discriminate(model.extract(images))
    torch.manual_seed(1)
    expected = torch.cat(plain(images))
    torch.testing.assert_close(torch.cat([real, fake]), expected, rtol=1e-9, atol=1e-9)
    (fake.square().mean() - real.mean()).backward()
    expected_real, expected_fake = expected.chunk(2)
    (expected_fake.square().mean() - expected_real.mean()).backward()
    for (name, value), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if value.requires_grad:
            assert (value.grad - other.grad).abs().max() <= 1e-9 * (1 + other.grad.abs().max()), name
    for name, value in model.discriminator.named_buffers():  # batch norm
        torch.testing.assert_close(value, plain.discriminator.get_buffer(name), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("patch_fraction", [1.0, 0.5])
def test_training_step_never_waits_for_the_device(patch_fraction: float) -> None:
    model, images = (
        make(TwoStages(), layers=("early", "late"), patch_fraction=patch_fraction),
        torch.randn(2, 3, 32, 48),
    )
    features = model.extract(images)
    with torch.profiler.profile() as profile:
        TruncatedL1Loss()(*model.discriminate(features)).backward()
    called = {event.key for event in profile.key_averages()}
    assert "aten::addmm" in called
    assert not called & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


@pytest.mark.parametrize("whiten", [True, "local"])
def test_map_layer_adds_its_distance_to_the_map(whiten: bool | str) -> None:
    model = make(TwoStages(), layers=("late", "early"), whiten=whiten, map_layer="early").eval()
    training, images = torch.randn(30, 3, 32, 48), torch.randn(2, 3, 32, 48)
    features = model.extract(training)
    model.whitening.fit(model.whitening.moments([model.patch_aggregation(features)]))
    fine = model.fine_map.whitening
    fine.fit(fine.moments([model.fine_map.cells(features)]))
    late, early = model.extract(images)
    assert late.shape[2:] == (4, 6)
    assert early.shape[2:] == (8, 12)

    whitened = torch.empty_like(early)
    for row, column in itertools.product(range(8), range(12)):
        y, x = (row // 2, column // 2) if whiten == "local" else (0, 0)
        cell = features[1][:, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] if whiten == "local" else features[1]
        torch.testing.assert_close(fine.mean[:, y, x], cell.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)
        whitened[:, :, row, column] = (early[:, :, row, column] - fine.mean[:, y, x]) @ fine.weight[y * 6 + x]
    distance = 2 * whitened.square().mean(dim=1, keepdim=True).sqrt()
    scores = plain_scores(model, images).unflatten(1, (1, 4, 6))
    expected = sum(F.interpolate(grid, (32, 48), mode="bilinear") for grid in (scores, distance))
    answer = model(images)
    torch.testing.assert_close(answer.anomaly_map, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(answer.pred_score, scores.amax(dim=(1, 2, 3)), rtol=1e-4, atol=1e-5)


def test_image_whose_distances_overflow_is_anomalous_everywhere() -> None:
    model = make(TwoStages(), layers=("late", "early"), whiten=True, map_layer="early").eval()
    model.score_patches = lambda features: features[0].new_zeros(len(features[0]), 1, 4, 6)
    images = torch.randn(2, 3, 32, 48)
    images[1, 0, 5, 5] = 1e25
    answer = model(images)
    assert answer.pred_score.isinf().tolist() == [False, True]
    assert answer.anomaly_map.isinf().flatten(1).all(dim=1).tolist() == [False, True]
    assert answer.anomaly_map[0].isfinite().all()


def test_map_layer_is_one_of_the_layers_and_needs_whitening() -> None:
    with pytest.raises(ValueError, match=r"map_layer is 'first', expected one of layers .early, late. or null"):
        make(TwoStages(), layers=("early", "late"), whiten=True, map_layer="first")
    with pytest.raises(ValueError, match="map_layer is 'early', but whiten is False: set it to true or 'local'"):
        make(TwoStages(), layers=("early", "late"), map_layer="early")


def test_map_layer_refuses_a_coarser_layer_or_cells_that_do_not_fit() -> None:
    model = make(TwoStages(), layers=("early", "late"), whiten="local", map_layer="late").eval()
    with pytest.raises(ValueError, match="map_layer has 4 x 6 patches, expected a multiple of the 8 x 12 of the first"):
        model(torch.randn(2, 3, 32, 48))
    model = make(TwoStages(), layers=("late", "early"), whiten="local", map_layer="early").eval()
    with pytest.raises(ValueError, match=r"9 x 12 patches, expected a multiple of the 5 x 6 .* resize images to"):
        model(torch.randn(2, 3, 36, 48))


def test_patch_fraction_trains_on_so_many_different_patches() -> None:
    model, images = make(TwoStages(), layers=("early", "late"), patch_fraction=0.3), torch.randn(3, 3, 32, 48)
    everything = rows(model.embed(images))
    some = sample_patches(model.embed(images), 0.3)
    found = (some[:, None] == everything).all(dim=2).nonzero()[:, 1]
    assert len(some) == len(set(found.tolist())) == round(0.3 * 3 * 8 * 12)
    real, fake = model(images)
    assert real.shape == fake.shape == (len(some),)


def test_averages_are_those_of_the_last_steps() -> None:
    model = make(TwoStages(), layers=("early",), averaging=True)
    tail, seen = model.discriminator.tail.weight, []
    expected = None
    for step in range(1, 200):
        with torch.no_grad():
            tail.normal_()
        seen.append(tail.detach().clone())
        model.averaged.update(model.trained)
        share = 4 / (step + 3)
        expected = seen[-1] if expected is None else (1 - share) * expected + share * seen[-1]
    _, averaged = model.averaged.module
    torch.testing.assert_close(averaged.tail.weight, expected)
    assert torch.equal(tail, seen[-1])


def test_eval_mode_predicts_with_the_averaged_weights_once_there_are_any() -> None:
    model, images = make(TwoStages(), layers=("early",), averaging=True), torch.randn(2, 3, 32, 48)
    model.eval()
    before = model(images).pred_score
    torch.nn.init.normal_(model.discriminator.tail.weight)
    after = model(images).pred_score
    assert not torch.allclose(after, before)
    model.averaged.update(model.trained)
    torch.nn.init.zeros_(model.discriminator.tail.weight)
    torch.testing.assert_close(model(images).pred_score, after)


def test_fused_head_follows_loading_and_training_and_is_no_part_of_the_state() -> None:
    images = torch.randn(2, 3, 64, 64)
    model, trained = make().eval(), make()
    keys = set(trained.state_dict())
    before = model(images).pred_score
    train_a_little(trained, images)
    expected = trained.eval()(images).pred_score
    assert set(trained.state_dict()) == keys
    model.load_state_dict(trained.state_dict())
    assert torch.equal(model(images).pred_score, expected)
    assert not torch.allclose(before, expected)
    assert model.train()._fused_head is None
    train_a_little(model, images)
    assert not torch.allclose(model.eval()(images).pred_score, expected)


@pytest.mark.parametrize("way", ["data", "submodule", "reset", "order"])
def test_fused_head_notices_weights_that_change_in_eval_mode(way: str) -> None:
    model, images = make(TwoStages(), layers=("early",), averaging=way == "reset"), torch.randn(2, 3, 32, 48)
    train_a_little(model, images)
    before = model.eval()(images).pred_score
    if way == "data":  # as Lightning's WeightAveraging swaps weights
        for parameter in model.discriminator.parameters():
            parameter.data.copy_(parameter.data + 0.1)
    elif way == "order":
        first = model.discriminator.body[0][0].weight
        first.data.copy_(first.data.flip(1))
    elif way == "submodule":
        model.discriminator.load_state_dict({k: v + 0.1 for k, v in model.discriminator.state_dict().items()})
    else:
        model.averaged.steps.zero_()
    after = model(images).pred_score
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, plain_scores(model, images).amax(dim=1), rtol=1e-5, atol=1e-5)


def test_fused_head_is_folded_in_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    model, images = make(TwoStages(), layers=("early",), whiten=True), torch.randn(2, 3, 32, 48)
    model.whitening.fit(model.whitening.moments([model.embed(torch.randn(4, 3, 32, 48)) + 30]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.eval()
    folded = {name: value.clone() for name, value in model._fused_head.named_buffers()}
    model._fused_from = ()
    model(images)
    for name, value in model._fused_head.named_buffers():
        assert torch.equal(folded[name], value), name


def test_image_score_is_the_unsmoothed_maximum() -> None:
    model, images = make().eval(), torch.randn(2, 3, 64, 96)
    prediction = model(images)
    assert prediction.pred_score.shape == (2,)
    assert prediction.anomaly_map.shape == (2, 1, 64, 96)
    torch.testing.assert_close(prediction.pred_score, plain_scores(model, images).amax(dim=1), rtol=1e-5, atol=1e-6)
    assert (prediction.anomaly_map.amax(dim=(1, 2, 3)) < prediction.pred_score).all()


def test_scores_of_an_image_do_not_depend_on_its_batch() -> None:
    model, images = make().eval(), torch.randn(3, 3, 64, 64)
    alone = torch.cat([model(image[None]).pred_score for image in images])
    torch.testing.assert_close(model(images).pred_score, alone, rtol=1e-5, atol=1e-6)


def test_torchscript_traces_predictions() -> None:
    class Scores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make().eval()

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            prediction = self.model(images)
            return prediction.pred_score, prediction.anomaly_map

    scores, images = Scores(), torch.randn(3, 3, 64, 64)
    traced = torch.jit.trace(scores, images[:1])
    for value, expected in zip(traced(images), scores(images), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_half_precision_and_autocast_predict_in_float32() -> None:
    model, images = make().eval(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(images)
    half = deepcopy(model).bfloat16()(images.bfloat16())
    for prediction in (mixed, half):
        for value, reference in (
            (prediction.pred_score, expected.pred_score),
            (prediction.anomaly_map, expected.anomaly_map),
        ):
            assert value.dtype is torch.float32
            assert (value - reference).abs().max() < 0.05 * reference.abs().max()
