"""``to_torch``, ``to_onnx`` and ``to_openvino`` of SimpleNet."""

from __future__ import annotations

import logging
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule, InferenceBatch
from anomalib.deploy import CompressionType
from anomalib.models.components.base.export_mixin import ExportMixin
from anomalib.pre_processing import PreProcessor
from torchmetrics import Metric

from anomalib_simplenet.calibration import CalibratedBatch, CalibratedPostProcessor
from anomalib_simplenet.checkpoints import UNSET, Requests

from .openvino import keep_float32, prepend_resize, round_weights
from .quantization import float_operations, quantize
from .transforms import check_exportable, exportable_transform, split_resize

logger = logging.getLogger(__name__)

ONE_FILE = 1.9 * 2**30  # protobuf, and so an ONNX file without external data, ends at 2 GiB
DEFAULT_ROOT = Path("results")  # Engine's default_root_dir, which Engine.export passes where the user gives no root


class ExactExport(ExportMixin):
    """anomalib's exports, computing what the checkpoint computes; to be inherited before ``AnomalibModule``."""

    pre_processor: Any
    post_processor: Any
    requests: Requests
    checkpoint_path: Path | None = None

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Path | str, *args: Any, **kwargs: Any) -> ExactExport:  # noqa: ANN401
        """Load a model and remember where from: exports are written beside its checkpoint by default."""
        model = super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        model.checkpoint_path = Path(checkpoint_path)
        return model

    def as_requested(self, checkpoint_path: Path | str) -> ExactExport:
        """Load a checkpoint with the settings of inference that this model was asked for, which stays as it is."""
        requested, processor = self.requests.of(self), deepcopy(self.post_processor) or False
        for name in vars(processor).keys() & UNSET.keys() if processor else ():
            setattr(processor, name, requested.get(name, UNSET[name]))
        arguments = {name: requested[name] for name in requested.keys() & {"top_patches"}}
        arguments |= {"region": self.hparams["region"], "post_processor": processor}
        return type(self).load_from_checkpoint(checkpoint_path, **arguments)

    def forward(self, batch: torch.Tensor, *_args, **_kwargs) -> InferenceBatch | CalibratedBatch:
        """Pre-process, score and post-process images ``(N, 3, H, W)`` between 0 and 1, eagerly or in an exported graph.

        Uses the present transform of the pre-processor; anomalib's ``export_transform`` lacks the antialiasing.
        """
        transform = self._transform(exportable=torch.compiler.is_exporting())
        predictions = self.model(transform(batch) if transform else batch)
        return self.post_processor(predictions) if self.post_processor else predictions

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export as anomalib does. Without a folder from the user, exports are written beside the checkpoint.

        Raises:
            ValueError: If the post-processor cannot keep its rate of false alarms.
        """
        if isinstance(self.post_processor, CalibratedPostProcessor):
            self.post_processor.check_rate()
        return super().to_torch(self._export_root(export_root, "torch", f"{model_file_name}.pt"), model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Path:
        """Export to ONNX as anomalib does, as one file if it is below 2 GiB.

        Opset 18 is the default, below which torch's exporter fails to convert its graph.

        Raises:
            ValueError: If the pre-processor cannot be exported for images of any size, and ``input_size`` is ``None``,
                or the model has a tiler.
        """
        if self.model.tiler is not None:
            msg = (
                "The model has tiles, but exported models take whole images: to export it so, set model.model.tiler to "
                "None in Python. Scores near borders of tiles may then differ from the checkpoint's."
            )
            raise ValueError(msg)
        check_exportable(self._transform(), input_size)
        if input_size is None and "dynamic_axes" not in kwargs:
            # anomalib would trace an image of 2 x 2 pixels, too small to tell its size from that of its feature maps.
            least = 2 * self.model.feature_extractor.stride
            sides = {2: torch.export.Dim("height", min=least), 3: torch.export.Dim("width", min=least)}
            kwargs.setdefault("dynamic_shapes", ({0: torch.export.Dim("batch_size"), **sides},))
        size = sum(tensor.nbytes for tensor in self.state_dict().values())
        defaults = {"opset_version": 18, "external_data": size > ONE_FILE, "verbose": False}
        root = self._export_root(export_root, "onnx", f"{model_file_name}.onnx")
        for name in ("onnxscript", "onnx_ir"):  # progress messages, which anomalib's command line would show
            logging.getLogger(name).setLevel(logging.WARNING)
        return super().to_onnx(root, model_file_name, input_size, **{**defaults, **kwargs})

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | str | None = None,
        task: TaskType | None = None,  # noqa: ARG002
        max_drop: float = 0.01,
        ov_kwargs: dict[str, Any] | None = None,
        onnx_kwargs: dict[str, Any] | None = None,
    ) -> Path:
        """Export to OpenVINO with anomalib's arguments (``task`` is not used), computing in float32.

        Compression to eight bits quantizes the backbone alone, without its first layers (:func:`quantize`).
        """
        import openvino as ov

        pre_processor = self.pre_processor
        resized, rest = split_resize(self._transform())
        with TemporaryDirectory() as folder:
            if resized:
                self.pre_processor = PreProcessor(rest)
            try:
                onnx = self.to_onnx(folder, model_file_name, resized or input_size, **(onnx_kwargs or {}))
            finally:
                self.pre_processor = pre_processor
            model = ov.convert_model(onnx, **(ov_kwargs or {}))
            in_float = float_operations(onnx)
        model.get_parameters()[0].set_layout(ov.Layout("NCHW"))
        if resized and resized != tuple(input_size or ()):
            model = prepend_resize(model, input_size)
        if compression_type is not None:
            round_weights(model)
        if compression_type not in {None, CompressionType.FP16}:
            model = quantize(model, compression_type, in_float, datamodule, metric, max_drop)
        keep_float32(model)
        root = self._export_root(export_root, "openvino", f"{model_file_name}.xml")
        path = root / "weights" / "openvino" / f"{model_file_name}.xml"
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, path, compress_to_fp16=False)
        return path

    def _transform(self, *, exportable: bool = True) -> Any:  # noqa: ANN401
        processor = self.pre_processor or None
        if isinstance(processor, PreProcessor) and type(processor).forward is PreProcessor.forward:
            return exportable_transform(processor.transform) if exportable else processor.transform
        return processor  # the user's own may do anything

    def _export_root(self, export_root: Path | str, kind: str, file_name: str) -> Path:
        """The folder of the checkpoint's run where the user gave none; warns before an export is replaced."""
        root, checkpoint = Path(export_root), self.checkpoint_path
        if root == DEFAULT_ROOT and checkpoint and checkpoint.parts[-3:-1] == ("weights", "lightning"):
            root = checkpoint.parents[2]
        if (path := root / "weights" / kind / file_name).exists():
            logger.warning("Replacing %s, an earlier export. To keep both, pass another --export_root.", path)
        return root
