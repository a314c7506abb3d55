"""The plain loss of scores, which the refined loss falls back on and the validation rows have."""

from typing import NamedTuple

import torch
from torch import Tensor

from .engines import Scores, as_tuple
from .functional import contrastive_target

__all__ = ["LossOptions", "diagonal_target", "mean_cross_entropy"]


class LossOptions(NamedTuple):
    """Options of the training loss that the validation gradient shares.

    Attributes:
        class_weight: ``(classes,)`` or None.
        label_smoothing: In [0, 1).
    """

    class_weight: Tensor | None = None
    label_smoothing: float = 0.0

    def same_kind(self, other: "LossOptions") -> bool:
        """Say whether both weigh classes or not, and smooth labels or not.

        Args:
            other: Options to compare with.

        Returns:
            True if a gradient made with one serves the other.
        """
        return (self.class_weight is None) == (other.class_weight is None) and (
            bool(self.label_smoothing) == bool(other.label_smoothing)
        )

    def to(self, device: torch.device) -> "LossOptions":
        """Return the options with the class weights on a device.

        Args:
            device: Where the parameters live.

        Returns:
            Options.
        """
        weight = None if self.class_weight is None else self.class_weight.to(device)
        return self._replace(class_weight=weight)


def mean_cross_entropy(logits: Scores, target: Tensor | None, options: LossOptions) -> Tensor:
    """Return ``F.cross_entropy``, averaged over tasks when the scores are a tuple.

    Args:
        logits: ``(batch, classes)``, or a tuple of them.
        target: As for `SAflexMixin.saflex_loss`.
        options: Class weights and label smoothing.

    Returns:
        Scalar.
    """
    weight = options.class_weight
    losses = [
        torch.nn.functional.cross_entropy(
            scores,
            diagonal_target(scores) if target is None else target,
            weight=None if weight is None else weight.to(scores.dtype),
            label_smoothing=options.label_smoothing,
        )
        for scores in as_tuple(logits)
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def diagonal_target(scores: Tensor) -> Tensor:
    """Return which column belongs to each row, also where columns are the pairs of all ranks."""
    if scores.ndim == 2 and scores.shape[0] == scores.shape[1]:
        return contrastive_target(scores)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return contrastive_target(scores)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    return contrastive_target(scores, rank=rank, world_size=world_size)
