"""The settings of the callback: checked, and said in one line."""

from collections.abc import Collection

from .functional import PRESETS, Preset

__all__ = ["check_choice", "check_integers", "describe_settings"]


def check_integers(**settings: tuple[int | None, int]) -> None:
    """Refuse settings that are too small, or no integers.

    Args:
        **settings: The value, None where it is left open, and the least one, by name.

    Raises:
        ValueError: If one does not fit.
    """
    for name, (value, least) in settings.items():
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(
                f"Expected `{name}` to be an integer of at least {least}, but got {value!r}. "
                f"Change `{name}`."
            )


def check_choice(name: str, value: object, choices: Collection[object], wanted: str) -> None:
    """Refuse a setting that is none of its choices.

    Args:
        name: Of the setting.
        value: What it is.
        choices: What it may be.
        wanted: The choices in words.

    Raises:
        ValueError: If it is something else.
    """
    if value not in choices:
        raise ValueError(f"Expected `{name}` to be {wanted}, but got {value!r}. Choose one.")


def describe_settings(name: str, preset: Preset, *, gates: bool, row_evidence: str | None) -> str:
    """Return what a fit with these settings will learn, in one line.

    Args:
        name: Of the preset that the settings began with.
        preset: The settings.
        gates: Whether groups are gated.
        row_evidence: What is gathered about rows of a pool; None if nothing is.

    Returns:
        Two or three sentences.
    """
    learned = [
        what
        for what, is_learned in (
            ("sample weights", preset.weight_rule != "ones"),
            ("soft labels", preset.label_rule != "keep"),
            ("gates", gates),
            ("weights of pool rows", row_evidence is not None),
        )
        if is_learned
    ]
    letter = (
        "This is Algorithm 1 of the paper."
        if preset == PRESETS["paper"]
        else "Algorithm 1 to the letter: SAflexCallback(preset='paper')."
    )
    interval = preset.refresh_every_n_steps
    return (
        f"SAFLEX: preset '{name}' learns {' and '.join(learned) or 'nothing'} "
        f"with engine '{preset.engine}' and a validation gradient "
        f"{'every' if interval == 1 else f'every {interval}'} training "
        f"{'batch' if interval == 1 else 'batches'}. {letter}"
    )
