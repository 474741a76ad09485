"""Adapter, generator, discriminator, loss, whitening, anomaly map."""

from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_simplenet.components import (
    Adapter,
    AnomalyGenerator,
    AnomalyMapGenerator,
    Discriminator,
)
from anomalib_simplenet.extensions.brightness import MEAN, STD, equalize_brightness
from anomalib_simplenet.extensions.fused_head import FusedHead
from anomalib_simplenet.extensions.whitening import Whitening
from anomalib_simplenet.loss import TruncatedL1Loss


def test_anomaly_generator_adds_noise_of_the_given_deviation() -> None:
    torch.manual_seed(0)
    embedding = torch.full((2000, 50), 3.0)
    noise = AnomalyGenerator(noise_std=0.2)(embedding) - embedding
    assert noise.std().item() == pytest.approx(0.2, rel=0.02)
    assert noise.mean().item() == pytest.approx(0, abs=0.01)


def test_anomaly_generator_draws_one_scale_a_patch() -> None:
    torch.manual_seed(0)
    deviation = AnomalyGenerator(noise_std=1.0, mix_noise=3)(torch.zeros(600, 20000)).std(dim=1)
    scales = torch.tensor([1.0, 1.1, 1.21])
    distance, nearest = (deviation[:, None] - scales).abs().min(dim=1)
    assert distance.max() < 0.03
    assert torch.bincount(nearest).min() > 150


def test_generator_draws_anew_each_time_and_repeats_with_the_seed() -> None:
    generator, embedding = AnomalyGenerator(), torch.zeros(4, 4)
    torch.manual_seed(1)
    first, second = generator(embedding), generator(embedding)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(first, generator(embedding))


def test_generator_does_nothing_in_eval_mode() -> None:
    embedding = torch.randn(4, 4)
    assert AnomalyGenerator().eval()(embedding) is embedding


def test_discriminator_shrinks_by_half_as_much_again_where_hidden_is_none() -> None:
    widths = [m.out_features for m in Discriminator(18, layers=3, hidden=None).modules() if isinstance(m, nn.Linear)]
    assert widths == [12, 8, 1]


def test_discriminator_of_one_layer_takes_the_embedding_itself() -> None:
    discriminator = Discriminator(18, layers=1)
    assert discriminator.tail.in_features == 18
    assert discriminator(torch.zeros(5, 18)).shape == (5,)


def test_weights_start_xavier_normal() -> None:
    torch.manual_seed(0)
    for linear in (Adapter(300)[0], Discriminator(300, hidden=300).body[0][0]):
        assert linear.weight.std().item() == pytest.approx((2 / 600) ** 0.5, rel=0.02)


def test_loss_truncates_at_the_margin_on_both_sides() -> None:
    loss = TruncatedL1Loss(margin=0.5)
    assert loss(torch.tensor([0.5, 9.0]), torch.tensor([-0.5, -9.0])) == 0
    assert loss(torch.tensor([0.0]), torch.tensor([0.0])) == 1
    assert loss(torch.tensor([-1.0]), torch.tensor([-1.0])) == 1.5
    assert loss(torch.tensor([1.0]), torch.tensor([1.0])) == 1.5


def test_whitening_gives_mean_zero_and_covariance_one_from_several_batches() -> None:
    torch.manual_seed(0)
    patches = torch.randn(5000, 6) @ torch.randn(6, 6) + torch.randn(6)
    whitening = Whitening(6)
    assert not whitening.fitted
    first, last = patches.T.reshape(1, 6, 100, 50).split([40, 60], dim=2)
    whitening.fit(whitening.moments(first.split(3, dim=3)) + whitening.moments([last]))
    assert whitening.fitted
    white = whitening(patches.T.reshape(1, 6, 100, 50))[0].flatten(1).T
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(6), atol=1e-3, rtol=0)
    covariance = torch.cov(white.T)
    # The directions of least variance are held back by the regularisation.
    assert torch.linalg.eigvalsh(covariance)[2:] == pytest.approx(torch.ones(4), abs=0.1)
    assert torch.linalg.eigvalsh(covariance).max() < 1.001
    assert not any(parameter.requires_grad for parameter in whitening.parameters())


