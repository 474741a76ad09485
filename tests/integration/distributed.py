"""What each process of tests in test_distributed.py runs: ``distributed.py PICTURES NAME TRAINER_ARGUMENTS(JSON)``."""

import json
import os
import sys
from pathlib import Path

import torch
from anomalib.engine import Engine
from lightning import seed_everything
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from tests.integration.conftest import folder_data, tiny_model


class Losses(Callback):
    """Losses of epochs, averaged over the processes; or a death in the second epoch."""

    def __init__(self, dies: str | None) -> None:
        self.losses: list[float] = []
        self.dies = dies

    def on_train_batch_start(self, trainer: Trainer, *_args: object) -> None:
        if trainer.current_epoch == 1 and str(trainer.global_rank) == self.dies:
            os._exit(9)

    def on_train_batch_end(self, trainer: Trainer, _model: object, outputs: dict, *_args: object) -> None:
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean").item())


def main() -> None:
    pictures, name, arguments = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    seed_everything(5)
    # Noise and batch norm are each process's own: without any, two must train exactly as one.
    model = tiny_model(adapter_layers=1, discriminator_layers=1, whiten=True, map_layer="layer1", noise_std=1e-30)
    processes = arguments.get("devices", 1) * arguments.get("num_nodes", 1)
    data = folder_data(pictures, train_batch_size=4 // processes, val_split_mode="same_as_test")
    watch = Losses(os.environ.get("DIES"))
    engine = Engine(
        callbacks=[watch], max_epochs=6, accelerator="cpu", default_root_dir=pictures.parent / name, **arguments
    )
    engine.fit(model, datamodule=data)
    state = {key: value for key, value in model.state_dict().items() if "feature_extractor" not in key}
    found = {"losses": watch.losses, "state": state, "noise": torch.rand(3)}
    torch.save(found, pictures.parent / f"{name}{engine.trainer.global_rank}.pt")


if __name__ == "__main__":
    main()
