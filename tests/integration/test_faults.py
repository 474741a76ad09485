"""Kills, full disks, broken images and checkpoints: nothing is lost, and what is refused is named."""

import io
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Subset

from anomalib_simplenet import SimpleNet

from .conftest import FULL_TRIALS, folder_data, record, tiny_model, write_images

ROOT = Path(__file__).parents[2]
TRAINING = """
import sys
from pathlib import Path
from anomalib.engine import Engine
from lightning import seed_everything
from tests.integration.conftest import folder_data, tiny_model

pictures, results, *checkpoint = map(Path, sys.argv[1:])
seed_everything(len(checkpoint))  # a resumed run is seeded in another way
engine = Engine(max_epochs=60, accelerator="cpu", deterministic=True, default_root_dir=results)
model = tiny_model(whiten=True, patch_fraction=0.5, noise_std=1.0)
engine.fit(model, datamodule=folder_data(pictures), ckpt_path=checkpoint[0] if checkpoint else None)
"""


def train(pictures: Path, results: Path, checkpoint: Path | None = None, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-c", TRAINING, str(pictures), str(results), *([str(checkpoint)] if checkpoint else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes, **options)


def checkpoints(results: Path) -> list[Path]:
    return sorted(results.rglob("v*/weights/lightning/*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.trial
def test_training_resumes_after_a_kill_as_if_uninterrupted(pictures: Path, tmp_path: Path) -> None:
    """Kill -9 again and again, resume from the newest checkpoint each time."""
    trials = 20 if FULL_TRIALS else 2
    process = train(pictures, tmp_path / "whole")
    assert process.wait(300) == 0, process.stdout.read()
    (expected,) = checkpoints(tmp_path / "whole")
    results, chance, kills, resumed_from = tmp_path / "killed", random.Random(0), 0, []
    while True:
        before = checkpoints(results)
        process = train(pictures, results, before[-1] if before else None)
        if kills < trials:
            while process.poll() is None and len(checkpoints(results)) == len(before):
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.3))
            process.send_signal(signal.SIGKILL)
        if process.wait(300) == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stdout.read()
        kills += 1
        after = checkpoints(results)
        assert set(before) <= set(after)
        for path in after:
            weights(path)
        resumed_from.append(torch.load(after[-1], weights_only=True)["epoch"])
    assert kills == trials
    assert resumed_from == sorted(resumed_from)
    assert resumed_from[0] < 59
    end = weights(checkpoints(results)[-1])
    assert all(torch.equal(end[key], value) for key, value in weights(expected).items())
    record("kill -9 in training", tried=kills, lost="nothing: the same weights, bit for bit", resumed_from=resumed_from)


def test_runs_started_at_once_keep_apart(pictures: Path, tmp_path: Path) -> None:
    processes = [train(pictures, tmp_path / "results") for _ in range(2)]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    done = [process.returncode == 0 for process in processes]
    assert any(done)
    assert all(success or "FileExistsError" in output for success, output in zip(done, outputs, strict=True))
    assert len(checkpoints(tmp_path / "results")) == sum(done)


def test_checkpoint_survives_a_full_disk(pictures: Path, tmp_path: Path) -> None:
    def limit() -> None:  # files cannot grow, as where the disk is full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    process = train(pictures, tmp_path / "whole")
    while process.poll() is None and not checkpoints(tmp_path / "whole"):
        time.sleep(0.01)
    process.kill()
    process.wait()
    (checkpoint,) = checkpoints(tmp_path / "whole")
    content = checkpoint.read_bytes()
    process = train(pictures, tmp_path / "whole", checkpoint, preexec_fn=limit)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "File too large" in output
    assert checkpoints(tmp_path / "whole") == [checkpoint]
    assert checkpoint.read_bytes() == content


def test_results_go_to_folders_with_spaces_and_letters_of_any_kind(pictures: Path) -> None:
    folder = pictures.rename(pictures.with_name("images of today"))  # anomalib takes no other letters than ASCII here
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=folder / "Ergebnisse ß 結果")
    model = tiny_model()
    engine.train(model, datamodule=folder_data(folder))
    results = Path(engine.trainer.default_root_dir)
    assert (results / "report.html").is_file()
    assert len(list(results.rglob("images/*/*.png"))) == 4  # the other half validates
    assert engine.export(model, "openvino").is_file()


