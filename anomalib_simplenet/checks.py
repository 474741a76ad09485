"""Range checks of arguments, written once."""

import math
from numbers import Integral, Real
from typing import Any

import torch
from anomalib.data import Batch


def check_number(
    name: str,
    value: Any,  # noqa: ANN401
    *,
    above: float | None = None,
    below: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    integer: bool = False,
    hint: str = "",
) -> None:
    """Refuse an argument that is no finite number in its range; NumPy's scalars are numbers, ``bool`` is not.

    ``hint`` ends the message, such as ``"(the paper's value is 0.5)"``.

    Raises:
        ValueError: If the value is outside; the message names argument, value and range.

    Example:
        >>> check_number("margin", 0.5, above=0)
        >>> check_number("patch_size", 0, at_least=1, integer=True)
        Traceback (most recent call last):
        ValueError: patch_size is 0, expected an integer of at least 1.
    """
    is_number = isinstance(value, Integral if integer else Real) and not isinstance(value, bool)
    lowest, highest = -math.inf if at_least is None else at_least, math.inf if at_most is None else at_most
    lower, upper = -math.inf if above is None else above, math.inf if below is None else below
    if is_number and lowest <= value <= highest and lower < value < upper:
        return
    bounds = [("above", above), ("below", below), ("of at least", at_least), ("of at most", at_most)]
    limits = " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)
    expected = " ".join(filter(None, ["an integer" if integer else "a finite number", limits, hint]))
    msg = f"{name} is {value!r}, expected {expected}."
    raise ValueError(msg)


def check_finite(batch: Batch, values: torch.Tensor, problem: str) -> None:
    """Refuse a batch with ``values``, a row for each image, that are NaN or infinite; a ``ValueError`` names them."""
    finite = values.isfinite().flatten(1).all(dim=1) if values.ndim > 1 else values.isfinite()
    if not finite.all():
        paths = batch.image_path or range(len(finite))
        names = ", ".join(str(path) for path, good in zip(paths, finite.tolist(), strict=True) if not good)
        msg = f"Of {names} {problem}."
        raise ValueError(msg)
