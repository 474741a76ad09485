"""Patch aggregation as a convolution equals the authors' unfold and pool."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812

from anomalib_simplenet.components import PatchAggregation


def unfold_and_pool(
    features: list[torch.Tensor], patch_size: int, pretrain_dimension: int, target_dimension: int
) -> torch.Tensor:
    """The plain path: what the authors do, in their order."""
    grid = features[0].shape[-2:]
    pooled = []
    for feature in features:
        n, _, h, w = feature.shape
        patches = F.unfold(feature, patch_size, padding=patch_size // 2)  # N, C * k * k, h * w
        vectors = F.adaptive_avg_pool1d(patches.transpose(1, 2), pretrain_dimension)
        maps = vectors.transpose(1, 2).reshape(n, pretrain_dimension, h, w)
        pooled.append(F.interpolate(maps, size=grid, mode="bilinear", align_corners=False))
    concatenated = torch.cat(pooled, dim=1).flatten(2).transpose(1, 2)  # N, h * w, L * P
    return F.adaptive_avg_pool1d(concatenated, target_dimension).transpose(1, 2).unflatten(2, grid)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equals_unfold_and_pool(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 4))
    shapes = [tuple(data.draw(st.integers(1, high)) for high in (12, 7, 7)) for _ in range(layers)]
    patch_size = data.draw(st.sampled_from([1, 3, 5]))
    pretrain, target = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 60))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    features = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    module = PatchAggregation([channels for channels, *_ in shapes], patch_size, pretrain, target)
    torch.testing.assert_close(
        module(features), unfold_and_pool(features, patch_size, pretrain, target), rtol=1e-5, atol=1e-6
    )


def test_paper_sizes_give_256_groups_a_layer() -> None:
    module = PatchAggregation([512, 1024], 3, 1536, 1536)
    assert module.groups == [256, 256]
    features = [torch.randn(1, 512, 6, 6), torch.randn(1, 1024, 3, 3)]
    torch.testing.assert_close(module(features), unfold_and_pool(features, 3, 1536, 1536), rtol=1e-5, atol=1e-6)


def test_single_positions_without_pooling_are_the_features_themselves() -> None:
    features = [torch.randn(2, 5, 4, 4), torch.randn(2, 3, 4, 4)]
    module = PatchAggregation([5, 3], 1, None, 8)
    assert [part is feature for part, feature in zip(module.pool(features), features, strict=True)] == [True, True]
    # A window over two layers: one channel of the first, but half of it.
    module, features = PatchAggregation([1, 5], 1, None, 3), [torch.randn(2, 1, 4, 4), torch.randn(2, 5, 4, 4)]
    torch.testing.assert_close(module(features)[:, :1], (features[0] + features[1][:, :1]) / 2)


def test_weights_are_no_part_of_the_state() -> None:
    assert not PatchAggregation([8, 16], 3, 24, 24).state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 2}, "patch_size is 2, expected an odd integer"),
        ({"patch_size": 0}, "patch_size is 0, expected an integer of at least 1 and odd"),
        ({"pretrain_embed_dimension": 0}, "pretrain_embed_dimension is 0, expected an integer of at least 1"),
        ({"target_embed_dimension": -1}, "target_embed_dimension is -1, expected an integer of at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PatchAggregation([8], **arguments)
