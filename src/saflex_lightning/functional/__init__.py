"""Tensors in, tensors out: the solve, its presets and its losses, without a model or a trainer."""

from .contrastive import contrastive_scores, contrastive_target, info_nce, same_class_target
from .losses import (
    check_target,
    dense_target,
    log_probabilities,
    soft_cross_entropy,
    weighted_mean,
    widen,
)
from .presets import (
    PRESETS,
    EngineName,
    LabelRule,
    Preset,
    PresetName,
    ScoreSpace,
    WeightRule,
    make_preset,
)
from .products import inner_products, loss_inner_products, project_tangent
from .reduction import ReduceSum, sum_over_ranks
from .rules import learned_labels, learned_weights
from .solution import SAflexSolution, solution_metrics, solve

__all__ = [
    "PRESETS",
    "EngineName",
    "LabelRule",
    "Preset",
    "PresetName",
    "ReduceSum",
    "SAflexSolution",
    "ScoreSpace",
    "WeightRule",
    "check_target",
    "contrastive_scores",
    "contrastive_target",
    "dense_target",
    "info_nce",
    "inner_products",
    "learned_labels",
    "learned_weights",
    "log_probabilities",
    "loss_inner_products",
    "make_preset",
    "project_tangent",
    "same_class_target",
    "soft_cross_entropy",
    "solution_metrics",
    "solve",
    "sum_over_ranks",
    "weighted_mean",
    "widen",
]
