"""python -m anomalib_simplenet.check: differences and labels, exit codes, bad input, and speed."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import PredictDataset
from anomalib.engine import Engine

from anomalib_simplenet import SimpleNet, check
from anomalib_simplenet.export.openvino import keep_float32

from .conftest import folder_data, tiny_model, write_images


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with pictures, model.ckpt, and its exports model.xml and model.onnx."""
    root = tmp_path_factory.mktemp("check")
    write_images(root / "pictures" / "train" / "good", 5, (64, 64))
    write_images(root / "pictures" / "test" / "good", 4, (64, 64), seed=1)
    write_images(root / "pictures" / "test" / "bad", 4, (64, 64), seed=2)
    write_images(root / "other", 8, (64, 64), seed=3)
    torch.manual_seed(0)
    engine = Engine(max_epochs=1, default_root_dir=root / "results", accelerator="cpu")
    data = folder_data(root / "pictures", masks=False, val_split_mode="same_as_test")
    engine.fit(model := tiny_model(visualizer=False, report=False), datamodule=data)
    shutil.copy(engine.trainer.checkpoint_callback.best_model_path, root / "model.ckpt")
    model.to_onnx(root).rename(root / "model.onnx")
    keep_float32(converted := ov.convert_model(root / "model.onnx"))  # as to_openvino does, without exporting again
    ov.save_model(converted, root / "model.xml", compress_to_fp16=False)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *paths: Path, speed: bool = False) -> int:
    monkeypatch.setattr(check, "SECONDS", 1)
    monkeypatch.setattr(sys, "argv", ["check", *map(str, paths)])
    if not speed:
        monkeypatch.setattr(check, "_speed", lambda *_: {})
    with pytest.raises(SystemExit) as exit_:
        check.main()
    return exit_.value.code


def altered(exported: Path, **config: object) -> Path:
    """A checkpoint with other weights or, where given, other settings of its post-processor."""
    checkpoint = torch.load(exported / "model.ckpt", weights_only=True)
    if config:
        checkpoint["anomalib_post_processor_config"].update(config)
    else:
        checkpoint["state_dict"]["model.discriminator.tail.weight"] *= 1.1
    torch.save(checkpoint, exported / "altered.ckpt")
    return exported / "altered.ckpt"


