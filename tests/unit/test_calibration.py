"""Thresholds and p-values from scores of normal images: the rule, what it promises, and what it says."""

import re
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_simplenet.calibration import (
    LARGEST_TABLE,
    CalibratedPostProcessor,
    calibrated,
    guarantee,
    needed_images,
)

FEW = st.integers(-5, 5).map(float)  # so that scores tie
SCORES = st.lists(FEW | st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60)
RATES = st.decimals("0.001", "0.999", places=3).map(float)


def processor_of(scores: object, rate: float | None = None, **settings: object) -> CalibratedPostProcessor:
    processor = calibrated(PostProcessor(**settings), rate)
    processor.calibration_scores = torch.as_tensor(scores, dtype=torch.float32).sort().values
    processor.calibration_peaks = processor.calibration_scores + 1
    for kind in ("image", "pixel"):
        for end, value in (("min", -1e3), ("max", 1e3)):
            getattr(processor, f"{kind}_{end}").fill_(value)
    return processor


@settings(deadline=None)
@given(SCORES, RATES)
def test_threshold_is_the_lowest_that_keeps_the_rate(scores: list[float], rate: float) -> None:
    """Counting the next image among the n + 1, and above the threshold."""
    exact, count = Fraction(str(rate)), len(scores)
    keep = [score for score in scores if sum(other > score for other in scores) + 1 <= exact * (count + 1)]
    processor = processor_of(scores, rate)
    if keep:
        assert processor.image_threshold == min(keep)
        assert processor.pixel_threshold == torch.tensor(min(keep)) + 1
    else:
        with pytest.raises(ValueError, match=f"which needs {needed_images(rate)} normal validation images"):
            processor.image_threshold  # noqa: B018
    assert bool(keep) == (count >= needed_images(rate))


@settings(deadline=None)
@given(SCORES, st.lists(FEW, min_size=1, max_size=5), RATES)
def test_p_value_counts_images_and_is_at_most_the_rate_where_defective(
    scores: list[float], new: list[float], rate: float
) -> None:
    raw, processor = torch.tensor(new), processor_of(scores)
    p_value = processor.p_value(raw)
    counted = [(1 + sum(other >= score for other in scores)) / (len(scores) + 1) for score in new]
    torch.testing.assert_close(p_value, torch.tensor(counted), rtol=1e-6, atol=0)
    if len(scores) >= needed_images(rate):
        defective = raw > processor_of(scores, rate).image_threshold
        exact = [Fraction(1 + sum(other >= score for other in scores), len(scores) + 1) for score in new]
        assert defective.tolist() == [each <= Fraction(str(rate)) for each in exact]


@pytest.mark.parametrize("ties", [False, True])
def test_threshold_keeps_the_rate_on_average_and_as_surely_as_it_says(ties: bool) -> None:
    """Of 3,000 calibrations with 199 images each, whose true rate of false alarms is known."""
    rate, count, trials = 0.05, 199, 3000
    scores = np.random.default_rng(0).random((trials, count))
    if ties:
        scores = np.floor(scores * 30) / 30
    processor, thresholds = processor_of([], rate), np.empty(trials)
    for index, row in enumerate(np.sort(scores)):
        processor.calibration_scores = torch.from_numpy(row)
        thresholds[index] = processor.image_threshold
    alarms = 1 - (np.round(thresholds * 30) + 1) / 30 if ties else 1 - thresholds
    error = 4 * alarms.std() / trials**0.5
    bound = float(re.search(r"95 % sure of at most ([\d.]+) %", guarantee(rate, count))[1]) / 100
    if ties:
        assert alarms.mean() < rate
        assert (alarms <= bound).mean() > 0.95
    else:
        assert abs(alarms.mean() - rate) < error
        assert (alarms <= bound).mean() == pytest.approx(0.95, abs=0.015)


def test_guarantee_says_the_rate_and_its_bound() -> None:
    assert guarantee(0.05, 98) == "98 normal images: at most 5 % false alarms expected; 95 % sure of at most 7.7 %."


def test_sensitivity_of_one_half_leaves_the_threshold_and_others_move_it() -> None:
    normal, raw = torch.arange(-99.0, 100.0), torch.arange(-150.0, 150.0)
    predictions = InferenceBatch(pred_score=raw, anomaly_map=raw.reshape(-1, 1, 1, 1))
    # The 10 % threshold is 80; of the range of 2,000, 0.01 is 20.
    for sensitivity, threshold in ((0.5, 80), (0.51, 60), (0.49, 100)):
        processor = processor_of(normal, 0.1, image_sensitivity=sensitivity, pixel_sensitivity=1 - sensitivity)
        answer = processor(predictions)
        assert raw[answer.pred_label].min() == pytest.approx(threshold, abs=1.01)
        assert raw[answer.pred_mask.flatten()].min() == pytest.approx(80 + 1 + (80 - threshold), abs=1.01)
        assert torch.equal(answer.p_value, processor.p_value(raw))
    assert torch.equal(processor_of(normal, 0.1)(predictions).pred_label, raw > 80)


