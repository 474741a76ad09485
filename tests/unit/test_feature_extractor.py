"""FeatureExtractor: maps of any backbone, and what rebuilds it elsewhere."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.components import FeatureExtractor, PretrainedWeightsError
from anomalib_simplenet.torch_model import SimpleNetModel
from tests.unit.conftest import TwoStages

RESNET = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False}


def hooked(full: nn.Module, layers: list[str], images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Outputs of layers as the authors' code takes them, with forward hooks on the whole model."""
    found = {}
    for layer in layers:
        full.get_submodule(layer).register_forward_hook(
            lambda _module, _inputs, output, layer=layer: found.__setitem__(layer, output.clone())
        )
    with torch.no_grad():
        full.eval()(images)
    return found


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("resnet18", ["layer3", "layer1"]),
        ("tf_efficientnet_lite0", ["blocks.2", "blocks.4"]),
        ("mobilenetv3_small_050", ["blocks.3", "blocks.1"]),
        ("convnext_atto", ["stages.1", "stages.2"]),
        ("mobilevit_xxs", ["stages.1", "stages.2"]),
        ("swin_tiny_patch4_window7_224", ["layers.1", "layers.2"]),
        ("vit_tiny_patch16_224", ["blocks.5", "blocks.2"]),
        ("deit_tiny_patch16_224", ["blocks.2"]),
    ],
)
def test_extractor_gives_what_hooks_on_the_whole_backbone_give(backbone: str, layers: list[str]) -> None:
    torch.manual_seed(0)
    full, images = timm.create_model(backbone), torch.randn(1, 3, 224, 224)
    extractor = FeatureExtractor(backbone, layers, pre_trained=False)
    extractor.net.model.load_state_dict(full.state_dict(), strict=False)
    expected = hooked(full, layers, images)
    maps = extractor(images)
    assert list(maps) == layers
    for layer, found in maps.items():
        reference = expected[layer]
        if reference.ndim == 3:  # a ViT's tokens, the first of which stands for the whole image
            reference = reference[:, 1:].transpose(1, 2).unflatten(2, found.shape[-2:])
        elif reference.shape != found.shape:
            reference = reference.permute(0, 3, 1, 2)
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize(
    ("backbone", "layers", "grid"),
    [
        ("resnet18", ("layer1", "layer2", "layer3"), (56, 28)),
        ("resnet18", ("layer3", "layer1"), (14, 7)),
        ("mobilenetv3_small_050", ("blocks.1", "blocks.3"), (28, 14)),
        ("tf_efficientnet_lite0", ("blocks.2", "blocks.4"), (28, 14)),
        ("convnext_atto", ("stages.1", "stages.2"), (28, 14)),
        ("mobilevit_xxs", ("stages.1", "stages.2"), (56, 28)),
        ("vit_tiny_patch16_224", ("blocks.2", "blocks.5"), (14, 7)),
        ("vit_small_patch14_reg4_dinov2", ("blocks.3",), (16, 8)),
        (TwoStages(), ("early", "late"), (56, 28)),
    ],
    ids=str,
)
def test_backbones_of_every_kind(backbone: str | nn.Module, layers: tuple[str, ...], grid: tuple[int, int]) -> None:
    sizes = {"pretrain_embed_dimension": 24, "target_embed_dimension": None, "discriminator_hidden": 16}
    model = SimpleNetModel(backbone, layers, pre_trained=False, **sizes)
    assert model.patch_aggregation.dimension == sum(model.feature_extractor.channels)
    images = torch.randn(1, 3, 224, 112)  # not square
    assert model.embed(images).shape == (1, model.patch_aggregation.dimension, *grid)
    real, fake = model(images)
    assert real.shape == fake.shape == (grid[0] * grid[1],)
    assert model.eval()(images).anomaly_map.shape == (1, 1, 224, 112)


def test_extractor_falls_back_to_the_default_memory_layout() -> None:
    class Flattened(TwoStages):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            early = self.early(images)
            return self.late(early.view(early.shape[0], -1).view(early.shape))

    images = torch.randn(2, 3, 64, 64)
    extractor, usual = FeatureExtractor(Flattened(), ["late"]), FeatureExtractor(TwoStages(), ["late"])
    usual.load_state_dict(extractor.state_dict())
    torch.testing.assert_close(extractor(images)["late"], usual(images)["late"], rtol=1e-5, atol=1e-6)
    assert usual(images)["late"].is_contiguous(memory_format=torch.channels_last)


def test_layers_keep_their_names_in_any_order() -> None:
    forward = FeatureExtractor("resnet18", ["layer1", "layer2"], pre_trained=False)
    backward = FeatureExtractor("resnet18", ["layer2", "layer1"], pre_trained=False)
    backward.load_state_dict(forward.state_dict())
    images = torch.randn(1, 3, 64, 64)
    assert list(backward(images)) == ["layer2", "layer1"]
    for layer, feature in forward(images).items():
        assert torch.equal(feature, backward(images)[layer])


