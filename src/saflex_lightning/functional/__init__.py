"""Tensors in, tensors out: the solve, its settings and its losses, without a model or a trainer."""

from .contrastive import contrastive_scores, same_class_target
from .losses import weighted_cross_entropy
from .settings import Settings, make_settings
from .solve import solve

__all__ = [
    "Settings",
    "contrastive_scores",
    "make_settings",
    "same_class_target",
    "solve",
    "weighted_cross_entropy",
]
