"""anomalib's commands with real weights on real photographs, and what exported models answer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import ImageBatch
from anomalib.deploy import OpenVINOInferencer, TorchInferencer
from lightning import seed_everything
from PIL import Image

from anomalib_simplenet import SimpleNet

README = Path(__file__).parents[2] / "README.md"
CONFIG = Path(__file__).parents[2] / "configs" / "model" / "simplenet_edge.yaml"
SUFFIX = {"torch": ".pt", "onnx": ".onnx", "openvino": ".xml"}


class Workshop:
    """A folder with a model trained by `anomalib fit` on real photographs, and ways to use it."""

    def __init__(self, folder: Path, real: Path) -> None:
        self.folder = folder
        self.real = real
        self.model = ["--config", str(CONFIG), "--model.init_args.backbone", f"local-dir:{real / 'efficientnet_lite0'}"]
        self.where = ["--default_root_dir", str(folder / "results"), "--trainer.accelerator", "cpu"]
        folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/defective"}
        for part, count in zip(folders.values(), (40, 16, 16), strict=True):
            (folder / "mono" / part).mkdir(parents=True)
            paths = sorted((real / "mono" / part).iterdir())[6:]  # the first are predicted; neighbours are alike
            for path in paths[:: len(paths) // count][:count]:
                (folder / "mono" / part / path.name).symlink_to(path.resolve())
        settings = {"name": "mono", "root": str(folder / "mono"), "num_workers": 0, "train_batch_size": 8, "seed": 0}
        data = {"class_path": "anomalib.data.Folder", "init_args": {**settings, **folders}}
        self.data = ["--data", json.dumps(data)]
        seed_everything(0, verbose=False)  # how much FP16 moves scores depends on their range, and so on the training
        cli = self.run("fit", *self.model, *self.where, *self.data, "--trainer.max_epochs", "8")
        self.checkpoint = Path(cli.engine.trainer.checkpoint_callback.best_model_path)

    @staticmethod
    def run(*arguments: str) -> AnomalibCLI:
        return AnomalibCLI(list(arguments))

    def from_checkpoint(self, command: str, *arguments: str) -> AnomalibCLI:
        """Run a command with nothing said of the model but its name and checkpoint."""
        model = ["--model", "SimpleNet", "--model.init_args.pre_trained", "false"]
        return self.run(command, *model, *self.where, "--ckpt_path", str(self.checkpoint), *arguments)

    def export(self, export_type: str, *arguments: str) -> Path:
        root = self.folder / "exported" / "-".join([export_type, *arguments]).replace("--", "")
        path = root / "weights" / export_type / f"model{SUFFIX[export_type]}"
        if path.exists():
            return path
        data = self.data if "INT8_PTQ" in arguments else []  # to calibrate
        self.from_checkpoint("export", "--export_type", export_type, "--export_root", str(root), *arguments, *data)
        return path


@pytest.fixture(scope="module")
def workshop(real: Path, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"), real)


@pytest.fixture(scope="module")
def photographs(workshop: Workshop) -> list[Path]:
    """12 real photographs, of 300 x 300 pixels, and some of them larger and non-square; the model takes 256 x 256."""
    folder = workshop.folder / "photographs"
    folder.mkdir()
    for part in ("good", "defective"):
        for path in sorted((workshop.real / "mono" / "test" / part).iterdir())[:6]:
            with Image.open(path) as image:
                assert image.size == (300, 300)
                image.save(folder / f"{part}_{path.name}")
                if path.stem.endswith(("3", "7")):
                    image.resize((700, 520), Image.Resampling.BICUBIC).save(folder / f"{part}_large_{path.name}")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def predicted(workshop: Workshop, photographs: list[Path]) -> dict[str, ImageBatch]:
    """What `anomalib predict` says of the photographs, by path."""
    data = ["--data", str(photographs[0].parent), "--return_predictions", "true"]
    cli = workshop.from_checkpoint("predict", *data)
    batches = cli.engine.trainer.predict_loop.predictions
    return {batch.image_path[0]: batch for batch in batches}


def test_checkpoint_loads_under_weights_only_and_remembers_how_images_are_made(workshop: Workshop) -> None:
    torch.load(workshop.checkpoint, weights_only=True)
    model = SimpleNet.load_from_checkpoint(workshop.checkpoint)
    assert model.input_size == (256, 256)
    assert model.hparams["backbone"] == "tf_efficientnet_lite0"


def test_validate_and_test_from_the_checkpoint(workshop: Workshop) -> None:
    workshop.from_checkpoint("validate", *workshop.data, "--trainer.limit_val_batches", "1")
    cli = workshop.from_checkpoint("test", *workshop.data, "--trainer.limit_test_batches", "1")
    assert "image_AUROC" in cli.engine.trainer.callback_metrics
    assert list((workshop.folder / "results").rglob("images/**/*.png"))


def test_train_resumes_from_the_checkpoint_and_tests(workshop: Workshop) -> None:
    limits = [f"--trainer.limit_{part}_batches=2" for part in ("train", "val", "test")]
    cli = workshop.from_checkpoint("train", *workshop.data, "--trainer.max_epochs", "9", *limits)
    assert cli.engine.trainer.current_epoch == 9
    assert "image_F1Score" in cli.engine.trainer.callback_metrics


def test_predict_scores_every_photograph(predicted: dict[str, ImageBatch], photographs: list[Path]) -> None:
    assert sorted(predicted) == [str(path) for path in photographs]
    scores = {path: batch.pred_score.item() for path, batch in predicted.items()}
    assert all(0 <= score <= 1 for score in scores.values())
    mean = {part: np.mean([scores[path] for path in scores if f"{part}_" in path]) for part in ("good", "defective")}
    assert mean["defective"] > mean["good"]


@pytest.mark.parametrize(
    ("arguments", "score_tolerance"),
    [
        (("torch",), 1e-3),
        (("onnx", "--input_size", "[300,300]"), 1e-3),
        (("openvino",), 1e-3),
        # Rounding the weights to half precision moves the scores by some thousandths.
        (("openvino", "--compression_type", "FP16"), 1e-2),
        (("openvino", "--compression_type", "INT8_PTQ"), 0.05),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_exported_model_agrees_with_predict_on_images_larger_than_its_input(
    workshop: Workshop,
    photographs: list[Path],
    predicted: dict[str, ImageBatch],
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    score_tolerance: float,
) -> None:
    path = workshop.export(*arguments)
    monkeypatch.chdir(workshop.folder)  # OpenVINOInferencer leaves a cache where it is called
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    if arguments[0] == "torch":
        inferencer = TorchInferencer(path, device="cpu")
    else:
        # OpenVINO reads ONNX in bfloat16 where the processor can, unless told not to. Its own files say so themselves.
        config = {"INFERENCE_PRECISION_HINT": "f32"} if arguments[0] == "onnx" else None
        inferencer = OpenVINOInferencer(path, device="CPU", config=config)
    compared = 0
    for photograph in photographs:
        if "--input_size" in arguments and "large" in photograph.name:
            continue
        answer, expected = inferencer.predict(photograph), predicted[str(photograph)]
        assert abs(answer.pred_score.item() - expected.pred_score.item()) < score_tolerance
        if abs(expected.pred_score.item() - 0.5) > score_tolerance:
            assert answer.pred_label.item() == expected.pred_label.item()
        difference = np.abs(np.asarray(answer.anomaly_map) - expected.anomaly_map.numpy())
        if "INT8" in str(arguments):  # single pixels may differ more
            assert difference.mean() < score_tolerance / 2
        else:
            assert difference.max() < 1e-2
        compared += 1
    assert compared >= 12


def test_exported_graph_is_the_fused_one(workshop: Workshop) -> None:
    import openvino as ov

    nodes = ov.Core().read_model(workshop.export("openvino")).get_ops()
    kernels = [
        tuple(n.input(1).get_shape()[-2:]) for n in nodes if n.get_type_name() in {"Convolution", "GroupConvolution"}
    ]
    assert kernels
    assert max(max(kernel) for kernel in kernels) == 5  # the backbone's; smoothing is part of constant matrices
    assert {n.get_type_name() for n in nodes}.isdisjoint({"AdaptiveAvgPool", "ExtractImagePatches", "Col2Im"})


def test_sensitivity_on_the_command_line_counts(
    workshop: Workshop, photographs: list[Path], predicted: dict[str, ImageBatch]
) -> None:
    processor = ["--model.post_processor", "anomalib.post_processing.PostProcessor"]
    for sensitivity in (0.2, 0.8):
        setting = [*processor, "--model.post_processor.image_sensitivity", str(sensitivity)]
        where = ["--data", str(photographs[0].parent), "--return_predictions", "true", "--model.visualizer", "false"]
        cli = workshop.from_checkpoint("predict", *where, *setting)
        for batch in cli.engine.trainer.predict_loop.predictions:
            score = predicted[batch.image_path[0]].pred_score
            torch.testing.assert_close(batch.pred_score, score)
            assert batch.pred_label == (score > 1 - sensitivity)


def test_plain_openvino_answers_as_predict_does(
    workshop: Workshop,
    photographs: list[Path],
    predicted: dict[str, ImageBatch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in README.read_text().split("```python\n") if "import openvino as ov" in block)
    code = code.partition("```")[0]
    for photograph in photographs[:3]:
        run = code.replace("exported/weights/openvino/model.xml", str(workshop.export("openvino")))
        names: dict[str, object] = {}
        exec(run.replace("part.png", str(photograph)), names)
        expected = predicted[str(photograph)]
        assert names["score"] == pytest.approx(expected.pred_score.item(), abs=1e-3)
        assert names["defective"] == expected.pred_label.item()
        assert np.asarray(names["mask"]).shape == expected.pred_mask.shape[-2:]


def test_exported_model_takes_batches(workshop: Workshop) -> None:
    import openvino as ov

    model = ov.Core().compile_model(workshop.export("openvino"), "CPU")
    images = np.random.default_rng(0).random((8, 3, 300, 260), dtype=np.float32)
    together = model(images)["pred_score"]
    alone = np.concatenate([model(image[None])["pred_score"] for image in images])
    np.testing.assert_allclose(together, alone, atol=1e-5)