def test_local_whitening_is_that_of_each_position() -> None:
    torch.manual_seed(0)
    scale = torch.linspace(3, 5, 6)[:, None, None] * torch.linspace(1, 4, 9 * 6).view(9, 6)
    maps = torch.randn(4000, 6, 9, 6) * scale + torch.randn(6, 9, 6)
    whitening = Whitening(6, local=True)
    assert torch.equal(whitening(maps), maps)
    moments = whitening.moments(maps[:3000].split(1000)) + whitening.moments([maps[3000:]])
    assert torch.equal(whitening(maps), maps)  # moments change nothing
    whitening.fit(moments)
    assert whitening.fitted
    white = whitening(maps)
    torch.testing.assert_close(white.mean(dim=0), torch.zeros(6, 9, 6), atol=1e-3, rtol=0)
    for position in white.flatten(2).permute(2, 1, 0):
        torch.testing.assert_close(torch.cov(position), torch.eye(6), atol=0.02, rtol=0)
    loaded = Whitening(6, local=True)
    loaded.load_state_dict(whitening.state_dict())
    assert torch.equal(loaded(maps), white)
    with pytest.raises(ValueError, match="gives 9 x 5 patches, expected 9 x 6"):
        whitening(maps[..., :5])


@pytest.mark.parametrize("local", [False, True])
def test_whitening_keeps_the_principal_components_of_all_patches(local: bool) -> None:
    torch.manual_seed(0)
    scale = torch.tensor([5.0, 4.0, 3.0, 0.1, 0.1])[:, None, None]
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    embeddings = torch.einsum("ed,ndhw->nehw", turn, scale * torch.randn(400, 5, 2, 3) + torch.arange(6).view(2, 3))
    whitening = Whitening(5, local, components=3)
    whitening.fit(whitening.moments(embeddings.split(100)))
    white = whitening(embeddings)
    assert white.shape == (400, 3, 2, 3)
    rows = white.permute(2, 3, 0, 1) if local else white.permute(0, 2, 3, 1).reshape(1, 1, -1, 3)
    torch.testing.assert_close(rows.mean(dim=2), torch.zeros(*rows.shape[:2], 3), atol=1e-4, rtol=0)
    covariance = rows.mT @ rows / (rows.shape[2] - 1)
    torch.testing.assert_close(covariance, torch.eye(3).expand_as(covariance), atol=0.1, rtol=0)
    # By another library's way: the space of the axes, whatever their order and sign.
    patches = embeddings.permute(0, 2, 3, 1).reshape(-1, 5).numpy()
    axes = torch.from_numpy(PCA(3).fit(patches).components_).float()
    torch.testing.assert_close(whitening.projection.mT @ whitening.projection, axes.mT @ axes, atol=1e-3, rtol=0)


def test_brightness_of_images_becomes_that_of_imagenet() -> None:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    pixels = torch.rand(1, 3, 16, 16)
    images = (torch.cat([pixels, pixels * 0.3, torch.zeros_like(pixels)]) - mean) / std
    bright, dim, black = equalize_brightness(images)
    torch.testing.assert_close(bright, dim)
    torch.testing.assert_close((bright * std + mean).mean(), mean.mean())
    assert black.isfinite().all()


def test_radial_noise_scales_each_patch_by_up_to_noise_std() -> None:
    torch.manual_seed(0)
    patches = torch.randn(1000, 7)
    factor = AnomalyGenerator(0.5, noise="radial")(patches) / patches
    torch.testing.assert_close(factor, factor[:, :1].expand_as(factor))
    assert 1 <= factor.min() < 1.01
    assert 1.49 < factor.max() <= 1.5


