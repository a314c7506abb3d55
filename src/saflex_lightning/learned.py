"""What a step learned, kept so that it can be told when somebody asks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional import SAflexSolution, solution_metrics

__all__ = ["Learned", "mean_metrics"]


@dataclass(frozen=True)
class Learned:
    """What one task of a step was solved to.

    Attributes:
        solution: The solution.
        target: Upstream labels, as given to `solve`.
        augmented: As given to `solve`.
        left_fraction: Share of the augmented rows that the gates left, scalar; None without gates.
    """

    solution: SAflexSolution
    target: Tensor
    augmented: Tensor | None
    left_fraction: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """Return `solution_metrics`; rows that the gates turned down count as dropped."""
        metrics = solution_metrics(self.solution, self.target, self.augmented)
        if self.left_fraction is not None:
            metrics["kept_fraction"] = metrics["kept_fraction"] * self.left_fraction
        return metrics


def mean_metrics(tasks: Sequence[Learned]) -> dict[str, Tensor]:
    """Return the metrics of a step, averaged over its tasks.

    Args:
        tasks: At least one.

    Returns:
        Scalars by name.
    """
    each = [task.metrics() for task in tasks]
    return {name: torch.stack([task[name].float() for task in each]).mean() for name in each[0]}
