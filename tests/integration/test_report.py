"""report.html, and the rows of predictions.csv that it is made of."""

import csv
import json
import os
import re
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning.pytorch.callbacks import Callback
from PIL import Image
from scipy.stats import ks_2samp

from anomalib_simplenet import SimpleNet
from anomalib_simplenet.callbacks.drift import compare
from anomalib_simplenet.callbacks.predictions import COLUMNS, Predictions
from anomalib_simplenet.callbacks.report import Report

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


def plots(page: str) -> dict[str, tuple[list[dict], dict]]:
    """Traces and layout of each chart, by its title."""
    pattern = r'Plotly\.newPlot\(\s*"[^"]+",\s*(\[.*?\]),\s*(\{.*?\}),\s*\{"displayModeBar"'
    found = [(json.loads(data), json.loads(layout)) for data, layout in re.findall(pattern, page, re.DOTALL)]
    return {layout["title"]["text"]: (data, layout) for data, layout in found}


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
    charts = {title: traces for title, (traces, _) in plots(page).items()}
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
    (tested / "predictions.csv").rename(tested / "mine.csv")
    Engine(default_root_dir=pictures.parent / "results", accelerator="cpu").test(
        tiny_model(), datamodule=folder_data(pictures), ckpt_path=checkpoint
    )
    assert (tested / "report.html").read_bytes() == before
    (tested / "mine.csv").rename(tested / "predictions.csv")
    engine = Engine(default_root_dir=pictures.parent / "results", accelerator="cpu")
    engine.predict(tiny_model(report=False), data_path=pictures / "test" / "good")
    assert not (tested / "predictions-3.csv").exists()


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
    with pytest.raises(ValueError, match=r"false_alarm_rate is 0\.1, but the checkpoint was trained without post_proc"):
        SimpleNet.load_from_checkpoint(path, false_alarm_rate=0.1)


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


@pytest.fixture
def browser() -> Iterator[object]:
    if not shutil.which("chromedriver"):
        pytest.skip("needs Debian's chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    for argument in ("--headless", "--no-sandbox", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def check_layout(browser: object, page: Path, charts: int) -> None:
    """The page shows its charts, fits a phone and a desk, and logs no error."""
    from selenium.webdriver.common.by import By

    browser.get(page.as_uri())
    assert len(browser.find_elements(By.CSS_SELECTOR, ".plots > div .main-svg:first-child")) == charts
    for width in (390, 1200):
        screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width == 390}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.refresh()
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_report_opens_in_a_browser_with_its_pictures(tested: Path, browser: object) -> None:
    from selenium.webdriver.common.by import By

    check_layout(browser, tested / "report.html", 3)
    links = {link.get_attribute("href") for link in browser.find_elements(By.CSS_SELECTOR, "figure a")}
    assert any("%23" in link for link in links)
    for link in links:
        browser.get(link)
        assert browser.execute_script("return document.images[0].naturalWidth") == 5 * 256


def test_drift_is_named_as_often_as_chance_allows() -> None:
    """Calibration scores are a sample too: a test of p-values against the uniform distribution fails here."""
    noise = np.random.default_rng(0)
    verdicts = [
        compare(p_values(noise.normal(size=200), table), p_values(table, table))
        for table in noise.normal(size=(400, 30))
    ]
    assert sum("No change was found" not in verdict for verdict in verdicts) <= 10  # 4 expected


def p_values(scores: np.ndarray, table: np.ndarray) -> np.ndarray:
    return (1 + (table >= scores[:, None]).sum(axis=1)) / (len(table) + 1)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        pytest.param(np.linspace(1, 3, 30), "Scores are higher than in calibration: 100% of the images", id="higher"),
        pytest.param(np.linspace(-3, -1, 30), "Scores are lower than in calibration: 0% of the images", id="lower"),
        pytest.param([0.2] * 50, "Scores are ", id="all the same"),
        pytest.param([*np.linspace(-1, 1, 70), *[9] * 30], "Scores are higher than in calibration: 3", id="defects"),
        pytest.param([9], "With so few images, a change may not be found.", id="one image"),
        pytest.param(np.linspace(-1, 1, 60), "A change of fewer than 30% of the images may not be found.", id="none"),
    ],
)
def test_drift_names_the_direction_and_what_may_be_missed(scores: list[float], expected: str) -> None:
    table = np.linspace(-1, 1, 60)
    verdict = compare(p_values(np.array(scores), table), p_values(table, table))
    assert expected in verdict
    assert f"D = {ks_2samp(scores, table).statistic:.2f}" in verdict or "lower" in verdict


@pytest.fixture
def calibrated(pictures: Path) -> Path:
    """Checkpoint of a model that 24 normal images calibrated."""
    write_images(pictures / "more", 20, seed=7)
    for path in (pictures / "more").iterdir():
        path.rename(pictures / "test" / "good" / f"more_{path.name}")
    torch.manual_seed(0)
    engine = Engine(max_epochs=1, default_root_dir=pictures.parent / "trained", accelerator="cpu")
    data = folder_data(pictures, masks=False, val_split_mode="same_as_test")
    engine.fit(tiny_model(visualizer=False, report=False), datamodule=data)
    return Path(engine.trainer.checkpoint_callback.best_model_path)


def predict(folder: Path, images: Path, checkpoint: Path) -> Path:
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False)
    engine.predict(tiny_model(visualizer=False), data_path=images, ckpt_path=checkpoint)
    return Path(engine.trainer.default_root_dir)


