"""Feature adapter."""

from torch import nn

from anomalib_simplenet.checks import check_number


class Adapter(nn.Sequential):
    """Linear layers that move ImageNet embeddings towards the target domain (paper, section 3.2).

    Maps ``(patches, dimension)`` to the same shape. Weights start Xavier-normal; no activation between the layers.

    Args:
        dimension (int): Size of a patch embedding.
        layers (int): Number of linear layers; ``0`` gives the identity. Defaults to ``1``.

    Raises:
        ValueError: If ``layers`` is negative.
    """

    def __init__(self, dimension: int, layers: int = 1) -> None:
        check_number("adapter_layers", layers, at_least=0, integer=True)
        super().__init__(*(nn.Linear(dimension, dimension) for _ in range(layers)))
        for layer in self:
            nn.init.xavier_normal_(layer.weight)
