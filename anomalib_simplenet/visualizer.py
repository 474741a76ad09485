"""Pictures of results."""

from __future__ import annotations

from pathlib import Path

from anomalib.visualization import ImageVisualizer
from PIL import Image


class NonSquareImageVisualizer(ImageVisualizer):
    """anomalib's visualizer, but images more than twice as long as wide, or as wide as long, keep their shape.

    They are drawn up to four times as long as anomalib's squares, which the other images fill.
    """

    field_size: tuple[int, int]
    output_dir: str | Path | None

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, *args, **kwargs) -> None:  # noqa: ANN001
        """Save the pictures of a batch, by default in the results folder of this run."""
        square, folder = self.field_size, self.output_dir
        for item in batch:
            ratio = _aspect_ratio(item.image_path)
            if not 0.5 <= ratio <= 2:
                self.field_size = round(square[0] * max(ratio, 1)), round(square[1] / min(ratio, 1))
            super().on_test_batch_end(trainer, pl_module, outputs, [item], *args, **kwargs)
            self.field_size = square
        self.output_dir = folder  # anomalib would write the next run's pictures there too


def _aspect_ratio(path: str | None) -> float:
    if path is None or not Path(path).is_file():
        return 1.0
    with Image.open(path) as image:  # Pillow reads only the header
        return min(max(image.width / image.height, 0.25), 4.0)