def test_discriminator_tells_more_than_the_distance_where_normal_patches_are_not_gaussian() -> None:
    torch.manual_seed(0)
    heavy_tails = torch.distributions.StudentT(3.0).sample((4000, 4)) / 3**0.5
    limited = (2 * torch.rand(4000, 4) - 1) * 3**0.5  # up to 1.73
    patches = torch.cat([heavy_tails, limited], dim=1)  # whitened: mean 0, covariance 1
    discriminator, generator, loss = (
        Discriminator(8, hidden=64),
        AnomalyGenerator(1.0, noise="radial"),
        TruncatedL1Loss(),
    )
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    for _ in range(200):
        real = patches[torch.randint(2000, (256,))]
        scores = discriminator(torch.cat([real, generator(real)])).chunk(2)
        optimizer.zero_grad()
        loss(*scores).backward()
        optimizer.step()
    unseen = patches[2000:]
    defective = torch.cat([unseen[:, :-1], unseen[:, -1:].sign() * 2.5], dim=1)
    labels, both = [0] * len(unseen) + [1] * len(defective), torch.cat([unseen, defective])
    scores = -discriminator.eval()(both).detach()
    assert roc_auc_score(labels, scores) > roc_auc_score(labels, both.norm(dim=1)) + 0.05


def test_local_whitening_shrinks_covariances_of_few_images() -> None:
    torch.manual_seed(0)
    maps, others = torch.randn(3, 50, 8, 8), torch.randn(20, 50, 8, 8)
    whitening = Whitening(50, local=True)
    whitening.fit(whitening.moments([maps]))
    assert 0.5 < whitening(others).std() < 2  # alone, a position's 3 patches vary in 2 directions
    with pytest.raises(ValueError, match="1 training image, expected 2 or more"):
        whitening.fit(whitening.moments([maps[:1]]))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 60), st.integers(1, 60))
def test_anomaly_map_generator_smooths_as_scipy_does_to_the_border(h: int, w: int, height: int, width: int) -> None:
    scores = torch.randn(2, 1, h, w)
    resized = nn.functional.interpolate(scores, size=(height, width), mode="bilinear", align_corners=False)
    expected = torch.stack([torch.from_numpy(gaussian_filter(image[0].double().numpy(), 4)) for image in resized])
    anomaly_map = AnomalyMapGenerator()(scores, (height, width))
    torch.testing.assert_close(anomaly_map.squeeze(1), expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adapter(8, -1), "adapter_layers is -1, expected an integer of at least 0"),
        (lambda: AnomalyGenerator(0.0), "noise_std is 0.0, expected a finite number above 0 and of at most 1e\\+12"),
        (lambda: AnomalyGenerator(float("nan")), "noise_std is nan"),
        (lambda: AnomalyGenerator(mix_noise=0), "mix_noise is 0, expected an integer of at least 1 and of at most 100"),
        (lambda: AnomalyGenerator(mix_noise=1000), "mix_noise is 1000, expected"),
        (lambda: Discriminator(8, 0), "discriminator_layers is 0, expected an integer of at least 1"),
        (
            lambda: Discriminator(8, 2, 0),
            "discriminator_hidden is 0, expected an integer of at least 1 or None to shrink",
        ),
        (lambda: Discriminator(2, 4, None), "discriminator_layers is 4, too many"),
        (lambda: TruncatedL1Loss(0), "margin is 0, expected a finite number above 0"),
    ],
)
def test_components_refuse_wrong_arguments_by_name(make: callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_local_whitening_refuses_matrices_of_more_than_two_gib() -> None:
    with pytest.raises(ValueError, match=r"36 x 36 matrices of 1536 x 1536 take 11\.4 GiB, expected at most 2 GiB"):
        Whitening(1536, local=True).moments([torch.zeros(2, 1536, 36, 36)])


@pytest.mark.parametrize("local", [False, True])
def test_whitening_refuses_features_too_large_for_a_covariance(local: bool) -> None:
    whitening = Whitening(4, local=local)
    with pytest.raises(ValueError, match="too large to whiten"):
        whitening.fit(whitening.moments([1e20 * torch.randn(8, 4, 3, 3)]))
    assert not whitening.fitted
    maps = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(whitening(maps), maps)


def test_discriminator_folds_synchronised_batch_norm() -> None:
    torch.manual_seed(0)
    plain = Discriminator(6, 3, 5)
    plain(torch.randn(50, 6))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(plain)).eval()
    heads = [FusedHead([], each, [slice(None)]) for each in (plain.eval(), synchronised)]
    maps = torch.randn(2, 6, 3, 4)
    torch.testing.assert_close(heads[0](iter([maps])), heads[1](iter([maps])))
