"""Arguments of the wrong type are refused by name, from Python as from the command line."""

import math
from collections.abc import Callable, Collection, Mapping
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def check_types(function: Callable, arguments: Mapping[str, Any], leave_out: Collection[str] = ()) -> None:
    """Compare arguments with a function's annotations.

    Args:
        function (Callable): Annotated with ``bool``, ``int``, ``float`` (finite, or an ``int``), ``None``, ``Literal``,
            sequences of these, and unions of these.
        arguments (Mapping[str, Any]): Its arguments, by name.
        leave_out (Collection[str]): Names not to check.

    Raises:
        ValueError: If an argument has another type.
    """
    for name, hint in get_type_hints(function).items():
        if name in arguments and name not in leave_out and not _fits(arguments[name], hint):
            *others, last = _names(hint)
            expected = f"{', '.join(others)} or {last}" if others else last
            msg = f"{name} is {arguments[name]!r}, expected {expected}."
            raise ValueError(msg)


def _fits(value: Any, hint: Any) -> bool:  # noqa: ANN401
    kind, parts = get_origin(hint), get_args(hint)
    if kind in {Union, UnionType}:
        return any(_fits(value, part) for part in parts)
    if kind is Literal:
        return isinstance(value, str) and value in parts
    if kind is not None:
        return isinstance(value, kind) and not isinstance(value, str) and all(_fits(item, parts[0]) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _names(hint: Any) -> list[str]:  # noqa: ANN401
    kind, parts = get_origin(hint), get_args(hint)
    if kind in {Union, UnionType}:
        return [name for part in parts for name in _names(part)]
    if kind is Literal:
        return [repr(part) for part in parts]
    if kind is not None:
        return ["a list of strings"]
    return {bool: ["True", "False"], int: ["an integer"], float: ["a finite number"]}.get(hint, ["None"])
