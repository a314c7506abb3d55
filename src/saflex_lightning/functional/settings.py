"""Every setting of a run, in one place, and the named sets of them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypedDict, cast, get_args, get_type_hints

__all__ = [
    "PRESETS",
    "EngineName",
    "LabelRule",
    "PresetName",
    "ScoreSpace",
    "Settings",
    "SettingsKwargs",
    "WeightRule",
    "make_settings",
]

ScoreSpace = Literal["log_probs", "probs", "logits"]
LabelRule = Literal["auto", "softmax", "argmax", "keep"]
WeightRule = Literal["sigmoid", "expected", "sum", "positive", "ones"]
EngineName = Literal["auto", "head", "forward_mode", "finite_difference"]
PresetName = Literal["robust", "gradient", "paper"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    r"""Hold every setting; the defaults are the preset ``"robust"``.

    A preset is nothing but values of these; no code branches on its name. ``"robust"`` weighs rows
    by evidence; ``"gradient"`` learns weights and soft labels from the gradient inner products of
    each step, and is the one for contrastive scores; ``"paper"`` is Algorithm 1.

    Args:
        engine: How the scores' derivative is computed: ``"head"`` (the last linear layer, in
            closed form), ``"forward_mode"`` (exact, all parameters), ``"finite_difference"``
            (first order, all parameters), or ``"auto"``: ``"head"`` where a linear layer makes the
            scores, else ``"forward_mode"`` for the layer that makes them, and for tuples of scores
            for all parameters. Without effect, which is said, where nothing is learned from
            gradients; so is ``params``.
        params: Name patterns of the parameters to match, such as ``"head.*"``; None leaves the
            choice to the engine, among those that an optimizer holds. Each new gradient looks
            anew, so fine-tuning schedules may freeze and unfreeze.
        score_space: What the gradient inner products differentiate: ``"log_probs"`` (what the
            derivation from Eq. 7 asks for), ``"probs"`` (the f of section 2 and Algorithm 1) or
            ``"logits"`` (Notation 1).
        normalize: Centre the scores' derivative over the augmented rows of all ranks, then divide
            the inner products by the root mean square of their entries.
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
        refresh_every_n_steps: Training batches between two validation gradients, at least 1.
        val_batch_ratio: Rows of a validation batch for each row of a training batch, in (0, inf).
        val_batch_size: Rows of a validation batch and process; None takes ``val_batch_ratio`` of
            the first training batch, at most the rows there are.
        every_n_steps: Refine one of so many training batches; the others are trained plainly.
        start_epoch: First epoch to refine, from 0.
        row_evidence: Weigh augmented rows by how well their label fits their scores, judged by
            validation rows and averaged over epochs where `AugmentedBatch.index` tells rows apart,
            with the share of wrong labels and an offset learned per group of
            `AugmentedBatch.group`. Needs class labels.
        measure_overhead: Train the first eight blocks of a run (of 13 steps with the other
            defaults) refined and plainly in turn, time their steps, and log
            ``saflex/overhead_ratio``, the median refined block over the median plain one: 1.08 is
            8 % longer. Loading data is not in it. Needs ``start_epoch=0``.
        seed: Seed of the order of validation rows and of Gumbel noise; None follows
            ``seed_everything``.

    Raises:
        ValueError: If a setting is out of its range; the message lists all that are.
    """

    engine: EngineName = "auto"
    params: list[str] | None = None
    score_space: ScoreSpace = "log_probs"
    normalize: bool = True
    label_rule: LabelRule = "keep"
    label_penalty: float = 8.0
    temperature: float = 2.0
    gumbel: bool = False
    weight_rule: WeightRule = "ones"
    gradient_decay: float = 0.97
    precondition: bool = True
    refresh_every_n_steps: int = 4
    val_batch_ratio: float = 0.25
    val_batch_size: int | None = None
    every_n_steps: int = 1
    start_epoch: int = 0
    row_evidence: bool = True
    measure_overhead: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        problems = [
            f"Expected `{name}` to be {wanted}, but got {getattr(self, name)!r}. Change `{name}`."
            for name, (wanted, accepts) in _ALLOWED.items()
            if not accepts(getattr(self, name))
        ]
        if not problems and self.measure_overhead and self.start_epoch:
            problems.append(
                "Expected `start_epoch` to be 0 beside `measure_overhead`, which times the first "
                f"steps of a run, but got {self.start_epoch}. Pass measure_overhead=False, or "
                "measure in a run of its own."
            )
        if problems:
            raise ValueError(" ".join(problems))

    @property
    def solves(self) -> bool:
        """Whether weights or labels are learned from the gradients of single steps."""
        return self.weight_rule != "ones" or self.label_rule != "keep"


class SettingsKwargs(TypedDict, total=False):
    """`Settings` as keywords; None keeps the preset's value."""

    engine: EngineName | None
    params: list[str] | None
    score_space: ScoreSpace | None
    normalize: bool | None
    label_rule: LabelRule | None
    label_penalty: float | None
    temperature: float | None
    gumbel: bool | None
    weight_rule: WeightRule | None
    gradient_decay: float | None
    precondition: bool | None
    refresh_every_n_steps: int | None
    val_batch_ratio: float | None
    val_batch_size: int | None
    every_n_steps: int | None
    start_epoch: int | None
    row_evidence: bool | None
    measure_overhead: bool | None
    seed: int | None


