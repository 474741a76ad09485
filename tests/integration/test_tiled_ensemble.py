"""anomalib's tiled ensemble: a model for each tile of the image."""

import json
from pathlib import Path

import anomalib.models
import pytest
from anomalib.pipelines.tiled_ensemble import EvalTiledEnsemble, TrainTiledEnsemble
from jsonargparse import Namespace

from anomalib_simplenet import SimpleNet

from .conftest import TINY


class TinySimpleNet(SimpleNet):
    """anomalib's ``get_model`` cannot pass a pre-processor and other arguments at once."""

    def __init__(self, **components: object) -> None:
        super().__init__(**TINY, **components)


def test_tiled_ensemble_trains_and_tests(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {"name": "pictures", "root": str(pictures), "normal_dir": "train/good", "abnormal_dir": "test/bad"}
    data |= {"normal_test_dir": "test/good", "mask_dir": "ground_truth/bad", "num_workers": 0, "train_batch_size": 2}
    data |= {"test_split_mode": "from_dir", "val_split_mode": "same_as_test"}
    arguments = {
        "seed": 0,
        "accelerator": "cpu",
        "default_root_dir": str(pictures.parent / "results"),
        "tiling": {"image_size": [64, 96], "tile_size": [64, 64], "stride": [64, 32]},
        "normalization_stage": "image",
        "thresholding_stage": "image",
        "data": {"class_path": "anomalib.data.Folder", "init_args": data},
        "TrainModels": {
            "model": {"class_path": "SimpleNet"},
            "trainer": {"max_epochs": 1, "logger": False},
        },
        "SeamSmoothing": {"apply": True, "sigma": 2, "width": 0.1},
    }
    monkeypatch.setattr(anomalib.models, "SimpleNet", TinySimpleNet)
    config = pictures.parent / "ensemble.yaml"
    config.write_text(json.dumps(arguments))
    monkeypatch.chdir(pictures.parent)  # the pipeline writes its log where it is called
    train = TrainTiledEnsemble()
    train.run(Namespace(config=config))
    EvalTiledEnsemble(train.root_dir).run(Namespace(config=config))
    (table,) = train.root_dir.rglob("metric_results.csv")
    assert "image_AUROC" in table.read_text()
