"""Checks of settings that several recipes share."""

from collections.abc import Sequence

__all__ = ["check_choice"]


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a setting that is not one of its choices.

    Args:
        name: Name of the setting.
        value: Its value.
        choices: What it may be.

    Raises:
        ValueError: If it is something else.
    """
    if value not in choices:
        raise ValueError(
            f"Expected `{name}` to be one of {sorted(choices)}, but got {value!r}. Choose one."
        )