def test_table_of_many_images_is_thinned_without_lower_p_values_or_thresholds() -> None:
    scores = torch.rand(2 * LARGEST_TABLE + 5001, generator=torch.Generator().manual_seed(0))
    thin, full = validated(scores, 0.01), processor_of(scores, 0.01)
    raw = torch.linspace(0, 1, 500)
    more = thin.p_value(raw) - full.p_value(raw)
    assert len(thin.calibration_scores) <= LARGEST_TABLE
    assert more.min() > -1e-6
    assert more.max() < 5e-4
    assert 0 <= thin.image_threshold - full.image_threshold < 1e-3


def validated(
    scores: torch.Tensor,
    rate: float | None = None,
    processor: CalibratedPostProcessor | None = None,
    world_size: int = 1,
    **fields: object,
) -> CalibratedPostProcessor:
    """A processor after a validation with these scores, twice as high in the anomaly maps."""
    processor = processor or calibrated(PostProcessor(), rate)
    trainer = SimpleNamespace(world_size=world_size, is_global_zero=True, global_rank=0)
    defaults = {"image": torch.zeros(len(scores), 3, 1, 1), "gt_label": torch.zeros(len(scores), dtype=torch.bool)}
    batch = ImageBatch(**{**defaults, **fields}, pred_score=scores, anomaly_map=2 * scores.reshape(-1, 1, 1))
    processor.on_validation_start(trainer, None)
    processor.on_validation_batch_end(trainer, None, batch)
    processor.on_validation_batch_end(trainer, None, batch) if batch.image_path else None  # samplers repeat images
    processor.on_validation_epoch_end(trainer, None)
    return processor


def test_validation_keeps_each_normal_image_once() -> None:
    label, paths = torch.tensor([False, True, False]), ["a.png", "b.png", "c.png"]
    processor = validated(torch.tensor([0.7, 0.9, 0.5]), gt_label=label, image_path=paths)
    assert processor.calibration_scores.tolist() == pytest.approx([0.5, 0.7])
    assert processor.calibration_peaks.tolist() == pytest.approx([1.0, 1.4])


def test_without_masks_and_normal_images_maps_take_the_threshold_of_scores() -> None:
    scores, labels = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([False, False, True])
    processor = validated(scores, gt_label=labels)
    assert (processor.image_threshold, processor.pixel_threshold) == (3.0, 4.0)  # the highest map of a normal image
    processor = validated(100 * scores, processor=processor, gt_label=torch.ones(3, dtype=torch.bool))
    assert processor.pixel_threshold == processor.image_threshold == 100


def test_masks_in_another_process_leave_the_pixel_threshold_to_anomalib(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(parts: list, own: tuple[dict, bool]) -> None:
        parts[:] = [own, ({"another.png": (0.5, 9.0)}, True)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    processor = validated(torch.tensor([1.0, 2.0, 3.0]), world_size=2, gt_label=torch.tensor([False, False, True]))
    assert processor.calibration_scores.tolist() == [0.5, 1.0, 2.0]
    assert processor.pixel_threshold == processor.image_threshold


def test_validation_with_a_rate_says_what_it_is_good_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    scores = torch.rand(40)
    for given_scores, labels, said in (
        (scores, torch.zeros(40, dtype=torch.bool), guarantee(0.1, 40)),
        (scores, torch.ones(40, dtype=torch.bool), "needs 9 normal validation images, and there are none: train with"),
        (torch.ones(40), torch.zeros(40, dtype=torch.bool), "All 40 normal validation images score 1: check them"),
    ):
        caplog.clear()
        validated(given_scores, 0.1, gt_label=labels)
        assert said in caplog.text


def test_validation_with_equal_scores_labels_what_is_higher() -> None:
    answer = validated(torch.ones(40), 0.1)(InferenceBatch(torch.tensor([1.0, 1.1]), None, torch.ones(2, 1, 1), None))
    assert answer.pred_label.tolist() == [False, True]
    assert answer.p_value.tolist() == pytest.approx([1, 1 / 41])


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan")])
def test_rate_out_of_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=f"false_alarm_rate is {rate}, expected a finite number above 0 and below 1"):
        calibrated(PostProcessor(), rate)


def test_rate_without_a_processor_that_can_keep_it_is_refused() -> None:
    with pytest.raises(ValueError, match="post_processor is None, expected anomalib's PostProcessor"):
        calibrated(None, 0.1)
    with pytest.raises(ValueError, match="enable_normalization is false: set it to true"):
        processor_of(torch.rand(40), 0.1, enable_normalization=False).check_rate()