def test_check_without_labels_compares_scores(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    off = altered(exported, enable_thresholding=False)
    assert run(monkeypatch, exported / "model.xml", off, exported / "other") == 2  # the export has labels
    model = SimpleNet.load_from_checkpoint(off)
    model.to_onnx(exported / "off").rename(exported / "off.onnx")
    capsys.readouterr()
    assert run(monkeypatch, exported / "off.onnx", off, exported / "other") == 0
    assert "label        none in this checkpoint" in capsys.readouterr().out
    checkpoint = torch.load(off, weights_only=True)
    checkpoint["state_dict"]["model.discriminator.tail.weight"] *= 1.1
    torch.save(checkpoint, exported / "off.ckpt")
    assert run(monkeypatch, exported / "off.onnx", exported / "off.ckpt", exported / "other") == 1


def test_check_passes_an_export_and_measures_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(monkeypatch, exported / "model.xml", exported / "model.ckpt", exported / "other", speed=True)
    output = capsys.readouterr().out
    assert float(re.search(r"mask +differs by at most (\S+), for", output)[1]) < 1e-3  # of the pixels
    for name in ("score", "anomaly map", "p-value"):
        assert float(re.search(rf"{name} +differs by at most (\S+), for .*/other/\d+.png", output)[1]) < 1e-5
    assert (code, re.findall(r"label +differs for (\d) of 8 images", output)) == (0, ["0"]), output
    size = sum((exported / name).stat().st_size for name in ("model.xml", "model.bin")) / 2**20
    assert f"size         {size:.1f} MiB\n" in output
    assert re.search(r"precision +convolutions and matrix products .*\d+ in \w+; INFERENCE_PRECISION_HINT \w+", output)
    assert int(re.search(r"threads +(\d+)", output)[1]) > 0
    latency = re.search(r"latency +p50 ([\d.]+) ms, p95 ([\d.]+) ms, p99 ([\d.]+) ms, one image of 64 x 64 at", output)
    assert 0 < float(latency[1]) <= float(latency[2]) <= float(latency[3])
    assert float(re.search(r"throughput +([\d.]+) images a second", output)[1]) > 0


@pytest.mark.parametrize("kind", ["xml", "onnx"])
def test_check_finds_differences_and_labels_of_another_checkpoint(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
        assert run(monkeypatch, exported / "model.onnx", exported / "model.ckpt", exported / "other") == 0
    assert run(monkeypatch, exported / f"model.{kind}", altered(exported), exported / "other") == 1
    output = capsys.readouterr().out.partition("altered")[2]
    dataset, answers = PredictDataset(exported / "other"), []
    for name in ("model.ckpt", "altered.ckpt"):
        model = SimpleNet.load_from_checkpoint(exported / name).eval()
        with torch.no_grad():
            answers.append([model(dataset[index].image[None]) for index in range(8)])
    for field, name in (("pred_score", "score"), ("anomaly_map", "anomaly map"), ("p_value", "p-value")):
        pairs = [(getattr(one, field), getattr(other, field)) for one, other in zip(*answers, strict=True)]
        largest = max((one - other).abs().max().item() for one, other in pairs)
        assert float(re.search(rf"{name} +differs by at most (\S+),", output)[1]) == pytest.approx(largest, rel=0.06)
    masks = max((one.pred_mask != other.pred_mask).float().mean().item() for one, other in zip(*answers, strict=True))
    assert float(re.search(r"mask +differs by at most (\S+),", output)[1]) == pytest.approx(masks, rel=0.06)
    differing = sum((one.pred_label != other.pred_label).item() for one, other in zip(*answers, strict=True))
    assert f"differs for {differing} of 8 images" in output
    lines = re.findall(r"\d.png: (?:defective|normal), score [\d.]+, checkpoint's [\d.]+$", output, re.MULTILINE)
    assert len(lines) == differing


def test_check_names_images_at_the_threshold_without_counting_them(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation chose the score of one of the images, and in an export rounding may label it otherwise."""
    for shift in (1e-6, -1e-6):
        checkpoint = altered(exported, image_sensitivity=0.5 + shift)
        assert run(monkeypatch, exported / "model.xml", checkpoint, exported / "pictures" / "test") == 0
    output = capsys.readouterr().out
    assert output.count("differs for 0 of 8") == 2
    assert output.count("score 0.50000, checkpoint's 0.50000, at the threshold: not counted") == 1


def test_check_counts_scores_that_are_not_a_number(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nan = {"pred_score": np.full(1, np.nan, np.float32), "pred_label": np.zeros(1, bool)}
    runtime = check._runtime
    monkeypatch.setattr(check, "_runtime", lambda *given: lambda image: {**runtime(*given)(image), **nan})
    assert run(monkeypatch, exported / "model.xml", exported / "model.ckpt", exported / "other") == 1
    output = capsys.readouterr().out
    assert "score        differs by at most nan" in output
    assert "differs for 8 of 8 images" in output


def test_check_refuses_what_it_cannot_use(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, checkpoint, images = exported / "model.xml", exported / "model.ckpt", exported / "pictures" / "test"
    static = ov.Core().read_model(model)
    static.reshape([1, 3, 32, 48])
    ov.save_model(static, tmp_path / "static.xml")
    static_onnx = SimpleNet.load_from_checkpoint(checkpoint).to_onnx(tmp_path / "static", input_size=(32, 48))
    (tmp_path / "alone.xml").write_bytes(model.read_bytes())
    for name in ("broken.xml", "broken.onnx", "broken.ckpt"):
        (tmp_path / name).write_text("nothing")
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:100_000])
    table = torch.empty(0)
    without = altered(exported, calibration_scores=table, calibration_peaks=table)
    (tmp_path / "none").mkdir()
    (tmp_path / "cut").mkdir()
    (cut := tmp_path / "cut" / "a.png").write_bytes((images / "good" / "000.png").read_bytes()[:2000])
    cases = [
        ((checkpoint, checkpoint, images), f"{checkpoint} is no exported model: expected an .xml or .onnx file"),
        ((tmp_path / "no.xml", checkpoint, images), "no.xml is no exported model"),
        ((tmp_path / "broken.xml", checkpoint, images), "broken.xml, or its .bin or .data file, cannot be loaded: "),
        ((tmp_path / "broken.onnx", checkpoint, images), "broken.onnx, or its .bin or .data file, cannot be loaded: "),
        ((tmp_path / "alone.xml", checkpoint, images), "alone.xml, or its .bin or .data file, cannot be loaded: "),
        ((tmp_path / "static.xml", checkpoint, images), "takes [1,3,32,48], and "),
        ((static_onnx, checkpoint, images), "takes [?,3,32,48], and "),
        ((model, without, images), f"{model} has other outputs than {without}: export this checkpoint again."),
        ((model, tmp_path / "no.ckpt", images), "no.ckpt"),
        (
            (model, tmp_path / "broken.ckpt", images),
            "broken.ckpt is no checkpoint of this version of SimpleNet, or was cut off: ",
        ),
        (
            (model, tmp_path / "cut.ckpt", images),
            "cut.ckpt is no checkpoint of this version of SimpleNet, or was cut off: ",
        ),
        (
            (model, tmp_path / "empty.ckpt", images),
            "empty.ckpt is no checkpoint of this version of SimpleNet, or was cut off: ",
        ),
        ((model, checkpoint, tmp_path / "no"), f"Path does not exist: {tmp_path / 'no'}"),
        ((model, checkpoint, tmp_path / "none"), "Found 0 images in "),
        ((model, checkpoint, cut.parent), f"{cut}, or its mask, cannot be read"),
    ]
    for paths, expected in cases:
        assert run(monkeypatch, *paths) == 2, paths
        output = capsys.readouterr()
        assert expected in output.err
        assert output.out == ""