def test_report_of_predictions_compares_them_with_the_calibration(pictures: Path, calibrated: Path) -> None:
    (changed := pictures.parent / "changed").mkdir()
    for number in range(30):
        Image.new("RGB", (64, 80), (100 + number, 100, 100)).save(changed / f"{number:02}.png")
    results = predict(pictures.parent / "days", pictures / "test" / "good", calibrated)
    first = (results / "report.html").read_text(encoding="utf-8")
    assert predict(pictures.parent / "days", changed, calibrated) == results
    assert (results / "report.html").read_text(encoding="utf-8") == first
    second = (results / "report-1.html").read_text(encoding="utf-8")
    model = SimpleNet.load_from_checkpoint(calibrated).eval()
    scores = []
    for table in ("predictions.csv", "predictions-1.csv"):
        paths = [row["image_path"] for row in lines(results / table)]
        images = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255 for path in paths]
        with torch.no_grad():
            scores.append(
                torch.cat([model.model(model.pre_processor.transform(image)).pred_score for image in images]).numpy()
            )
    table = model.post_processor.calibration_scores.numpy()
    result = ks_2samp(scores[1], table)
    assert result.pvalue < 0.01
    assert "No change was found: scores are spread as in calibration (Kolmogorov-Smirnov test with 24 cal" in first
    assert f"Scores are {'higher' if scores[1].mean() > table.mean() else 'lower'} than in calibration" in second
    (found,) = re.findall(r"test with 24 calibration images: D = ([\d.]+), p = [\d.e-]+\)", second)
    assert float(found) == pytest.approx(result.statistic, abs=1 / 24 + 0.005)  # at the calibration's resolution
    for page, name, raw in ((first, "predictions.csv", scores[0]), (second, "predictions-1.csv", scores[1])):
        title = re.search("<title>SimpleNet, (.*?), (.*?)</title>", page)
        assert (datetime.fromisoformat(title[1]).tzinfo is None, title[2]) == (False, str(calibrated.resolve()))
        (calibration, predicted), layout = plots(page)["Scores"]
        assert [calibration["name"], predicted["name"]] == ["calibration", "predicted"]
        rows = lines(results / name)
        # The first day's images are those of the calibration.
        for trace, shown in ((calibration, lines(results / "predictions.csv")), (predicted, rows)):
            counts, _ = np.histogram([float(row["pred_score"]) for row in shown], np.linspace(0, 1, 51))
            np.testing.assert_allclose(trace["y"], 100 * counts / len(shown))
        assert layout["yaxis"]["range"] == pytest.approx([0, max(2 * max(calibration["y"]), *predicted["y"])])
        ((sequence,), layout) = plots(page)["P-values in order"]
        assert sequence["x"] == list(range(1, len(rows) + 1))
        assert sequence["y"] == [float(row["p_value"]) for row in rows]
        np.testing.assert_allclose(sequence["y"], p_values(raw, table), atol=1.01 / 25)  # a step, by rounding
        shown = re.findall(r"<figcaption>(.*?): score ([\d.]+), p-value ([\d.]+), labelled (\w+)</figcaption>", page)
        assert len(shown) == 12
        oddest = sorted(rows, key=lambda row: -float(row["pred_score"]))[:12]
        assert [float(each[2]) for each in shown] == pytest.approx([float(row["p_value"]) for row in oddest], rel=0.01)
        defective = sum(row["pred_label"] == "1" for row in rows)
        assert f"{len(rows)} images, {defective} labelled defective (score above 0.500)." in page


def test_report_of_predictions_without_calibration_says_so(pictures: Path, calibrated: Path) -> None:
    checkpoint = torch.load(calibrated, weights_only=True)
    config = checkpoint["anomalib_post_processor_config"]
    config.update(calibration_scores=torch.empty(0), calibration_peaks=torch.empty(0))
    torch.save(checkpoint, pictures.parent / "without.ckpt")
    results = predict(pictures.parent / "days", pictures / "test" / "bad" / "000.png", pictures.parent / "without.ckpt")
    page = (results / "report.html").read_text(encoding="utf-8")
    assert "The checkpoint keeps no scores of normal validation images" in page
    assert "Plotly" not in page
    assert len(re.findall(r"<figcaption>bad/000.png: score [\d.]+, labelled \w+</figcaption>", page)) == 1


def test_report_of_20000_predictions_is_small_and_opens_in_a_browser(tmp_path: Path, browser: object) -> None:
    noise = np.random.default_rng(0)
    model, predictions = tiny_model(visualizer=False), Predictions()
    model.post_processor.calibration_scores = torch.linspace(0, 1, 100)
    predictions.table = tmp_path / "predictions.csv"
    with predictions.table.open("w", newline="") as file:
        rows = csv.DictWriter(file, COLUMNS)
        rows.writeheader()
        scores = torch.from_numpy(noise.random(20_000))
        pairs = zip(scores.tolist(), model.post_processor.p_value(scores).tolist(), strict=True)
        for number, (score, p_value) in enumerate(pairs):
            rows.writerow({"image_path": f"line/{number}.png", "pred_score": score, "p_value": p_value})
    trainer = SimpleNamespace(world_size=1, callbacks=[predictions], ckpt_path="model.ckpt")
    tracemalloc.start()
    Report().on_predict_end(trainer, model)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20
    page = tmp_path / "report.html"
    assert page.stat().st_size < 6e6
    ((sequence,), layout) = plots(page.read_text(encoding="utf-8"))["P-values in order"]
    assert (len(sequence["y"]), layout["yaxis"]["title"]["text"]) == (500, "mean p-value of 40 images")
    check_layout(browser, page, 2)