@pytest.mark.parametrize(
    ("backbone", "layers", "first_unused"),
    [
        ("resnet18", ["layer2"], "layer3"),
        ("tf_efficientnet_lite0", ["blocks.4"], "blocks.5"),
        ("convnext_atto", ["stages.1"], "stages.2"),
        ("vit_tiny_patch16_224", ["blocks.3"], "blocks.4"),
        (TwoStages(), ["late"], "unused"),
    ],
)
def test_backbone_ends_after_the_last_layer(backbone: str | nn.Module, layers: list[str], first_unused: str) -> None:
    names = list(FeatureExtractor(backbone, layers, pre_trained=False).state_dict())
    assert any(f"{layers[0]}." in name for name in names)
    assert not any(f"{unused}." in name for name in names for unused in (first_unused, "fc", "head", "classifier"))


def test_extractor_is_frozen_and_stays_in_eval_mode() -> None:
    extractor = FeatureExtractor(**RESNET).train()
    before = {key: value.clone() for key, value in extractor.state_dict().items()}
    maps = extractor(torch.randn(2, 3, 64, 64).requires_grad_())
    assert not any(feature.requires_grad for feature in maps.values())
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())
    assert all(torch.equal(value, before[key]) for key, value in extractor.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "resnet19"}, "'resnet19' is no model of timm.*resnet18"),
        ({"backbone": "resnet18.nope"}, "'resnet18.nope' is no model of timm.*Invalid pretrained tag"),
        ({"backbone": "local-dir:/nowhere"}, "'/nowhere' must hold timm's config.json"),
        ({"backbone": "hf-hub:timm/resnet18.a1_in1k"}, "hf-hub:.*HF_HUB_OFFLINE is set.*name the architecture"),
        ({"backbone": None}, "backbone is None, expected the name of a timm model"),
        ({"layers": ["layer2", "layer9"]}, "layer9 not found in backbone 'resnet18', which has act1, layer1, layer2"),
        ({"backbone": TwoStages(), "layers": ["middle"]}, "middle not found in backbone 'TwoStages', which has early"),
        ({"layers": []}, "layers is .*at least one layer"),
        ({"layers": "layer2"}, "layers is 'layer2', expected a list"),
        ({"layers": ["layer2", "layer2"]}, "at least one layer, each once"),
        ({"backbone_args": {"nope": 1}}, "backbone_args: timm cannot build 'resnet18' .*nope"),
        ({"backbone_args": {"act_layer": nn.SiLU}}, "backbone_args is .*numbers, strings and lists"),
        ({"backbone_args": 3}, "backbone_args is 3, expected a dictionary"),
        ({"backbone": TwoStages(), "layers": ["early"], "backbone_args": {}}, "an nn.Module without backbone_args"),
    ],
)
def test_wrong_argument_is_refused_with_what_is_allowed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureExtractor(**{**RESNET, **arguments})


@pytest.fixture
def weights_folder(tmp_path: Path) -> Any:  # noqa: ANN401
    """Writes a folder for ``local-dir:``, in a place whose path names no architecture."""

    def write(architecture: str, model_args: dict[str, Any], pretrained_cfg: dict[str, Any]) -> str:
        torch.manual_seed(0)
        model = timm.create_model(architecture, **model_args, pretrained_cfg={"num_classes": 1000, **pretrained_cfg})
        for name, value in model.named_buffers():
            if name.endswith("running_var"):
                value.uniform_(1e-3, 2e-3)  # so that bn_eps counts
        folder = tmp_path / "backbone"
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")
        config = {"architecture": architecture, "model_args": model_args, "pretrained_cfg": pretrained_cfg}
        (folder / "config.json").write_text(json.dumps(config))
        return f"local-dir:{folder}"

    return write


