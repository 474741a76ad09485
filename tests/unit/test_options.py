"""Every argument with every kind of value: it works, or is refused in a sentence that names argument and value."""

from inspect import signature

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentError, ArgumentParser

from anomalib_simplenet import SimpleNet, SimpleNetModel
from tests.integration.conftest import FULL_TRIALS, TINY

COMPONENTS = ("backbone", "pre_processor", "post_processor", "evaluator", "visualizer", "architecture")
ALL = (*signature(SimpleNet).parameters, *signature(SimpleNetModel).parameters)
NAMES = [name for name in ALL if name not in COMPONENTS]
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.floats(-10, 10),
    st.text(max_size=4),
    st.lists(st.one_of(st.integers(0, 3), st.sampled_from(["layer1", "layer2", "layer9"])), max_size=3),
)

MANY = settings(
    max_examples=200 if FULL_TRIALS else 10,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.trial
@pytest.mark.parametrize("name", NAMES)
@MANY
@example(None).via("often forgotten")
@example(0).via("often forgotten")
@example(-1).via("often forgotten")
@example(float("nan")).via("often forgotten")
@example(float("inf")).via("often forgotten")
@example("x").via("often forgotten")
@example([]).via("often forgotten")
@given(value=VALUES)
def test_model_takes_a_value_or_refuses_it_by_name(name: str, value: object) -> None:
    refusal = None
    try:
        model = SimpleNet(**{**TINY, name: value})
    except (ValueError, TypeError) as error:
        refusal = str(error)
    if refusal is not None:
        assert name in refusal
        shown = [repr(value), str(value), *map(str, value if isinstance(value, list) else [])]
        assert any(text in refusal for text in shown)
        return
    if name == "pre_trained" and value:  # no hub at hand
        return
    assert_trains_and_predicts(model)


def assert_trains_and_predicts(model: SimpleNet) -> None:
    loss = model.loss(*model.model.train()(torch.rand(2, 3, 64, 64)))
    loss.backward()
    model.configure_optimizers().step()
    scores = model.model.eval()(torch.rand(2, 3, 64, 64)).pred_score
    assert torch.isfinite(scores).all()


@pytest.mark.trial
@pytest.mark.parametrize("name", NAMES)
@MANY
@example("x").via("often forgotten")
@example("nan").via("often forgotten")
@example("").via("often forgotten")
@given(text=st.one_of(VALUES.map(str), st.text("[]{}:-,.1eax", max_size=5)))
def test_command_line_takes_a_word_or_refuses_it_by_name(name: str, text: str) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(SimpleNet, skip={*COMPONENTS})
    model, refusal = None, name
    try:
        value = parser.parse_args([f"--{name}={text}"])[name]
        model = SimpleNet(**{**TINY, name: value})
    except (ArgumentError, ValueError) as error:
        refusal = str(error)
    assert name in refusal
    if model is not None and not (name == "pre_trained" and value):  # no hub at hand
        assert_trains_and_predicts(model)