def fuzzed(kind: str, chance: random.Random) -> tuple[bytes, str]:
    """Content of an image file that is unusual or broken, and how its name ends."""
    noise = np.random.default_rng(chance.randrange(2**32))
    suffix = chance.choice([".png", ".jpg", ".bmp", ".tif"])
    size = {"1 x 1": (1, 1), "1 x 10,000": (10_000, 1), "10,000 x 1": (1, 10_000)}.get(kind, (40, 50))
    pixels = noise.integers(0, 256, (*size, 3), dtype=np.uint8)
    image, options = Image.fromarray(pixels), {}
    if kind == "16 bit":
        image, suffix = Image.fromarray(noise.integers(0, 2**16, size, dtype=np.uint16)), ".png"
    elif kind == "CMYK":
        image, suffix = image.convert("CMYK"), chance.choice([".jpg", ".tif"])
    elif kind == "animated":
        frames = [Image.fromarray(noise.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(3)]
        suffix, options = chance.choice([".png", ".tif"]), {"save_all": True, "append_images": frames}
    elif kind == "rotated by EXIF":
        exif = Image.Exif()
        exif[0x0112] = chance.randrange(1, 9)
        suffix, options = ".jpg", {"exif": exif}
    elif kind == "float":
        image, suffix = Image.fromarray(noise.standard_normal(size).astype(np.float32)), ".tif"
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[suffix], **options)
    content = bytearray(buffer.getvalue())
    if kind == "truncated":
        del content[chance.randrange(len(content)) :]
    elif kind == "wrong header":
        content[: chance.randrange(1, 40)] = noise.bytes(20)
    elif kind == "broken in the middle":
        for _ in range(10):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif kind == "zero size":
        content.clear()
    elif kind == "wrong suffix":
        suffix = chance.choice([".png", ".jpg", ".bmp", ".tif"])
    return bytes(content), suffix


KINDS = ("truncated", "wrong header", "broken in the middle", "zero size", "wrong suffix", "1 x 1", "1 x 10,000")
KINDS += ("10,000 x 1", "16 bit", "CMYK", "animated", "rotated by EXIF", "float", "whole")
ALWAYS_PREDICTED = KINDS[4:]


@pytest.mark.trial
@pytest.mark.filterwarnings("ignore")
def test_predict_scores_or_names_unusual_and_broken_files(tmp_path: Path) -> None:
    chance, model, results = random.Random(1), tiny_model(visualizer=False).eval(), {}
    trials = 1000 if FULL_TRIALS else 56
    for number in range(trials):
        kind = KINDS[number % len(KINDS)]
        content, suffix = fuzzed(kind, chance)
        path = tmp_path / f"image{number}{suffix}"
        path.write_bytes(content)
        engine = Engine(accelerator="cpu", default_root_dir=tmp_path / "out", enable_progress_bar=False, logger=False)
        batches, refusal = [], None
        try:
            batches = engine.predict(model, dataset=PredictDataset(path))
        except ValueError as error:
            refusal = str(error)
        if refusal is not None:
            assert str(path) in refusal
            assert kind not in ALWAYS_PREDICTED, refusal
        else:
            assert torch.isfinite(batches[0].pred_score).all()
            assert torch.isfinite(batches[0].anomaly_map).all()
        end = kind, "predicted" if refusal is None else "refused"
        results[end] = results.get(end, 0) + 1
    assert sum(results.values()) == trials
    assert results["zero size", "refused"] == len(range(KINDS.index("zero size"), trials, len(KINDS)))
    counts = {" ".join(key): count for key, count in sorted(results.items())}
    record("unusual and broken image files", tried=trials, lost="nothing: all predicted or refused by name", **counts)


def test_exported_model_takes_unusual_images_as_the_model_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # OpenVINOInferencer leaves a cache where it is called
    torch.manual_seed(0)
    model = tiny_model(visualizer=False, post_processor=False).eval()
    exported = OpenVINOInferencer(model.to_openvino(tmp_path), device="CPU")
    for kind in ALWAYS_PREDICTED:
        content, suffix = fuzzed(kind, random.Random(2))
        path = tmp_path / f"image{suffix}"
        path.write_bytes(content)
        with torch.no_grad():
            expected = model(read_image(path, as_tensor=True)[None]).pred_score.item()
        assert exported.predict(path).pred_score.item() == pytest.approx(expected, abs=1e-3), kind


def test_broken_image_among_others_is_named_by_every_command(pictures: Path) -> None:
    model = tiny_model()
    for part in ("train/good", "test/good", "ground_truth/bad"):
        path = pictures / part / "001.png"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        name = str(path) if "ground" not in part else "test/bad/001.png, or its mask"
        for workers in (0, 2):
            engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=pictures.parent / "results")
            with pytest.raises(ValueError, match=f"{name}.* cannot be read"):
                engine.train(model, datamodule=folder_data(pictures, num_workers=workers))
        path.write_bytes(whole)


