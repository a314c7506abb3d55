"""The presets hold the values of the design's table, and wrong values are named."""

import inspect
from dataclasses import FrozenInstanceError, asdict, fields
from typing import get_type_hints

import pytest

from saflex_lightning.functional import Settings, make_settings, solve
from saflex_lightning.functional.settings import PRESETS, SettingsKwargs

COMMON = {
    "params": None,
    "score_space": "log_probs",
    "val_batch_size": None,
    "every_n_steps": 1,
    "start_epoch": 0,
    "measure_overhead": False,
    "seed": None,
}
ROBUST = {
    **COMMON,
    "engine": "auto",
    "normalize": True,
    "label_rule": "keep",
    "label_penalty": 8.0,
    "temperature": 2.0,
    "gumbel": False,
    "weight_rule": "ones",
    "gradient_decay": 0.97,
    "precondition": True,
    "refresh_every_n_steps": 4,
    "val_batch_ratio": 0.25,
    "row_evidence": True,
}
GRADIENT = {
    **ROBUST,
    "label_rule": "auto",
    "weight_rule": "sigmoid",
    "row_evidence": False,
}
PAPER = {
    **COMMON,
    "engine": "forward_mode",
    "normalize": False,
    "label_rule": "softmax",
    "label_penalty": 0.0,
    "temperature": 0.01,
    "gumbel": True,
    "weight_rule": "expected",
    "gradient_decay": 0.0,
    "precondition": False,
    "refresh_every_n_steps": 1,
    "val_batch_ratio": 1.0,
    "row_evidence": False,
}


def test_presets_hold_the_values_of_the_design() -> None:
    assert asdict(PRESETS["robust"]) == ROBUST
    assert asdict(PRESETS["gradient"]) == GRADIENT
    assert asdict(PRESETS["paper"]) == PAPER
    assert set(PRESETS) == {"robust", "gradient", "paper"}


def test_settings_without_arguments_are_robust() -> None:
    assert Settings() == PRESETS["robust"] == make_settings()


def test_what_a_preset_learns_follows_from_its_values() -> None:
    assert not PRESETS["robust"].solves
    assert PRESETS["gradient"].solves
    assert PRESETS["paper"].solves
    assert make_settings("robust", label_rule="argmax").solves


def test_solve_learns_without_settings() -> None:
    assert inspect.signature(solve).parameters["settings"].default == PRESETS["gradient"]


def test_every_field_is_a_keyword_that_may_be_none() -> None:
    found, wanted = get_type_hints(SettingsKwargs), get_type_hints(Settings)
    assert found == {name: wanted[name] | None for name in wanted}
    assert list(found) == [field.name for field in fields(Settings)]


def test_settings_are_keywords_only() -> None:
    with pytest.raises(TypeError, match="positional"):
        Settings("head")  # type: ignore[misc]


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["paper"].temperature = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        PRESETS["paper"] = Settings()  # type: ignore[index]


def test_overrides_replace_values_and_none_keeps_them() -> None:
    settings = make_settings("paper", temperature=0.5, label_penalty=None, engine="head")
    assert asdict(settings) == {**PAPER, "temperature": 0.5, "engine": "head"}


@pytest.mark.parametrize(
    "edge",
    [
        {"label_penalty": 0.0},
        {"gradient_decay": 0.0},
        {"refresh_every_n_steps": 1},
        {"temperature": 1e-6},
        {"every_n_steps": 1, "start_epoch": 0, "val_batch_size": 1, "seed": 0},
        {"label_penalty": 8, "temperature": 1},  # YAML reads whole numbers as int
    ],
    ids=str,
)
def test_edges_of_the_ranges_are_accepted(edge) -> None:
    assert {**ROBUST, **edge} == asdict(make_settings("robust", **edge))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("score_space", "probabilities", "one of log_probs, logits, probs"),
        ("label_rule", "hard", "one of argmax, auto, keep, softmax"),
        ("weight_rule", "relu", "one of expected, ones, positive, sigmoid, sum"),
        ("engine", "jvp", "one of auto, finite_difference, forward_mode, head"),
        ("normalize", 1, "True or False"),
        ("gumbel", "on", "True or False"),
        ("precondition", 0.0, "True or False"),
        ("label_penalty", -1.0, "a non-negative float"),
        ("label_penalty", float("nan"), "a non-negative float"),
        ("label_penalty", float("inf"), "a non-negative float"),
        ("label_penalty", "8", "a non-negative float"),
        ("temperature", 0.0, "a positive float"),
        ("temperature", True, "a positive float"),
        ("gradient_decay", 1.0, "a float in [0, 1)"),
        ("gradient_decay", -0.1, "a float in [0, 1)"),
        ("refresh_every_n_steps", 0, "an integer of at least 1"),
        ("refresh_every_n_steps", 2.0, "an integer of at least 1"),
        ("every_n_steps", 0, "an integer of at least 1"),
        ("every_n_steps", True, "an integer of at least 1"),
        ("start_epoch", -1, "an integer of at least 0"),
        ("val_batch_size", 0, "an integer of at least 1 or None"),
        ("seed", -1, "an integer of at least 0 or None"),
        ("params", [], "a list of one or more name patterns, or None"),
        ("params", "head.*", "a list of one or more name patterns, or None"),
        ("params", ["head.*", 1], "a list of one or more name patterns, or None"),
        ("gumbel", 1, "True or False"),
        ("row_evidence", "discriminant", "True or False"),
        ("measure_overhead", 1, "True or False"),
        ("val_batch_ratio", 0.0, "a positive float"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(name, value, wanted) -> None:
    with pytest.raises(ValueError, match="Expected") as caught:
        make_settings("gradient", **{name: value})
    assert str(caught.value) == (
        f"Expected `{name}` to be {wanted}, but got {value!r}. Change `{name}`."
    )


def test_all_wrong_values_are_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"`engine`.*`normalize`.*`temperature`"):
        Settings(temperature=-1.0, engine="jvp", normalize=None)  # type: ignore[arg-type]


def test_what_is_not_refined_from_the_first_step_is_not_measured() -> None:
    with pytest.raises(ValueError, match="`start_epoch` to be 0 beside `measure_overhead`"):
        Settings(measure_overhead=True, start_epoch=1)


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="one of gradient, paper, robust, but got 'fast'"):
        make_settings("fast")  # type: ignore[arg-type]


def test_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"settings among engine, .*, but got alpha, beta\. Corr"):
        make_settings("paper", beta=1.0, alpha=None)
