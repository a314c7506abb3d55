"""The settings of one solve, and the two named sets of them.

A preset is nothing but keyword values of the same few functions; no code branches on its name.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, get_args

__all__ = [
    "PRESETS",
    "EngineName",
    "LabelRule",
    "Preset",
    "PresetName",
    "ScoreSpace",
    "WeightRule",
    "make_preset",
]

ScoreSpace = Literal["log_probs", "probs", "logits"]
LabelRule = Literal["auto", "softmax", "argmax", "keep"]
WeightRule = Literal["sigmoid", "expected", "sum", "positive", "ones"]
EngineName = Literal["finite_difference", "forward_mode", "head"]
PresetName = Literal["robust", "paper"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "score_space": get_args(ScoreSpace),
    "label_rule": get_args(LabelRule),
    "weight_rule": get_args(WeightRule),
    "engine": get_args(EngineName),
}


@dataclass(frozen=True)
class Preset:
    r"""Hold every setting of the solve; the defaults are the preset ``"robust"``.

    Attributes:
        score_space: What the gradient inner products differentiate: ``"log_probs"`` (what the
            derivation from Eq. 7 asks for), ``"probs"`` (the f of section 2 and Algorithm 1) or
            ``"logits"`` (Notation 1).
        normalize: Centre the scores' tangent over the augmented rows of all ranks, then divide the
            inner products by the root mean square of their entries.
        label_rule: ``"softmax"`` (Algorithm 1, line 4), ``"argmax"`` (Theorem 1), ``"keep"`` (the
            upstream label), ``"auto"`` (softmax for more than two classes, else keep).
        label_penalty: beta, in [0, inf), in units of the inner products; favours the upstream
            label.
        temperature: tau, in (0, inf), in units of the inner products.
        gumbel: Add standard Gumbel noise inside the label rule.
        weight_rule: ``"sigmoid"`` of the upstream label's inner product with classes renormalised,
            ``"expected"`` (Algorithm 1, line 5: keep where :math:`\Pi_i \cdot y_i \ge 0`),
            ``"sum"`` (Theorem 1: keep where :math:`\sum_k \Pi_{ik} \ge 0`), ``"positive"`` (in
            proportion to the positive part of the upstream label's inner product, as in learning
            to reweight) or ``"ones"``.
        gradient_decay: Decay of the running average of the validation gradient, per training
            batch, in [0, 1); 0 uses the newest gradient alone.
        precondition: Divide the validation gradient by the square root of Adam's second moment,
            once an Adam-like optimizer has taken a step.
        engine: How the scores' tangent is computed; see ``engines/README.md``.
        refresh_every_n_steps: Training batches between two validation gradients, at least 1.
        val_batch_ratio: Rows of a validation batch for each row of a training batch, in (0, inf).
    """

    score_space: ScoreSpace = "log_probs"
    normalize: bool = True
    label_rule: LabelRule = "auto"
    label_penalty: float = 8.0
    temperature: float = 2.0
    gumbel: bool = False
    weight_rule: WeightRule = "sigmoid"
    gradient_decay: float = 0.97
    precondition: bool = True
    engine: EngineName = "finite_difference"
    refresh_every_n_steps: int = 4
    val_batch_ratio: float = 0.25

    def __post_init__(self) -> None:
        problems = [
            _expected(name, "one of " + ", ".join(sorted(choices)), getattr(self, name))
            for name, choices in _CHOICES.items()
            if getattr(self, name) not in choices
        ]
        problems += [
            _expected(name, "True or False", getattr(self, name))
            for name in ("normalize", "gumbel", "precondition")
            if not isinstance(getattr(self, name), bool)
        ]
        for name, wanted, accepts in _RANGES:
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (is_number and math.isfinite(value) and accepts(value)):
                problems.append(_expected(name, wanted, value))
        if problems:
            raise ValueError(" ".join(problems))


_RANGES = (
    ("label_penalty", "a non-negative float", lambda value: value >= 0),
    ("temperature", "a positive float", lambda value: value > 0),
    ("gradient_decay", "a float in [0, 1)", lambda value: 0 <= value < 1),
    (
        "refresh_every_n_steps",
        "a positive integer",
        lambda value: isinstance(value, int) and value > 0,
    ),
    ("val_batch_ratio", "a positive float", lambda value: value > 0),
)

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "robust": Preset(),
        "paper": Preset(
            normalize=False,
            label_rule="softmax",
            label_penalty=0.0,
            temperature=0.01,
            gumbel=True,
            weight_rule="expected",
            gradient_decay=0.0,
            precondition=False,
            engine="forward_mode",
            refresh_every_n_steps=1,
            val_batch_ratio=1.0,
        ),
    }
)


def make_preset(name: PresetName, **overrides: Any) -> Preset:
    """Return the named preset with some of its values replaced.

    Args:
        name: ``"robust"`` or ``"paper"``.
        **overrides: Values for fields of `Preset`; None keeps the preset's value.

    Returns:
        The settings, checked.

    Raises:
        ValueError: If the name or a value is outside its range.
        TypeError: If an override is not a field of `Preset`.

    Example:
        >>> make_preset("paper", temperature=0.1).temperature
        0.1
    """
    if name not in PRESETS:
        raise ValueError(_expected("preset", "one of " + ", ".join(sorted(PRESETS)), name))
    unknown = sorted(set(overrides) - {field.name for field in fields(Preset)})
    if unknown:
        raise TypeError(f"Expected fields of `Preset`, but got {unknown}. Remove them.")
    given = {key: value for key, value in overrides.items() if value is not None}
    return replace(PRESETS[name], **given)


def _expected(name: str, wanted: str, found: object) -> str:
    return f"Expected `{name}` to be {wanted}, but got {found!r}. Change `{name}`."
