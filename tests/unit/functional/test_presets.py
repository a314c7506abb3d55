"""The two presets hold the values of the design's table, and wrong values are named."""

import inspect
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from saflex_lightning.functional import PRESETS, Preset, make_preset, solve

ROBUST = {
    "score_space": "log_probs",
    "normalize": True,
    "label_rule": "auto",
    "label_penalty": 8.0,
    "temperature": 2.0,
    "gumbel": False,
    "weight_rule": "sigmoid",
    "gradient_decay": 0.97,
    "precondition": True,
    "engine": "finite_difference",
    "refresh_every_n_steps": 4,
    "val_batch_ratio": 0.25,
}
PAPER = {
    "score_space": "log_probs",
    "normalize": False,
    "label_rule": "softmax",
    "label_penalty": 0.0,
    "temperature": 0.01,
    "gumbel": True,
    "weight_rule": "expected",
    "gradient_decay": 0.0,
    "precondition": False,
    "engine": "forward_mode",
    "refresh_every_n_steps": 1,
    "val_batch_ratio": 1.0,
}


def test_presets_hold_the_values_of_the_design() -> None:
    assert asdict(PRESETS["robust"]) == ROBUST
    assert asdict(PRESETS["paper"]) == PAPER
    assert set(PRESETS) == {"robust", "paper"}


def test_preset_without_arguments_is_robust() -> None:
    assert Preset() == PRESETS["robust"]


def test_defaults_of_solve_are_the_fields_of_preset() -> None:
    preset = Preset()
    shared = {field.name for field in fields(Preset)} & set(inspect.signature(solve).parameters)
    assert shared == {
        "score_space",
        "normalize",
        "label_rule",
        "label_penalty",
        "temperature",
        "gumbel",
        "weight_rule",
    }
    for name in shared:
        assert inspect.signature(solve).parameters[name].default == getattr(preset, name), name


def test_presets_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        PRESETS["paper"].temperature = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        PRESETS["paper"] = Preset()  # type: ignore[index]


def test_overrides_replace_values_and_none_keeps_them() -> None:
    preset = make_preset("paper", temperature=0.5, label_penalty=None, engine="head")
    assert asdict(preset) == {**PAPER, "temperature": 0.5, "engine": "head"}


@pytest.mark.parametrize(
    "edge",
    [
        {"label_penalty": 0.0},
        {"gradient_decay": 0.0},
        {"refresh_every_n_steps": 1},
        {"temperature": 1e-6},
        {"label_penalty": 8, "temperature": 1},  # YAML reads whole numbers as int
    ],
    ids=str,
)
def test_edges_of_the_ranges_are_accepted(edge) -> None:
    assert {**ROBUST, **edge} == asdict(make_preset("robust", **edge))


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("score_space", "probabilities", "one of log_probs, logits, probs"),
        ("label_rule", "hard", "one of argmax, auto, keep, softmax"),
        ("weight_rule", "relu", "one of expected, ones, positive, sigmoid, sum"),
        ("engine", "jvp", "one of finite_difference, forward_mode, head"),
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
        ("refresh_every_n_steps", 0, "a positive integer"),
        ("refresh_every_n_steps", 2.0, "a positive integer"),
        ("val_batch_ratio", 0.0, "a positive float"),
    ],
)
def test_wrong_values_are_named_with_what_was_expected(name, value, wanted) -> None:
    with pytest.raises(ValueError, match="Expected") as caught:
        make_preset("robust", **{name: value})
    assert str(caught.value) == (
        f"Expected `{name}` to be {wanted}, but got {value!r}. Change `{name}`."
    )


def test_all_wrong_values_are_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"`engine`.*`normalize`.*`temperature`"):
        Preset(temperature=-1.0, engine="jvp", normalize=None)  # type: ignore[arg-type]


def test_unknown_preset_is_named() -> None:
    with pytest.raises(ValueError, match="`preset` to be one of paper, robust, but got 'fast'"):
        make_preset("fast")  # type: ignore[arg-type]


def test_unknown_field_is_named() -> None:
    with pytest.raises(TypeError, match=r"fields of `Preset`, but got \['beta'\]"):
        make_preset("paper", beta=1.0)