@pytest.mark.parametrize(
    ("architecture", "model_args", "pretrained_cfg", "layers"),
    [
        ("tf_efficientnet_lite0", {"act_layer": "silu", "bn_eps": 0.1}, {}, ["blocks.2"]),
        ("resnet18", {"output_stride": 16}, {}, ["layer4"]),
        ("vit_tiny_patch16_224", {"img_size": 320}, {}, ["blocks.2"]),
        ("vit_tiny_patch16_224", {}, {"input_size": [3, 320, 320], "fixed_input_size": True}, ["blocks.2"]),
        ("vit_tiny_patch16_384", {}, {"input_size": [3, 224, 224]}, ["blocks.2"]),
    ],
)
def test_config_rebuilds_a_folders_backbone_without_the_folder(
    weights_folder: Any,  # noqa: ANN401
    architecture: str,
    model_args: dict[str, Any],
    pretrained_cfg: dict[str, Any],
    layers: list[str],
) -> None:
    extractor = FeatureExtractor(weights_folder(architecture, model_args, pretrained_cfg), layers)
    assert extractor.missing_weights is None
    assert extractor.config["backbone"] == architecture
    assert json.loads(json.dumps(extractor.config)) == extractor.config  # plain types
    rebuilt = FeatureExtractor(layers=layers, pre_trained=False, **extractor.config)
    rebuilt.load_state_dict(extractor.state_dict())
    images = torch.randn(1, 3, 224, 160)
    for feature, expected in zip(rebuilt(images).values(), extractor(images).values(), strict=True):
        assert torch.equal(feature, expected)
    assert rebuilt.config == extractor.config


def test_backbone_args_reach_timm_and_the_config() -> None:
    arguments = {"backbone": "resnet18.a1_in1k", "backbone_args": {"output_stride": 8}}
    extractor = FeatureExtractor(layers=["layer4"], pre_trained=False, **arguments)
    assert extractor.stride == 8
    assert extractor.config == arguments


def test_extractor_knows_the_only_image_size_of_a_fixed_backbone() -> None:
    beit = FeatureExtractor("beit_base_patch16_224", ["blocks.0"], False, {"img_size": 160})
    assert beit.image_size == (160, 160)
    assert beit.stride == 16
    assert FeatureExtractor(**RESNET).image_size is None


@pytest.mark.parametrize(
    "error", [TimeoutError(), OSError("no route\nto host")], ids=["without a message", "two lines"]
)
def test_missing_weights_error_says_why_and_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
    weights_folder: Any,  # noqa: ANN401
    error: OSError,
) -> None:
    create = timm.create_model

    def fail(*args: Any, pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: ANN401
        if pretrained:
            raise error
        return create(*args, **kwargs)

    folder = weights_folder("resnet18", {}, {})
    monkeypatch.setattr(timm, "create_model", fail)
    extractor = FeatureExtractor(folder, ["layer1"])
    reason = " ".join(str(error).split()) or "TimeoutError"
    with pytest.raises(PretrainedWeightsError, match=rf"could not be loaded: {reason}") as caught:
        extractor(torch.zeros(1, 3, 64, 64))
    assert "python -m anomalib_simplenet.quickstart --prepare-only" in str(caught.value)
    assert "pip install 'anomalib-simplenet[quickstart]'" in str(caught.value)


def test_extractor_without_weights_is_usable_once_a_state_dict_brought_them() -> None:
    extractor = FeatureExtractor("resnet18.tv_in1k", ["layer1"])
    with pytest.raises(PretrainedWeightsError, match="HF_HUB_OFFLINE is set"):
        extractor(torch.zeros(1, 3, 64, 64))
    extractor.load_state_dict(FeatureExtractor("resnet18", ["layer1"], pre_trained=False).state_dict())
    assert extractor(torch.zeros(1, 3, 64, 64))["layer1"].shape == (1, 64, 16, 16)


def test_unreachable_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    start = time.monotonic()
    extractor = FeatureExtractor("resnet18.tv_in1k", ["layer1"])
    assert time.monotonic() - start < 10  # huggingface_hub alone retries for 46 s
    assert "http://127.0.0.1:9 is not reachable" in str(extractor.missing_weights)
    assert not constants.HF_HUB_OFFLINE


def test_checkpoint_rebuilds_a_folders_backbone_without_the_folder(
    weights_folder: Any,  # noqa: ANN401
    tmp_path: Path,
) -> None:
    folder = weights_folder("resnet18", {"output_stride": 16}, {})
    sizes = {"pretrain_embed_dimension": 24, "target_embed_dimension": 32, "discriminator_hidden": 16}
    model = SimpleNet(backbone=folder, layers=["layer4"], **sizes).eval()
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    checkpoint["pytorch-lightning_version"] = "2.6.0"
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "model.ckpt")
    shutil.rmtree(folder.removeprefix("local-dir:"))
    images = torch.rand(1, 3, 64, 96)
    loaded = SimpleNet.load_from_checkpoint(tmp_path / "model.ckpt").eval()  # with weights_only=True
    assert torch.equal(loaded(images).pred_score, model(images).pred_score)
    other = SimpleNet(
        backbone="resnet18", layers=["layer4"], pre_trained=False, **sizes
    )  # `anomalib test --model SimpleNet ...`
    read = torch.load(tmp_path / "model.ckpt", weights_only=True)
    other.on_load_checkpoint(read)
    other.load_state_dict(read["state_dict"])
    assert torch.equal(other.eval()(images).pred_score, model(images).pred_score)
