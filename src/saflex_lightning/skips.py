"""Steps whose solve is skipped: which may be, and how many were."""

import torch
from torch import Tensor

from .engines import is_out_of_memory

__all__ = ["SkippedSteps", "check_skippable"]


class SkippedSteps:
    """Count the steps whose solve was skipped, over the whole run.

    Args:
        before: Those before a resume.
    """

    def __init__(self, before: int = 0) -> None:
        self._non_finite = torch.zeros((), dtype=torch.long)
        self._others = before  # for want of memory, or before a resume

    @property
    def non_finite(self) -> Tensor:
        """Steps that met a non-finite number since the start or the resume, scalar."""
        return self._non_finite

    @property
    def total(self) -> Tensor:
        """All skipped steps, scalar."""
        return self._non_finite + self._others

    def add_unless(self, finite: Tensor) -> None:
        """Count a step that met a non-finite number, without waiting for the device.

        Args:
            finite: Whether it met none, scalar bool.
        """
        skipped = (~finite).long()
        self._non_finite = self._non_finite.to(skipped.device) + skipped

    def add(self) -> None:
        """Count a step that was skipped for another reason."""
        self._others += 1


def check_skippable(error: Exception, world_size: int) -> None:
    """Return where the solve may be skipped because of an error; raise otherwise.

    Args:
        error: What a pass of the solve has raised.
        world_size: Number of processes.

    Raises:
        RuntimeError: If memory ran out on one of several processes.
    """
    if not is_out_of_memory(error):
        raise error
    if world_size > 1:
        raise RuntimeError(
            "Expected memory for the solve on every process, but this one ran out of it, and the "
            "others wait for it in the solve, so that it cannot be skipped. Lower "
            "`val_batch_size` or the training batch, or pass engine='head'."
        ) from error