def test_pixels_beyond_8_bits_are_warned_about(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    deep = np.full((40, 50), 3000, dtype=np.uint16)
    Image.fromarray(deep).save(pictures / "deep.png")
    Engine(accelerator="cpu", default_root_dir=pictures.parent / "results").predict(
        tiny_model(), dataset=PredictDataset(pictures / "deep.png")
    )
    (warning,) = [record.getMessage() for record in caplog.records if "8 bits" in record.getMessage()]
    assert str(pictures / "deep.png") in warning


class Tensors(Dataset):
    """Images that were no files; the second has a pixel that is not finite."""

    def __init__(self, pixel: float) -> None:
        self.image = torch.rand(3, 3, 64, 64)
        self.image[1, 0, 5, 5] = pixel

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.image[index]

    @staticmethod
    def collate(images: list[torch.Tensor]) -> ImageBatch:
        return ImageBatch(torch.stack(images), image_path=[f"camera{index}" for index in range(len(images))])


@pytest.mark.parametrize("pixel", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(pictures: Path, pixel: float) -> None:
    loader = DataLoader(Tensors(pixel), batch_size=3, collate_fn=Tensors.collate)
    engine = Engine(max_epochs=2, accelerator="cpu", default_root_dir=pictures.parent / "results", limit_val_batches=0)
    with pytest.raises(ValueError, match="Of camera1 pixels are NaN or infinite"):
        engine.predict(tiny_model(), dataloaders=loader)
    with pytest.raises(ValueError, match="is NaN or infinite after epoch 0"):
        engine.fit(tiny_model(), train_dataloaders=loader)
    assert not checkpoints(pictures.parent / "results")


class Evil:
    """Makes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_checkpoints_that_are_cut_off_or_malicious_are_refused(pictures: Path, tmp_path: Path) -> None:
    engine = Engine(max_epochs=1, accelerator="cpu", default_root_dir=tmp_path / "results")
    engine.fit(tiny_model(), datamodule=folder_data(pictures))
    (checkpoint,) = checkpoints(tmp_path / "results")
    content = checkpoint.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        cut = tmp_path / "cut.ckpt"
        cut.write_bytes(content[:length])
        for run in (engine.test, engine.fit):
            with pytest.raises(ValueError, match=r"cut\.ckpt is no checkpoint, or was cut off"):
                run(tiny_model(), datamodule=folder_data(pictures), ckpt_path=cut)
    for version in ("1.9.0", "99.0.0"):
        other = tmp_path / "other.ckpt"
        torch.save(torch.load(checkpoint, weights_only=True) | {"pytorch-lightning_version": version}, other)
        engine.test(tiny_model(), datamodule=folder_data(pictures), ckpt_path=other)
    evil, proof = tmp_path / "evil.ckpt", tmp_path / "executed"
    torch.save(torch.load(checkpoint, weights_only=True) | {"callbacks": Evil(proof)}, evil)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        engine.test(tiny_model(), datamodule=folder_data(pictures), ckpt_path=evil)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        SimpleNet.load_from_checkpoint(evil)
    assert not proof.exists()


class Peak(Callback):
    """Memory that is the process's own, at the start of each epoch or each hundredth batch."""

    def __init__(self) -> None:
        self.used: list[int] = []

    def measure(self) -> None:
        self.used.append(psutil.Process().memory_full_info().uss)

    def on_train_epoch_end(self, *_args: object) -> None:
        self.measure()

    def on_predict_batch_end(self, *arguments: object) -> None:
        if arguments[4] % 100 == 50:
            self.measure()


@pytest.mark.trial
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Predict a folder without pictures; train on images whose maps do not fit the cache."""
    predicted, trained = (5000, 20_000) if FULL_TRIALS else (400, 100)
    write_images(tmp_path / "images" / "good", max(predicted, trained), (16, 16))
    small = {"image_size": (32, 32), "feature_cache_memory": 1e-6}
    watch = Peak()
    engine = Engine(callbacks=[watch], accelerator="cpu", default_root_dir=tmp_path / "results", logger=False)
    data = Subset(PredictDataset(tmp_path / "images"), range(predicted))
    loader = DataLoader(data, collate_fn=ImageBatch.collate)
    engine.predict(tiny_model(visualizer=False, **small), dataloaders=loader, return_predictions=False)
    grown = watch.used[-1] - watch.used[0]
    record(f"predicting {predicted} images", memory_grown_by=f"{grown / 2**20:.1f} MiB")
    assert grown < 8 * 2**20

    watch = Peak()
    engine = Engine(
        callbacks=[watch], max_epochs=3, accelerator="cpu", default_root_dir=tmp_path / "results", limit_val_batches=0
    )
    data = Folder("many", "good", tmp_path / "images", train_batch_size=32, num_workers=0, val_split_mode="none")
    engine.fit(tiny_model(**small), datamodule=data)
    grown = watch.used[-1] - watch.used[0]
    record(f"training on {trained} images, maps not kept", memory_grown_by=f"{grown / 2**20:.1f} MiB")
    assert grown < 8 * 2**20
