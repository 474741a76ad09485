import csv
import shutil
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import anomalib.data
import anomalib.models
import numpy as np
import pytest
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.pipelines import Benchmark
from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict
from omegaconf import OmegaConf
from PIL import Image

CONFIGS = Path(__file__).parents[2] / "configs"
COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
EDGE = ["elpv_mono", "elpv_poly", "elpv_synthetic", "magnetic_tile", "mvtec_screw", "kolektorsdd"]
JOBS = {  # file and data set: seeds, models, categories
    **{("edge", data): 5 * 3 for data in EDGE},
    ("mvtecad_visa", "mvtecad"): 3 * 3 * 15,
    ("mvtecad_visa", "visa"): 3 * 3 * 12,
}
BENCHMARKS = pytest.mark.parametrize(("file", "data"), JOBS, ids=lambda name: name)


class ParseOnly(AnomalibCLI):
    """anomalib's command line, which would load weights from a hub if it built what it parsed."""

    def __init__(self, *args: str) -> None:
        super().__init__(args, run=False)

    def instantiate_classes(self) -> None:
        pass


def files(folder: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((CONFIGS / folder).glob("*.yaml"))]


@cache
def simplenet_defaults() -> dict[str, Any]:
    """The arguments of SimpleNet with their defaults, as the command line sees them."""
    config = ParseOnly("train", "--model", "SimpleNet", "--data", "MVTecAD").config["train"]
    arguments = config.model.init_args.as_dict()
    return {**arguments, "layers": list(arguments["layers"])}


def benchmark_jobs(file: str, data: str, folder: Path) -> list[dict[str, Any]]:
    """The jobs of a benchmark file, with ``data`` put in its last line as the file's head says."""
    head, _, last = (CONFIGS / "benchmark" / f"{file}.yaml").read_text().rstrip("\n").rpartition("\n")
    assert last.startswith("  data: *")
    chosen = folder / "benchmark.yaml"
    chosen.write_text(f"{head}\n  data: *{data}\n")
    arguments = ParseOnly("benchmark", "--config", str(chosen)).config["benchmark"]
    return list(get_iterator_from_grid_dict(Benchmark()._get_args(arguments)["benchmark"]))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_starts_with_when_to_use_it(path: Path) -> None:
    assert path.read_text().startswith(("# To ", "# For "))