def _choice(choices: tuple[str, ...]) -> tuple[str, Any]:
    def is_choice(value: Any) -> bool:
        return isinstance(value, str) and value in choices

    return "one of " + ", ".join(sorted(choices)), is_choice


def _number(wanted: str, accepts: Any) -> tuple[str, Any]:
    def is_number(value: Any) -> bool:
        return type(value) in {int, float} and abs(value) < math.inf and accepts(value)

    return wanted, is_number


def _integer(least: int, *, optional: bool = False) -> tuple[str, Any]:
    wanted = f"an integer of at least {least}" + (" or None" if optional else "")
    return (
        wanted,
        lambda value: (optional and value is None) or (type(value) is int and value >= least),
    )


def _is_patterns(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and bool(value) and all(isinstance(entry, str) for entry in value)
    )


# What each setting may be: in words, and as a test.
_ALLOWED: dict[str, tuple[str, Any]] = {
    **{
        name: _choice(get_args(kind))
        for name, kind in get_type_hints(Settings).items()
        if get_args(kind) and all(isinstance(entry, str) for entry in get_args(kind))
    },
    **{
        name: ("True or False", lambda value: isinstance(value, bool))
        for name, kind in get_type_hints(Settings).items()
        if kind is bool
    },
    "params": ("a list of one or more name patterns, or None", _is_patterns),
    "label_penalty": _number("a non-negative float", lambda value: value >= 0),
    "temperature": _number("a positive float", lambda value: value > 0),
    "gradient_decay": _number("a float in [0, 1)", lambda value: 0 <= value < 1),
    "val_batch_ratio": _number("a positive float", lambda value: value > 0),
    "refresh_every_n_steps": _integer(1),
    "every_n_steps": _integer(1),
    "start_epoch": _integer(0),
    "val_batch_size": _integer(1, optional=True),
    "seed": _integer(0, optional=True),
}

PRESETS: Mapping[str, Settings] = MappingProxyType(
    {
        "robust": Settings(),
        "gradient": Settings(label_rule="auto", weight_rule="sigmoid", row_evidence=False),
        "paper": Settings(
            engine="forward_mode",
            normalize=False,
            label_rule="softmax",
            label_penalty=0.0,
            temperature=0.01,
            gumbel=True,
            weight_rule="expected",
            gradient_decay=0.0,
            precondition=False,
            refresh_every_n_steps=1,
            val_batch_ratio=1.0,
            row_evidence=False,
        ),
    }
)


def make_settings(preset: PresetName = "robust", **overrides: Any) -> Settings:
    """Return the named preset with some of its values replaced.

    Args:
        preset: ``"robust"``, ``"gradient"`` or ``"paper"``.
        **overrides: Values for fields of `Settings`; None keeps the preset's value.

    Returns:
        The settings, checked.

    Raises:
        ValueError: If the name or a value is outside its range.
        TypeError: If an override is not a field of `Settings`.

    Example:
        >>> make_settings("paper", temperature=0.1).temperature
        0.1
    """
    if not isinstance(cast("Any", preset), str) or preset not in PRESETS:
        raise ValueError(
            f"Expected `preset` to be one of {', '.join(sorted(PRESETS))}, but got {preset!r}. "
            "Choose one."
        )
    known = [field.name for field in fields(Settings)]
    if unknown := sorted(set(overrides) - set(known)):
        raise TypeError(
            f"Expected settings among {', '.join(known)}, but got {', '.join(unknown)}. Correct "
            "the name, or remove it."
        )
    given = {name: value for name, value in overrides.items() if value is not None}
    return replace(PRESETS[preset], **given)
