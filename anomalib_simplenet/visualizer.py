"""Pictures of results."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anomalib.visualization import ImageVisualizer
from PIL import Image

if TYPE_CHECKING:
    from anomalib.data import ImageBatch, ImageItem

LONGEST_SIDE = 1024  # four times anomalib's


class NonSquareImageVisualizer(ImageVisualizer):
    """anomalib's visualizer, but images more than twice as long as wide, or as wide as long, keep their aspect ratio.

    The other images fill squares, as anomalib draws them.
    """

    field_size: tuple[int, int]
    output_dir: str | Path | None

    def on_test_batch_end(self, trainer, pl_module, outputs, batch: ImageBatch, *args, **kwargs) -> None:  # noqa: ANN001
        """Save the pictures of a batch, by default in the results folder of this run."""
        square, folder = self.field_size, self.output_dir
        for item in batch:
            self.field_size = _field_size(item, square)
            super().on_test_batch_end(trainer, pl_module, outputs, [item], *args, **kwargs)
        self.field_size, self.output_dir = square, folder  # anomalib would write the next run's pictures there too


def _field_size(item: ImageItem, square: tuple[int, int]) -> tuple[int, int]:
    """Size of an image in the picture; Pillow opens the file only as far as its header."""
    if not item.image_path or not Path(item.image_path).is_file():
        return square
    with Image.open(item.image_path) as image:
        ratio = image.width / image.height
    if 0.5 <= ratio <= 2:
        return square
    width, height = square
    if ratio > 1:
        return min(round(height * ratio), LONGEST_SIDE), height
    return width, min(round(width / ratio), LONGEST_SIDE)
