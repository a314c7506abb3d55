"""Wrong labels that are planted on purpose, and how well a run has found them."""

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning import SAflexCallback

__all__ = ["detection_auroc", "plant_wrong_labels"]


def plant_wrong_labels(
    target: Tensor, num_classes: int, share: float, generator: torch.Generator
) -> Tensor:
    """Return labels some of which are wrong: any other class, each as likely.

    Args:
        target: Right labels, ``(n,)`` int64.
        num_classes: Number of classes, at least 2.
        share: Probability of a label to be wrong, in [0, 1].
        generator: Makes the draws.

    Returns:
        ``(n,)`` int64; where it differs from ``target`` the label is wrong.

    Raises:
        ValueError: If there is no other class.
    """
    if not share:
        return target
    if num_classes < 2:
        raise ValueError(
            f"Expected two classes or more with `label_noise`={share}, but got {num_classes}. Pass "
            "0.0, or add a class."
        )
    wrong = torch.rand(len(target), generator=generator) < share
    shift = torch.randint(1, num_classes, (len(target),), generator=generator)
    return torch.where(wrong, (target + shift) % num_classes, target)


def detection_auroc(trainer: L.Trainer) -> float | None:
    """Return how well ``row_evidence`` tells wrong labels from right ones.

    Args:
        trainer: Its datamodule says by ``wrong_rows()`` which rows carry a planted label.

    Returns:
        Area under the ROC curve over the rows of the pool that were trained on, in [0, 1]; None
        where these have no planted label, or no callback gathers evidence about rows.
    """
    datamodule: Any = getattr(trainer, "datamodule", None)
    find = getattr(datamodule, "wrong_rows", None)
    wrong = None if find is None else find()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        found = callback.read_row_evidence() if isinstance(callback, SAflexCallback) else None
        if wrong is None or found is None:
            continue
        known = found.index < len(wrong)
        is_wrong = wrong[found.index[known]]
        if is_wrong.any() and not is_wrong.all():
            return binary_auroc(found.evidence[known].float(), (~is_wrong).long()).item()
    return None
