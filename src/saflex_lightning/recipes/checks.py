"""Checks of settings, before anything is read: what was expected, what was found, what to do."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

__all__ = [
    "check_choice",
    "check_flags",
    "check_integers",
    "check_list",
    "check_mapping",
    "check_names",
    "check_number",
    "check_paths",
    "check_share",
]


def check_integers(least: int, *, optional: bool = False, **values: Any) -> None:
    """Refuse what is no integer or below ``least``, 0 or 1; a bool is none."""
    wanted = {0: "a non-negative integer", 1: "a positive integer"}[least]
    wanted += " or None" * optional
    for name, value in values.items():
        is_integer = not isinstance(value, bool) and isinstance(value, Integral)
        if not (optional and value is None) and (not is_integer or value < least):
            advice = f"Pass {least} or more."
            _refuse(name, wanted, value, advice, is_type=not is_integer)


def check_number(
    name: str, value: Any, wanted: str, accepts: Callable[[float], bool], advice: str
) -> None:
    """Refuse what is no finite number, or one that ``accepts`` denies."""
    is_number = not isinstance(value, bool) and isinstance(value, Real)
    if not is_number or not math.isfinite(value) or not accepts(float(value)):
        _refuse(name, wanted, value, advice, is_type=not is_number)


def check_share(name: str, value: Any) -> None:
    """Refuse what is no share that leaves both parts something."""
    wanted = "a number between 0 and 1, both excluded"
    check_number(name, value, wanted, lambda share: 0 < share < 1, "Pass 0.2 for a fifth.")


def check_flags(**values: Any) -> None:
    """Refuse what is neither True nor False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            _refuse(name, "True or False", value, "Pass one of them.", is_type=True)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is none of the choices."""
    if not isinstance(value, str) or value not in choices:
        _refuse(name, f"one of {sorted(choices)}", value, "Choose one.")


def check_paths(**values: Any) -> None:
    """Refuse what is no path; None is left to who needs one."""
    for name, value in values.items():
        if value is not None and not isinstance(value, (str, PathLike)):
            _refuse(name, "a path", value, "Pass it as text.", is_type=True)


def check_list(least: int, **values: Any) -> None:
    """Refuse what is no list of integers of at least ``least``; None is left to who needs one."""
    for name, value in values.items():
        if value is not None and not _is_list(value):
            _refuse(name, "a list of integers", value, "Pass a list, also for one.", is_type=True)
        for place, entry in enumerate(value or ()):
            check_integers(least, **{f"{name}[{place}]": entry})


def check_names(**values: Any) -> None:
    """Refuse what is no list of names; None is left to who needs one."""
    for name, value in values.items():
        if value is not None and not (_is_list(value) and all(isinstance(x, str) for x in value)):
            _refuse(name, "a list of names", value, "Pass a list, also for one.", is_type=True)


def check_mapping(name: str, value: Any) -> None:
    """Refuse what is no mapping of names to values; None stands for an empty one."""
    is_mapping = isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if value is not None and not is_mapping:
        _refuse(name, "a mapping of names to values", value, "Pass {} for none.", is_type=True)


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))


def _refuse(name: str, wanted: str, found: Any, advice: str, *, is_type: bool = False) -> None:
    error = TypeError if is_type else ValueError
    raise error(f"Expected `{name}` to be {wanted}, but got {found!r}. {advice}")
