"""Pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anomalib.visualization import ImageVisualizer
from PIL import Image

if TYPE_CHECKING:
    from anomalib.data import ImageBatch, ImageItem

SIDE = 256  # anomalib's
LONGEST = 4 * SIDE


class OblongImageVisualizer(ImageVisualizer):
    """anomalib's pictures, but of images more than twice as long as wide in their own shape instead of squares."""

    field_size: tuple[int, int]
    output_dir: str | Path | None

    def on_test_batch_end(self, trainer, pl_module, outputs, batch: ImageBatch, *args, **kwargs) -> None:  # noqa: ANN001
        """Save the pictures of a batch, by default in the results folder of this run."""
        square, folder = self.field_size, self.output_dir
        for item in batch:
            self.field_size = _size(item, square)
            super().on_test_batch_end(trainer, pl_module, outputs, [item], *args, **kwargs)
        self.field_size, self.output_dir = square, folder


def _size(item: ImageItem, square: tuple[int, int]) -> tuple[int, int]:
    if not item.image_path or not Path(item.image_path).is_file():
        return square
    with Image.open(item.image_path) as image:
        ratio = image.width / image.height
    if 0.5 <= ratio <= 2:
        return square
    width, height = square
    return (min(round(height * ratio), LONGEST), height) if ratio > 1 else (width, min(round(width / ratio), LONGEST))