@pytest.mark.parametrize("path", files("data"))
def test_data_config_has_a_seed(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["init_args"]["seed"] == 0


def test_folder_config_splits_the_test_images_alike_in_every_run(pictures: Path) -> None:
    """Without a seed, anomalib's ``Folder`` splits them into validation and test images anew in every run."""
    arguments = yaml.safe_load((CONFIGS / "data" / "folder.yaml").read_text())["init_args"]
    arguments.update(root=pictures, abnormal_dir="test/bad", mask_dir=None)
    for index in range(4, 20):
        shutil.copy(pictures / "test" / "good" / "000.png", pictures / "test" / "good" / f"{index:03}.png")
    runs = []
    for _ in range(2):
        data = anomalib.data.Folder(**arguments)
        data.setup()
        runs.append((list(data.val_data.samples.image_path), list(data.test_data.samples.image_path)))
    assert runs[0] == runs[1]
    assert set(runs[0][0]).isdisjoint(runs[0][1])


@pytest.mark.parametrize("path", files("model"))
def test_model_config_parses(path: Path) -> None:
    config = ParseOnly("train", "--config", str(path), "--data", "MVTecAD").config["train"]
    assert config.model.class_path == "anomalib.models.SimpleNet"


@pytest.mark.parametrize("path", files("data"))
def test_data_config_parses_and_takes_an_override(path: Path) -> None:
    override = ["--data.init_args.train_batch_size", "3"]
    config = ParseOnly("train", "--model", "SimpleNet", "--data", str(path), *override).config["train"]
    written = yaml.safe_load(path.read_text())
    assert config.data.class_path.split(".")[-1] == written["class_path"].split(".")[-1]
    assert written["init_args"]["train_batch_size"] == 8
    assert config.data.init_args.train_batch_size == 3


def test_default_config_holds_the_defaults_of_the_class() -> None:
    written = yaml.safe_load((CONFIGS / "model" / "simplenet.yaml").read_text())
    defaults = simplenet_defaults()
    assert written.keys() == {"model"}
    assert written["model"]["init_args"] == {name: defaults[name] for name in defaults.keys() - COMPONENTS}


def test_paper_config_holds_the_values_of_the_paper() -> None:
    written = yaml.safe_load((CONFIGS / "model" / "simplenet_paper.yaml").read_text())
    arguments = written["model"]["init_args"]
    transform = arguments.pop("pre_processor")["init_args"]["transform"]["init_args"]
    assert arguments == {
        "backbone": "wide_resnet50_2.tv_in1k",
        "layers": ["layer2", "layer3"],
        "pre_trained": True,
        "patch_size": 3,
        "pretrain_embed_dimension": 1536,
        "target_embed_dimension": 1536,
        "adapter_layers": 1,
        "discriminator_layers": 2,
        "discriminator_hidden": 1024,
        "noise_std": 0.015,
        "mix_noise": 1,
        "whiten": False,
        "patch_fraction": 1.0,
        "noise": "gaussian",
        "components": None,
        "normalize_brightness": False,
        "top_patches": 1,
        "map_layer": None,
        "averaging": False,
        "margin": 0.5,
        "adapter_lr": 1e-4,
        "discriminator_lr": 2e-4,
        "discriminator_weight_decay": 1e-5,
    }
    assert written["trainer"] == {"max_epochs": 160}
    assert [(step["class_path"].split(".")[-1], step["init_args"]) for step in transform["transforms"]] == [
        ("Resize", {"size": [329, 329], "antialias": True}),
        ("CenterCrop", {"size": [288, 288]}),
        ("Normalize", {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}),
    ]


def test_benchmark_files_are_those_whose_jobs_are_counted() -> None:
    written = {path.stem: yaml.safe_load(path.read_text()) for path in (CONFIGS / "benchmark").glob("*.yaml")}
    assert {(file, data) for file, config in written.items() for data in config["data_sets"]} == set(JOBS)
    for config in written.values():
        assert config["benchmark"]["data"] in config["data_sets"].values()


@BENCHMARKS
def test_benchmark_config_gives_its_jobs(file: str, data: str, tmp_path: Path) -> None:
    assert len(benchmark_jobs(file, data, tmp_path)) == JOBS[file, data]


@BENCHMARKS
def test_benchmark_jobs_fit_the_classes(file: str, data: str, tmp_path: Path) -> None:
    for job in benchmark_jobs(file, data, tmp_path):
        for name, module in (("model", anomalib.models), ("data", anomalib.data)):
            wanted = OmegaConf.create(job[name])  # as anomalib reads it
            parameters = signature(getattr(module, wanted.class_path)).parameters
            accepted = simplenet_defaults() if wanted.class_path == "SimpleNet" else parameters
            empty = {key for key, parameter in parameters.items() if parameter.default is Parameter.empty}
            required = empty - {"architecture"}  # SimpleNet's **architecture
            assert required <= wanted.init_args.keys() <= accepted.keys()


@BENCHMARKS
def test_benchmark_jobs_have_the_same_columns(file: str, data: str, tmp_path: Path) -> None:
    # anomalib loses all results where columns differ
    assert len({frozenset(flatten_dict(job)) for job in benchmark_jobs(file, data, tmp_path)}) == 1


@pytest.mark.parametrize("data", EDGE)
def test_edge_benchmark_uses_the_settings_of_the_edge_preset(data: str, tmp_path: Path) -> None:
    model = benchmark_jobs("edge", data, tmp_path)[0]["model"]
    edge = yaml.safe_load((CONFIGS / "model" / "simplenet_edge.yaml").read_text())["model"]
    edge["init_args"].pop("pre_processor")  # which the pipeline cannot build
    assert OmegaConf.to_container(OmegaConf.create(model), resolve=True) == edge


def test_benchmark_command_compares_simplenet_with_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"normal_dir": "train/good", "normal_test_dir": "test/good", "abnormal_dir": "test/bad"}
    folders["mask_dir"] = "ground_truth/bad"
    noise = np.random.default_rng(0)
    for folder in folders.values():
        (tmp_path / folder).mkdir(parents=True)
        for index in range(2 if folder == "train/good" else 3):
            pixels = noise.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            if folder == "ground_truth/bad":
                pixels = np.zeros((64, 64), dtype=np.uint8)
                pixels[10:30, 10:30] = 255
            Image.fromarray(pixels).save(tmp_path / folder / f"{index}.png")
    tiny = "backbone: resnet18, layers: [layer1], pre_trained: false"
    simplenet = "pretrain_embed_dimension: 8, target_embed_dimension: 8, discriminator_hidden: 8"
    models = [
        {"class_path": "SimpleNet", "init_args": f"${{oc.create:{{{tiny}, {simplenet}}}}}"},
        {"class_path": "Padim", "init_args": f"${{oc.create:{{{tiny}, n_features: 8}}}}"},
    ]
    data = {"name": "noise", "root": str(tmp_path), "num_workers": 0, "val_split_mode": "same_as_test", **folders}
    benchmark = {"seed": 0, "model": {"grid": models}, "data": {"class_path": "Folder", "init_args": data}}
    (tmp_path / "benchmark.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": benchmark}))

    monkeypatch.chdir(tmp_path)
    AnomalibCLI(["benchmark", "--config", "benchmark.yaml"])

    tables = list(tmp_path.glob("runs/benchmark/*/results.csv"))
    assert len(tables) == 1  # anomalib raises nothing where it fails
    with tables[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model.class_path"] for row in rows] == ["SimpleNet", "Padim"]
    for row in rows:
        assert 0 <= float(row["image_AUROC"]) <= 1
        assert 0 <= float(row["pixel_AUROC"]) <= 1
