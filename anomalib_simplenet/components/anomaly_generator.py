"""Anomalous feature generator."""

from typing import Literal

import torch
from torch import nn

from anomalib_simplenet.checks import check_number


class AnomalyGenerator(nn.Module):
    """Make anomalies of embeddings (paper, section 3.3); the identity in eval mode.

    The paper adds Gaussian noise ``e``: ``x + noise_std * e``. Radial noise (not in the paper) moves a patch away from
    the mean of whitened patches: ``x + noise_std * u * x``, ``u`` uniform from 0 to 1. Gaussian noise around whitened
    patches teaches the distance from their mean; radial noise teaches how far normal patches reach in each direction.

    Args:
        noise_std (float): Standard deviation of the noise, in units of the adapted features. Defaults to ``0.015``,
            the paper's value, which belongs to the first ImageNet weights of torchvision's WideResNet-50-2.
        mix_noise (int): With K > 1 each patch draws k in 0..K-1 and gets noise of ``noise_std * 1.1**k``.
            Defaults to ``1``.
        noise (str): ``"gaussian"`` or ``"radial"``. Defaults to ``"gaussian"``.

    Raises:
        ValueError: If ``noise_std`` is not positive or above 1e12, ``mix_noise`` is below 1 or above 100, or ``noise``
            is another word.
    """

    def __init__(
        self, noise_std: float = 0.015, mix_noise: int = 1, noise: Literal["gaussian", "radial"] = "gaussian"
    ) -> None:
        super().__init__()
        # Larger noise overflows single precision in batch norm.
        check_number("noise_std", noise_std, above=0, at_most=1e12, hint="(the paper's is 0.015)")
        check_number("mix_noise", mix_noise, at_least=1, at_most=100, integer=True)
        if noise not in ("gaussian", "radial"):
            msg = f"noise is {noise!r}, expected 'gaussian' (the paper's) or 'radial'."
            raise ValueError(msg)
        self.noise = noise
        self.noise_std = noise_std
        self.mix_noise = mix_noise

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        """Add noise to adapted embeddings ``(patches, dimension)``; in eval mode they are returned as they are."""
        if not self.training:
            return embedding
        radial = self.noise == "radial"
        noise = embedding * torch.rand_like(embedding[:, :1]) if radial else torch.randn_like(embedding)
        scale = self.noise_std
        if self.mix_noise > 1:
            steps = torch.randint(self.mix_noise, (len(embedding), 1), device=embedding.device)
            scale = scale * 1.1 ** steps.to(noise.dtype)
        return noise.mul_(scale).add_(embedding)
