"""report.html, and the rows of predictions.csv that it is made of."""

import csv
import json
import os
import re
import shutil
import sys
from datetime import datetime
from pathlib import Path

import pytest
import torch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch.callbacks import Callback

from anomalib_simplenet import SimpleNet

from .conftest import folder_data, tiny_model, write_images


@pytest.fixture
def tested(pictures: Path) -> Path:
    """Results of a model trained and tested on pictures, of which one has an awkward name."""
    (pictures / "test" / "bad" / "000.png").rename(pictures / "test" / "bad" / "a #1 <ü>.png")
    (pictures / "ground_truth" / "bad" / "000.png").rename(pictures / "ground_truth" / "bad" / "a #1 <ü>.png")
    torch.manual_seed(0)
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.train(tiny_model(), datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    return Path(engine.trainer.default_root_dir)


def lines(table: Path) -> list[dict[str, str]]:
    with table.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_report_agrees_with_the_predictions(tested: Path) -> None:
    rows = lines(tested / "predictions.csv")
    assert sorted(Path(row["image_path"]).name for row in rows if row["gt_label"] == "1") == [
        "001.png",
        "002.png",
        "003.png",
        "a #1 <ü>.png",
    ]
    assert len(rows) == 8
    for row in rows:
        assert int(row["pred_label"]) == (float(row["pred_score"]) > float(row["image_threshold"]))
    page = (tested / "report.html").read_text(encoding="utf-8")
    alarms = sum(row["gt_label"] == "0" and row["pred_label"] == "1" for row in rows)
    misses = sum(row["gt_label"] == "1" and row["pred_label"] == "0" for row in rows)
    assert f"{misses} of 4 defective" in page
    assert f"{alarms} of 4 normal" in page
    titles = ("Scores", "ROC", "Precision and recall")
    assert all(f'"text":"{title}"' in page for title in titles)
    assert not re.search(r'<(script|link|img)[^>]+(src|href)="(?!data:)', page)  # nothing is loaded from elsewhere


@pytest.mark.parametrize("normalised", [True, False])
def test_report_thresholds_give_what_curves_and_table_say(pictures: Path, normalised: bool) -> None:
    write_images(pictures / "more", 20, seed=7)
    for path in (pictures / "more").iterdir():
        path.rename(pictures / "test" / "good" / f"more_{path.name}")
    torch.manual_seed(0)
    model = tiny_model(visualizer=False, post_processor=PostProcessor(enable_normalization=normalised))
    model.model.discriminator.tail.weight.data *= 50
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.train(model, datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    results = Path(engine.trainer.default_root_dir)
    rows = lines(results / "predictions.csv")
    scores = {label: [float(row["pred_score"]) for row in rows if row["gt_label"] == label] for label in "01"}
    assert normalised or max(map(max, scores.values())) > 1
    page = (results / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*(\{.*?\}),\s*\{"displayModeBar"', page, re.DOTALL)
    charts = {json.loads(layout)["title"]["text"]: json.loads(data) for data, layout in plots}
    curves = {title: traces[0] for title, traces in charts.items()}
    curve = curves["ROC"]
    assert len(curve["x"]) == len(set(scores["0"] + scores["1"])) + 1
    for x, y, threshold in zip(curve["x"], curve["y"], curve["customdata"], strict=True):
        above = {label: sum(score > threshold for score in scores[label]) / len(scores[label]) for label in "01"}
        assert (above["0"], above["1"]) == pytest.approx((x, y))
    threshold = float(rows[0]["image_threshold"])
    above = {label: sum(score > threshold for score in scores[label]) / len(scores[label]) for label in "01"}
    (mark,) = charts["ROC"][1:]
    assert (mark["x"], mark["y"], mark["customdata"]) == ([above["0"]], [above["1"]], [threshold])
    choices = re.findall(r"<td>([\d.]+) %</td><td>(.*?)</td><td>(\d+) of 24</td><td>([\d.]+) ", page)
    assert [choice[0] for choice in choices] == ["0.1", "1", "5", "10"]
    for percent, limit, alarms, recall in choices:
        assert int(alarms) == sum(score > float(limit) for score in scores["0"]) <= float(percent) / 100 * 24
        assert float(recall) == pytest.approx(sum(score > float(limit) for score in scores["1"]) / 4, abs=1e-3)
    curve = curves["Precision and recall"]
    for recall, precision, threshold in zip(curve["x"], curve["y"], curve["customdata"], strict=True):
        above = {label: sum(score > threshold for score in scores[label]) for label in "01"}
        assert above["1"] / len(scores["1"]) == pytest.approx(recall)
        assert above["1"] / (above["0"] + above["1"]) == pytest.approx(precision)


def test_report_links_each_image_to_its_own_picture(pictures: Path) -> None:
    """Also where folders of one name hold images of one name, and a model is tested by two engines."""
    (pictures / "other").mkdir()
    shutil.copytree(pictures / "test" / "bad", pictures / "other" / "bad")
    torch.manual_seed(0)
    model = tiny_model()
    folders = {"masks": False, "name": "cells", "abnormal_dir": ["test/bad", "other/bad"]}
    data = folder_data(pictures, **folders, val_split_mode="same_as_test")
    for number in range(2):
        engine = Engine(max_epochs=1, default_root_dir=pictures.parent / str(number), accelerator="cpu")
        engine.train(model, datamodule=data)
        results = Path(engine.trainer.default_root_dir)
        assert len(list((results / "images").rglob("*.png"))) == 8
        page = (results / "report.html").read_text(encoding="utf-8")
        captions = dict(re.findall(r'<figure><a href="([^"]+)">.*?<figcaption>(.*?): ', page, re.DOTALL))
        assert len(captions) == 12
        for link, caption in captions.items():
            shown = (results / link).resolve()
            if "bad" in caption:
                assert shown in {pictures / "test" / caption, pictures / "other" / caption}
            else:
                assert shown == results.resolve() / "images" / caption


def test_report_of_a_second_run_keeps_the_first_and_can_be_off(pictures: Path, tested: Path) -> None:
    before = (tested / "report.html").read_bytes()
    engine = Engine(default_root_dir=pictures.parent / "results", accelerator="cpu")
    checkpoint = next(tested.rglob("model.ckpt"))
    engine.test(tiny_model(), datamodule=folder_data(pictures), ckpt_path=checkpoint)
    assert (tested / "report.html").read_bytes() == before
    assert (tested / "report-1.html").is_file()
    engine = Engine(default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.predict(tiny_model(report=False), data_path=pictures / "test" / "good")
    assert not (tested / "predictions-2.csv").exists()


def test_report_is_written_without_thresholds_masks_and_pictures(pictures: Path) -> None:
    model = tiny_model(visualizer=False, post_processor=False, evaluator=False)
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.train(model, datamodule=folder_data(pictures, masks=False))
    page = (Path(engine.trainer.default_root_dir) / "report.html").read_text(encoding="utf-8")
    assert "threshold</th>" not in page
    assert "pixel_" not in page.partition("</table>")[0]


def test_report_names_what_was_tested(pictures: Path, tested: Path) -> None:
    checkpoint = next(tested.rglob("model.ckpt"))
    engine = Engine(default_root_dir=pictures.parent / "elsewhere", accelerator="cpu")
    engine.test(tiny_model(visualizer=False), datamodule=folder_data(pictures), ckpt_path=checkpoint)
    results = Path(engine.trainer.default_root_dir)
    page = (results / "report.html").read_text(encoding="utf-8")
    values = dict(re.findall(r"<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    assert values["Checkpoint"] == str(checkpoint.resolve())
    assert {row["checkpoint"] for row in lines(results / "predictions.csv")} == {values["Checkpoint"]}
    assert (values["Model"], values["Data set"], values["backbone"]) == ("SimpleNet", "pictures", "resnet18")
    assert values["Date"].startswith(str(datetime.now().astimezone().year))
    assert all(
        package in values["Versions"]
        for package in ("anomalib-simplenet 0", "anomalib 2", f"torch {torch.__version__.split('+')[0]}")
    )


def test_report_of_one_class_has_no_auroc_and_no_pixel_threshold_without_masks(pictures: Path) -> None:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    data = folder_data(
        pictures, masks=False, abnormal_dir=None, test_split_mode="from_dir", val_split_mode="same_as_test"
    )
    engine.train(tiny_model(visualizer=False), datamodule=data)
    page = (Path(engine.trainer.default_root_dir) / "report.html").read_text(encoding="utf-8")
    assert "<tr><th>image_AUROC</th><td>none (one class only)</td></tr>" in page
    assert "<th>Image threshold</th>" in page
    assert "<th>Pixel threshold</th>" not in page
    assert "False alarms, at most" not in page


def test_report_shows_no_miss_at_the_threshold_among_the_worst(tested: Path) -> None:
    """Validation chose the score of an image as threshold, and anomalib labels only higher scores defective."""
    rows = lines(tested / "predictions.csv")
    at_threshold = [row for row in rows if row["pred_score"] == row["image_threshold"]]
    assert [row["pred_label"] for row in at_threshold] == ["0"]
    page = (tested / "report.html").read_text(encoding="utf-8")
    misses = page.partition("<h2>Worst misses</h2>")[2].partition("<h2>")[0]
    assert f"{Path(at_threshold[0]['image_path']).name}: score" not in misses
    assert ("1 of them exactly at the threshold" in page) == (at_threshold[0]["gt_label"] == "1")


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode elsewhere")
def test_report_is_written_where_image_names_are_not_utf8(pictures: Path) -> None:
    names = [b"caf\xe9.png", b"caf\xe8.png"]
    for name, path in zip(names, sorted((pictures / "test" / "bad").iterdir()), strict=False):
        path.rename(path.with_name(os.fsdecode(name)))
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.train(
        tiny_model(visualizer=False), datamodule=folder_data(pictures, masks=False, val_split_mode="same_as_test")
    )
    results = Path(engine.trainer.default_root_dir)
    assert all(name in (results / "predictions.csv").read_bytes() for name in names)
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "caf%E9.png" in page


def test_evaluator_without_labels_has_metrics_of_scores(pictures: Path) -> None:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    (metrics,) = engine.train(tiny_model(visualizer=False, post_processor=False), datamodule=folder_data(pictures))
    assert metrics.keys() == {"image_AUROC", "pixel_AUROC"}


@pytest.mark.parametrize("post_processor", [True, False, PostProcessor(image_sensitivity=0.38)])
def test_checkpoint_without_thresholds_loads_into_any_model(
    pictures: Path, caplog: pytest.LogCaptureFixture, post_processor: PostProcessor | bool
) -> None:
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.fit(tiny_model(visualizer=False, post_processor=False), datamodule=folder_data(pictures))
    path = engine.trainer.checkpoint_callback.best_model_path
    model = SimpleNet.load_from_checkpoint(path, post_processor=post_processor)
    assert model.post_processor is None
    assert "sensitivity" not in caplog.text


def test_report_is_written_after_images_are_deleted(pictures: Path) -> None:
    class Tidy(Callback):
        def on_test_epoch_end(self, *_args: object) -> None:
            shutil.rmtree(pictures / "test")

    results = pictures.parent / "results"
    engine = Engine(callbacks=[Tidy()], max_epochs=1, default_root_dir=results, accelerator="cpu")
    engine.train(tiny_model(visualizer=False), datamodule=folder_data(pictures, val_split_mode="same_as_test"))
    assert "bad/000.png" in (Path(engine.trainer.default_root_dir) / "report.html").read_text(encoding="utf-8")


def test_report_size_does_not_grow_with_images(pictures: Path, tested: Path) -> None:
    small = (tested / "report.html").stat().st_size
    write_images(pictures / "many", 40)
    for number, path in enumerate(sorted((pictures / "many").iterdir())):
        for copy in range(25):
            (pictures / "test" / "good" / f"{number}_{copy}.png").symlink_to(path)
    engine = Engine(default_root_dir=pictures.parent / "results", accelerator="cpu")
    model = tiny_model(visualizer=False, image_size=(32, 32))
    engine.test(model, datamodule=folder_data(pictures, eval_batch_size=50), ckpt_path=next(tested.rglob("model.ckpt")))
    assert len(lines(tested / "predictions-1.csv")) > 500
    assert (tested / "report-1.html").stat().st_size < small + 1_000_000


@pytest.mark.skipif(not shutil.which("chromedriver"), reason="needs Debian's chromium-driver")
def test_report_opens_in_a_browser_with_its_pictures(tested: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By

    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get((tested / "report.html").as_uri())
        assert len(driver.find_elements(By.CSS_SELECTOR, ".plots .main-svg")) >= 3
        for width in (390, 1200):
            screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == 390}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
            driver.refresh()
            assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
        links = {link.get_attribute("href") for link in driver.find_elements(By.CSS_SELECTOR, "figure a")}
        assert any("%23" in link for link in links)
        for link in links:
            driver.get(link)
            assert driver.execute_script("return document.images[0].naturalWidth") == 5 * 256
    finally:
        driver.quit()
