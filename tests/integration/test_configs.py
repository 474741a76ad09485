import csv
import os
import subprocess
import sys
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

from anomalib_simplenet import SimpleNet

CONFIGS = Path(__file__).parents[2] / "configs"
COMPONENTS = {"pre_processor", "post_processor", "evaluator", "visualizer"}
OWN = ["elpv_mono", "elpv_poly", "elpv_synthetic", "magnetic_tile"]
JOBS = {**dict.fromkeys(OWN, 5 * 3), "mvtecad": 3 * 3 * 15, "visa": 3 * 3 * 12}  # seeds, models, categories


class ParseOnly(AnomalibCLI):
    """anomalib's command line, which would load weights from a hub if it built what it parsed."""

    def __init__(self, *args: str) -> None:
        super().__init__(args, run=False)

    def instantiate_classes(self) -> None:
        pass


def files(folder: str) -> list[Any]:
    return [pytest.param(path, id=path.stem) for path in sorted((CONFIGS / folder).glob("*.yaml"))]


def benchmark_jobs(path: Path) -> list[dict[str, Any]]:
    arguments = ParseOnly("benchmark", "--config", str(path)).config["benchmark"]
    return list(get_iterator_from_grid_dict(Benchmark()._get_args(arguments)["benchmark"]))


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_config_starts_with_when_to_use_it(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("path", files("model"))
def test_model_config_parses(path: Path) -> None:
    config = ParseOnly("train", "--config", str(path), "--data", "MVTecAD").config["train"]
    assert config.model.class_path == "anomalib_simplenet.SimpleNet"


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
    parameters = signature(SimpleNet).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items() if name not in COMPONENTS}
    assert written.keys() == {"model"}
    assert written["model"]["init_args"] == {**defaults, "layers": list(defaults["layers"])}


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
        "distance_weight": 0.0,
        "top_patches": 1,
        "averaging": False,
        "feature_cache_dtype": "float32",
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


@pytest.mark.parametrize("path", files("benchmark"))
def test_benchmark_config_gives_its_jobs(path: Path) -> None:
    assert len(benchmark_jobs(path)) == JOBS[path.stem]


@pytest.mark.parametrize("path", files("benchmark"))
def test_jobs_of_a_benchmark_fit_the_classes(path: Path) -> None:
    for job in benchmark_jobs(path):
        for name, module in (("model", anomalib.models), ("data", anomalib.data)):
            wanted = OmegaConf.create(job[name])  # as anomalib reads it
            parameters = signature(getattr(module, wanted.class_path)).parameters
            required = {key for key, parameter in parameters.items() if parameter.default is Parameter.empty}
            assert required <= wanted.init_args.keys() <= parameters.keys()


@pytest.mark.parametrize("path", files("benchmark"))
def test_jobs_of_a_benchmark_have_the_same_columns(path: Path) -> None:
    assert len({frozenset(flatten_dict(job)) for job in benchmark_jobs(path)}) == 1  # or anomalib loses all results


@pytest.mark.parametrize("name", OWN)
def test_benchmarks_without_a_hub_use_the_settings_of_the_edge_config(name: str) -> None:
    model = benchmark_jobs(CONFIGS / "benchmark" / f"{name}.yaml")[0]["model"]
    edge = yaml.safe_load((CONFIGS / "model" / "simplenet_edge.yaml").read_text())["model"]
    edge["init_args"].pop("pre_processor")  # which the pipeline cannot build
    assert OmegaConf.to_container(OmegaConf.create(model), resolve=True) == edge


def test_benchmark_command_compares_simplenet_with_another_model(tmp_path: Path) -> None:
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

    command = [sys.executable, "-m", "anomalib.cli.cli", "benchmark", "--config", "benchmark.yaml"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # so small that threads only wait for each other
    output = subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout

    tables = list(tmp_path.glob("runs/benchmark/*/results.csv"))
    assert len(tables) == 1, output  # anomalib leaves with 0 where it fails, too
    with tables[0].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["model.class_path"] for row in rows] == ["SimpleNet", "Padim"]
    for row in rows:
        assert 0 <= float(row["image_AUROC"]) <= 1
        assert 0 <= float(row["pixel_AUROC"]) <= 1
