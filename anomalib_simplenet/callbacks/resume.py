"""Checkpoints that are whole or not there, and training that resumes from them as if never interrupted."""

from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO


def resumes(trainer: Trainer) -> bool:
    """Whether training resumes from a checkpoint of the user's, and not from that of a tuner, which starts anew."""
    name = Path(trainer.ckpt_path or "").name
    return bool(name) and not name.startswith((".scale_batch_size_", ".lr_find_"))


class Resume(Callback):
    """Keep the state of the random generators in checkpoints, and write these in one step.

    Each process draws noise and patches of its own, which follow from the seed and its rank.
    """

    def __init__(self) -> None:
        self._state: dict[str, torch.Tensor] = {}

    def setup(self, trainer: Trainer, *_args: object, **_kwargs: object) -> None:
        """Replace Lightning's way of writing files, not the user's."""
        given = trainer.strategy.checkpoint_io
        if getattr(type(given), "save_checkpoint", None) is TorchCheckpointIO.save_checkpoint:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO(given)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """State of torch's generators, which draw patches, noise and the order of images."""
        state = {"cpu": torch.get_rng_state()}
        return state | {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Keep the state of a checkpoint until training starts."""
        self._state = state_dict

    def on_fit_start(self, trainer: Trainer, *_args: object) -> None:
        """Set the generators, in each process otherwise."""
        if resumes(trainer) and self._state:
            torch.set_rng_state(self._state["cpu"].cpu())
            if "cuda" in self._state and torch.cuda.is_available():
                torch.cuda.set_rng_state(self._state["cuda"].cpu())
        if trainer.global_rank > 0:
            torch.manual_seed(int(torch.randint(2**62, ())) + trainer.global_rank)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file beside its target and renames it; Lightning copies it from the temporary folder.

    Reads with ``reader``: anomalib's knows which types are safe.
    """

    def __init__(self, reader: CheckpointIO) -> None:
        super().__init__()
        self.reader = reader

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint; an earlier one of its name stays until the new one is whole."""
        target = Path(path)
        if "://" in str(path):  # not a local file
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        try:
            whole = BytesIO()  # a full disk raises its own error then
            torch.save(checkpoint, whole)
            part.write_bytes(whole.getbuffer())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Read a checkpoint; a ``ValueError`` says so where the file was cut off, or is none."""
        if Path(path).is_file() and not is_zipfile(path):
            msg = f"{path} is no checkpoint, or was cut off while it was copied: use another."
            raise ValueError(msg)
        return self.reader.load_checkpoint(path, *args, **kwargs)
