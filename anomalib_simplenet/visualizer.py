"""Pictures of results."""

from pathlib import Path

import numpy as np
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from PIL import Image

from .extensions.region import Region

DIMMED = 0.35  # of their brightness, pixels outside the region


class NonSquareImageVisualizer(ImageVisualizer):
    """anomalib's visualizer, but images more than twice as long as wide, or as wide as long, keep their shape.

    They are drawn up to four times as long as anomalib's squares, which the other images fill. What is outside the
    model's region is dimmed.
    """

    field_size: tuple[int, int]

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, *_args, **_kwargs) -> None:  # noqa: ANN001, ARG002
        """Save the pictures of a batch, by default in the results folder of this run."""
        square, folder = self.field_size, self.output_dir or Path(trainer.default_root_dir) / "images"
        data, region = getattr(trainer, "datamodule", None), getattr(pl_module.model, "region", None)
        names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
        for item in batch:
            if item.image_path is None:
                continue  # no name for its picture
            ratio = _aspect_ratio(item.image_path)
            if not 0.5 <= ratio <= 2:
                self.field_size = round(square[0] * max(ratio, 1)), round(square[1] / min(ratio, 1))
            if (picture := self.visualize(item)) is not None:
                picture = picture if region is None else _dim_outside(picture, region, self.field_size)
                picture.save(generate_output_filename(item.image_path, folder, **names))
            self.field_size = square


def _dim_outside(picture: Image.Image, region: Region, size: tuple[int, int]) -> Image.Image:
    """Dim what is outside in each of a picture's fields, which stand side by side."""
    field = np.asarray(Image.fromarray(region.mask[0, 0].cpu().numpy() > 0).resize(size))
    inside = Image.fromarray(np.tile(field, (1, picture.width // size[0])))
    return Image.composite(picture, picture.point(lambda value: value * DIMMED), inside)


def _aspect_ratio(path: str | None) -> float:
    if path is None or not Path(path).is_file():
        return 1.0
    with Image.open(path) as image:  # Pillow reads only the header
        return min(max(image.width / image.height, 0.25), 4.0)
