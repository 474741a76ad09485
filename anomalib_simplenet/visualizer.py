"""Pictures of results."""

from pathlib import Path

import numpy as np
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
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
        """Save the pictures of a batch."""
        square, region = self.field_size, getattr(pl_module.model, "region", None)
        for item in batch:
            if item.image_path is None:
                continue  # no name for its picture
            ratio = _aspect_ratio(item.image_path)
            if not 0.5 <= ratio <= 2:
                self.field_size = round(square[0] * max(ratio, 1)), round(square[1] / min(ratio, 1))
            if (picture := self.visualize(item)) is not None:
                picture = picture if region is None else _dim_outside(picture, region, self.field_size)
                picture.save(picture_path(trainer, self, item.image_path, mkdir=True))
            self.field_size = square


def picture_path(trainer: Trainer, visualizer: ImageVisualizer, image_path: Path | str, *, mkdir: bool) -> Path:
    """Where a visualizer saves the picture of an image, by default in the results folder of this run."""
    data, folder = getattr(trainer, "datamodule", None), Path(trainer.default_root_dir) / "images"
    names = {"dataset_name": getattr(data, "name", None), "category": getattr(data, "category", None)}
    return generate_output_filename(image_path, visualizer.output_dir or folder, **names, mkdir=mkdir)


def _dim_outside(picture: Image.Image, region: Region, size: tuple[int, int]) -> Image.Image:
    """Dim what is outside in each of a picture's fields, which stand side by side."""
    field = np.asarray(Image.fromarray(region.mask[0, 0].cpu().numpy() > 0).resize(size))
    inside = Image.fromarray(np.tile(field, (1, picture.width // size[0])))
    return Image.composite(picture, picture.point(lambda value: value * DIMMED), inside)


def _aspect_ratio(path: str) -> float:
    if not Path(path).is_file():
        return 1.0
    with Image.open(path) as image:  # Pillow reads only the header
        return min(max(image.width / image.height, 0.25), 4.0)
