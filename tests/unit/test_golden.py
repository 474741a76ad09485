"""The model computes what the authors' released code computes (see tests/golden/README.md)."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from anomalib_simplenet.loss import TruncatedL1Loss
from anomalib_simplenet.torch_model import SimpleNetModel

CASES = sorted((Path(__file__).parents[1] / "golden").glob("*.npz"))


class StoredFeatures(nn.Module):
    """A backbone that answers with the stored feature maps."""

    def __init__(self, features: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.features = features

    def forward(self, _images: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.features


class StandIn(nn.Module):
    """Untrained backbone with the layers and channels of the stored one."""

    def __init__(self, features: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, feature in features.items():
            setattr(self, name, nn.Conv2d(3, feature.shape[1], 1))

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [layer(images) for layer in self.children()]


class StoredNoise(nn.Module):
    """An anomaly generator that adds stored noise."""

    def __init__(self, noise: torch.Tensor) -> None:
        super().__init__()
        self.noise = noise

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return embedding + self.noise if self.training else embedding


class Golden:
    def __init__(self, path: Path) -> None:
        data = np.load(path)
        self.arrays = {key: torch.from_numpy(data[key]) for key in data.files}
        features = {key.split("/")[1]: value for key, value in self.arrays.items() if key.startswith("feature/")}
        hidden = [value for key, value in self.arrays.items() if self._is_hidden(key)]
        self.images = self["meta/image"]
        self.model = SimpleNetModel(
            backbone=StandIn(features),
            layers=list(features),
            patch_size=int(self["meta/patch_size"]),
            pretrain_embed_dimension=int(self["meta/pretrain_embed_dimension"]),
            target_embed_dimension=int(self["meta/target_embed_dimension"]),
            adapter_layers=int("step0/adapter/layers.0fc.weight" in self.arrays),
            discriminator_layers=len(hidden) + 1,
            discriminator_hidden=None if len(hidden) > 1 else len(hidden[0]),
            noise_std=float(self["meta/noise_std"]),
        )
        self.model.feature_extractor = StoredFeatures(features)
        self.loss = TruncatedL1Loss(float(self["meta/margin"]))

    @staticmethod
    def _is_hidden(key: str) -> bool:
        return key.startswith("step0/discriminator/body.") and key.endswith(".0.weight")

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.arrays[key]

    def weights(self, step: str) -> dict[str, torch.Tensor]:
        """Stored weights under the names of our state dict."""
        state = {}
        for key, value in self.arrays.items():
            if key.startswith(f"{step}/adapter/"):
                state[f"adapter.0.{key.rsplit('.', 1)[1]}"] = value
            elif key.startswith(f"{step}/discriminator/"):
                name = key.removeprefix(f"{step}/").replace("/", ".")
                for block in range(9):
                    name = name.replace(f"body.block{block + 1}", f"body.{block}")
                state[name] = value
        return state

    def load(self, step: str) -> None:
        keys = self.model.load_state_dict(self.weights(step), strict=False)
        assert not keys.missing_keys
        assert not keys.unexpected_keys

    def train(self) -> list[float]:
        """Take the three stored training steps."""
        from anomalib_simplenet.lightning_model import SimpleNet

        lightning = SimpleNet(backbone="resnet18", pre_trained=False, layers=["layer2"])
        lightning.model = self.model
        optimizer = lightning.configure_optimizers()
        losses = []
        self.model.train()
        for noise in self["noise"]:
            self.model.anomaly_generator = StoredNoise(noise.squeeze(0))
            loss = self.loss(*self.model(self.images))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses


@pytest.fixture(params=CASES, ids=lambda path: path.stem)
def golden(request: pytest.FixtureRequest) -> Golden:
    case = Golden(request.param)
    case.load("step0")
    return case


def test_there_are_five_cases() -> None:
    assert len(CASES) == 5


def test_embedding_is_the_authors(golden: Golden) -> None:
    embedding = golden.model.embed(golden.images)
    assert tuple(embedding.shape[-2:]) == tuple(golden["meta/grid"].tolist())
    torch.testing.assert_close(embedding.permute(0, 2, 3, 1).flatten(0, 2), golden["embedding"], rtol=1e-5, atol=1e-6)


def test_three_training_steps_give_the_authors_losses_and_weights(golden: Golden) -> None:
    """To 1e-5, but for biases before a batch norm, which subtracts them again, and for the mean that it keeps of them.

    The gradient of such a bias is zero but for rounding, which Adam scales up to whole steps: these values differ
    between runs of the authors' own code, for example with the number of threads. They stay within Adam's steps.
    """
    losses = golden.train()
    torch.testing.assert_close(torch.tensor(losses), golden["loss"], rtol=1e-5, atol=0)
    state = golden.model.state_dict()
    expected = golden.weights("step3")
    assert set(expected) == {key for key in state if key.startswith(("adapter", "discriminator"))}
    before_batch_norm = re.compile(r"adapter\.0\.bias|discriminator\.body\.\d\.(0\.bias|1\.running_mean)")
    for key, value in expected.items():
        # Three steps of 2e-4, in opposite directions.
        atol = 2 * 3 * 2e-4 if before_batch_norm.fullmatch(key) else 1e-5
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=atol, msg=lambda text, key=key: f"{key}: {text}")


def test_scores_and_map_of_the_trained_model_are_the_authors(golden: Golden) -> None:
    golden.load("step3")
    prediction = golden.model.eval()(golden.images)
    torch.testing.assert_close(prediction.pred_score, golden["step3/image_score"], rtol=1e-5, atol=1e-6)
    # To the border, not in the interior only: the border is reflected as scipy does.
    torch.testing.assert_close(prediction.anomaly_map.squeeze(1), golden["step3/anomaly_map"], rtol=1e-5, atol=1e-6)
