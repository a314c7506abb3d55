"""Checks of settings, before anything is read: what was expected, what was found, what to do."""

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any, Literal, NamedTuple

from torch import Tensor

__all__ = ["check"]

Wanted = Literal[
    "a function",
    "a list of names",
    "a list of numbers in [0, 1]",
    "a list of positive integers",
    "a mapping of names to values",
    "a name",
    "a non-negative integer",
    "a non-negative integer below 2**32",
    "a non-negative number",
    "a number between 0 and 1, both excluded",
    "a number in (0, 1]",
    "a number in [0, 255]",
    "a number in [0, 1)",
    "a path",
    "a positive integer",
    "a positive number",
    "a tensor of floats, (rows, features)",
    "a tensor of integers, (rows,)",
    "True or False",
]


def check(wanted: Wanted | tuple[str, ...], *, optional: bool = False, **values: Any) -> None:
    """Refuse values that are not what is wanted, in words or as a tuple of names to choose from.

    Args:
        wanted: What is wanted.
        optional: Whether None is fine too.
        **values: Settings by their names.

    Raises:
        TypeError: If a value is of another type.
        ValueError: If it is out of range.
    """
    if isinstance(wanted, tuple):
        words, advice = f"one of {sorted(wanted)}", "Choose one."
        is_type, accepts = _is_name, wanted.__contains__
    else:
        words, (is_type, accepts, advice) = wanted, _KINDS[wanted]
    for name, value in values.items():
        if optional and value is None:
            continue
        fits = is_type(value)
        if not fits or not accepts(value):
            error = ValueError if fits else TypeError
            words += " or None" * optional
            raise error(f"Expected `{name}` to be {words}, but got {value!r:.200}. {advice}")


class _Kind(NamedTuple):
    """The type and the range of what is wanted, and what to do about anything else."""

    is_type: Callable[[Any], bool]
    accepts: Callable[[Any], bool]
    advice: str


def _is_name(value: Any) -> bool:
    return isinstance(value, str)


def _is_integer(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Integral)


def _is_number(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real)


def _is_list(value: Any, is_entry: Callable[[Any], bool]) -> bool:
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and all(map(is_entry, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_name, value))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _number(accepts: Callable[[float], bool], advice: str) -> _Kind:
    return _Kind(_is_number, lambda value: abs(value) < math.inf and accepts(value), advice)


def _any(value: Any) -> bool:
    return True


_KINDS: Mapping[str, _Kind] = {
    "a function": _Kind(callable, _any, "Pass something that can be called."),
    "a list of names": _Kind(
        lambda value: _is_list(value, _is_name),
        _any,
        "Pass a list, also for one; names that are numbers are quoted.",
    ),
    "a list of numbers in [0, 1]": _Kind(
        lambda value: _is_list(value, _is_number),
        lambda value: bool(value) and all(0 <= number <= 1 for number in value),
        "Pass one or more.",
    ),
    "a list of positive integers": _Kind(
        lambda value: _is_list(value, _is_integer),
        lambda value: all(number > 0 for number in value),
        "Pass a list, also for one.",
    ),
    "a mapping of names to values": _Kind(_is_mapping, _any, "Pass {} for none."),
    "a name": _Kind(_is_name, bool, "Pass it as text."),
    "a non-negative integer": _Kind(_is_integer, lambda n: n >= 0, "Pass 0 or more."),
    "a non-negative integer below 2**32": _Kind(
        _is_integer, lambda n: 0 <= n < 2**32, "Pass 0, for instance."
    ),
    "a non-negative number": _number(lambda x: x >= 0, "Pass 0.0 for none."),
    "a number between 0 and 1, both excluded": _number(
        lambda x: 0 < x < 1, "Pass 0.2 for a fifth."
    ),
    "a number in (0, 1]": _number(lambda x: 0 < x <= 1, "Pass 1.0 for all."),
    "a number in [0, 1)": _number(lambda x: 0 <= x < 1, "Pass 0.0 for none."),
    "a number in [0, 255]": _number(lambda x: 0 <= x <= 255, "Pass a shade of 8 bits."),
    "a path": _Kind(lambda value: isinstance(value, (str, PathLike)), bool, "Pass it as text."),
    "a positive integer": _Kind(_is_integer, lambda n: n > 0, "Pass 1 or more."),
    "a positive number": _number(lambda x: x > 0, "Pass 1.0, for instance."),
    "a tensor of floats, (rows, features)": _Kind(
        _is_tensor, lambda x: x.ndim == 2 and x.is_floating_point(), "Pass one row per sample."
    ),
    "a tensor of integers, (rows,)": _Kind(
        _is_tensor,
        lambda x: x.ndim == 1 and not x.is_floating_point() and not x.is_complex(),
        "Pass one per row.",
    ),
    "True or False": _Kind(lambda value: isinstance(value, bool), _any, "Pass one of them."),
}
