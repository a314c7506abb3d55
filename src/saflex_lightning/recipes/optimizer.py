"""Optimizers and learning rate schedules by name."""

import math
from collections.abc import Iterable
from typing import Literal, get_args

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from saflex_lightning.data.checks import check

__all__ = ["OptimizerName", "Schedule", "learning_rate_factor", "make_optimizer"]

OptimizerName = Literal["adam", "adamw", "sgd"]
Schedule = Literal["constant", "cosine", "steps"]


def learning_rate_factor(schedule: Schedule, epoch: int, max_epochs: int) -> float:
    """Return what the learning rate is multiplied with in an epoch, in (0, 1].

    ``"cosine"`` falls along half a cosine; ``"steps"`` is a tenth from half of the epochs on and a
    hundredth from three quarters on (the MedMNIST protocol).

    Args:
        schedule: Name of the schedule.
        epoch: Epochs done, from 0.
        max_epochs: Epochs of the whole training; not read by ``"constant"``.

    Raises:
        ValueError: If the schedule is unknown.

    Example:
        >>> [learning_rate_factor("steps", epoch, 4) for epoch in range(4)]
        [1.0, 1.0, 0.1, 0.01]
    """
    check(get_args(Schedule), schedule=schedule)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * epoch / max_epochs))
    if schedule == "steps":
        return (1.0, 1.0, 0.1, 0.01)[min(4 * epoch // max_epochs, 3)]
    return 1.0


def make_optimizer(
    name: OptimizerName,
    params: Iterable[nn.Parameter],
    *,
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
) -> Optimizer:
    """Return an optimizer by name.

    Args:
        name: ``"adam"``, ``"adamw"`` or ``"sgd"``.
        params: What it updates.
        lr: Learning rate.
        weight_decay: Added to the gradient by ``"adam"`` and ``"sgd"``, decoupled in ``"adamw"``.
        momentum: Momentum of ``"sgd"``, in [0, 1); the others have their own averages.

    Raises:
        ValueError: If the name is unknown.
    """
    check(get_args(OptimizerName), name=name)
    if name == "sgd":
        return SGD(params, lr=lr, momentum=momentum, weight_decay=weight_decay)
    make = AdamW if name == "adamw" else Adam
    return make(params, lr=lr, weight_decay=weight_decay)
