"""What is remembered of the last layer: validation rows, and the moments of training features.

Where several processes share a batch, ``reduce_sum`` adds a tensor over them, and what is
remembered is the same on all of them.
"""

from typing import Any

import torch
from torch import Tensor

from .functional import ReduceSum, sum_over_ranks

__all__ = ["FeatureBank", "RunningMoments", "largest_size", "share_rows"]

_MOMENTS_DECAY = 0.95  # of the mean and covariance of training features, per training batch
_BANK_ROWS = 8192  # most validation rows that are remembered


class FeatureBank:
    """Remember the newest validation rows: features, residuals and labels.

    A ring with room for one pass over the validation data. Each call adds the rows that the ranks
    drew, so all ranks hold the same ones. A row with a non-finite number is left out.

    Args:
        num_rows: Rows of the validation data; None where they cannot be counted.
    """

    def __init__(self, num_rows: int | None = None) -> None:
        self.limit(num_rows)
        self._added = 0
        self._chunk: int | None = None  # rows that a rank adds at a time, at most
        self._num_classes = 0
        self._rows: Tensor | None = None  # features, residuals, labels, 1 for a row that is there

    def limit(self, num_rows: int | None) -> None:
        """Set the room, before the first row.

        Args:
            num_rows: As for the class.
        """
        self._room = min(num_rows or _BANK_ROWS, _BANK_ROWS)

    def add(
        self,
        features: Tensor,
        residuals: Tensor,
        labels: Tensor,
        *,
        reduce_sum: ReduceSum | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Put this rank's rows, and those of the others, in the place of the oldest.

        Args:
            features: Inputs of the last layer, ``(rows, features)``.
            residuals: Gradient of each row's loss with respect to its logits, ``(rows, classes)``.
            labels: ``(rows, classes)``; rows sum to 1.
            reduce_sum: Adds a tensor over ranks.
            rank: This process.
            world_size: Number of processes.
        """
        rows = torch.cat([features, residuals, labels, torch.ones_like(features[:, :1])], 1)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
        if self._chunk is None:
            self._chunk = largest_size(rows, reduce_sum, rank, world_size)
        chunk = share_rows(rows, self._chunk, reduce_sum, rank, world_size)
        if self._rows is None:
            self._rows = rows.new_zeros(max(self._room, len(chunk)), rows.shape[1])
            self._num_classes = residuals.shape[1]
        places = torch.arange(self._added, self._added + len(chunk), device=rows.device)
        self._rows[places % len(self._rows)] = chunk
        self._added += len(chunk)

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what is remembered.

        Returns:
            Features ``(rows, features)``, residuals and labels ``(rows, classes)``, and 1 or 0 for
            whether a row is there ``(rows,)``; all are 0 where it is not.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._rows is None:
            raise RuntimeError("Expected `add` to be called before `read`, but it was not.")
        classes = self._num_classes
        sizes = [self._rows.shape[1] - 2 * classes - 1, classes, classes, 1]
        features, residuals, labels, present = self._rows[: self._added].split(sizes, dim=1)
        return features, residuals, labels, present[:, 0]

    def clear(self) -> None:
        """Forget all rows."""
        self._added = 0
        self._rows = None

    def to(self, device: torch.device) -> None:
        """Move the rows, after `load_state_dict`.

        Args:
            device: Where the features live.
        """
        if self._rows is not None:
            self._rows = self._rows.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return {
            "rows": self._rows,
            "added": self._added,
            "chunk": self._chunk,
            "num_classes": self._num_classes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        self._rows, self._added = state["rows"], state["added"]
        self._chunk, self._num_classes = state["chunk"], state["num_classes"]


def largest_size(
    rows: Tensor, reduce_sum: ReduceSum | None, rank: int = 0, world_size: int = 1
) -> int:
    """Return how many rows the rank with the most has; on several ranks it waits for the device.

    Args:
        rows: This rank's rows, ``(rows, columns)``.
        reduce_sum: Adds a tensor over ranks.
        rank: This process.
        world_size: Number of processes.

    Returns:
        The number.
    """
    if reduce_sum is None:
        return len(rows)
    sizes = rows.new_zeros(world_size)
    sizes[rank] = len(rows)
    return int(reduce_sum(sizes).max())


def share_rows(
    rows: Tensor, room: int, reduce_sum: ReduceSum | None, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Return the rows of all ranks, one rank after the other.

    Args:
        rows: This rank's rows, ``(rows, columns)``; those beyond ``room`` are left out.
        room: Rows of each rank in the result; zeros fill what a rank does not need.
        reduce_sum: Adds a tensor over ranks.
        rank: This process.
        world_size: Number of processes.

    Returns:
        ``(world_size * room, columns)``, the same on every rank.
    """
    shared = rows.new_zeros(world_size, room, rows.shape[1])
    shared[rank, : len(rows)] = rows[:room]
    return sum_over_ranks(shared, reduce_sum).flatten(0, 1)


class RunningMoments:
    """Average the mean and the covariance of training features over steps and ranks."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.covariance: Tensor | None = None

    def update(
        self, features: Tensor, usable: Tensor, reduce_sum: ReduceSum | None = None
    ) -> tuple[Tensor, Tensor]:
        """Take a batch into the averages; each batch's covariance is about its own mean.

        Args:
            features: ``(batch, features)``, finite.
            usable: 1 for rows that count, else 0, ``(batch,)``.
            reduce_sum: Adds a tensor over ranks.

        Returns:
            Mean ``(features,)`` and covariance ``(features, features)``. The first batch that has
            usable rows starts the averages (both are 0 until then); one without changes nothing.
        """
        sums = torch.cat([usable @ features, usable.sum().unsqueeze(0)])
        sums = sum_over_ranks(sums, reduce_sum)
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        centred = (features - mean) * usable.unsqueeze(1)
        covariance = sum_over_ranks(centred.T @ centred, reduce_sum) / count
        if self.mean is None or self.covariance is None:
            if not sums[-1] > 0:  # waits for the device, until there are averages
                return mean, covariance
            self.mean, self.covariance = mean, covariance
        else:
            rate = (1 - _MOMENTS_DECAY) * (sums[-1] > 0).to(mean.dtype)
            self.mean = torch.lerp(self.mean, mean, rate)
            self.covariance = torch.lerp(self.covariance, covariance, rate)
        return self.mean, self.covariance

    def to(self, device: torch.device) -> None:
        """Move the averages, after `load_state_dict`.

        Args:
            device: Where the features live.
        """
        if self.mean is not None and self.covariance is not None:
            self.mean, self.covariance = self.mean.to(device), self.covariance.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs.

        Returns:
            A dictionary for `load_state_dict`.
        """
        return {"mean": self.mean, "covariance": self.covariance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Args:
            state: The dictionary.
        """
        self.mean, self.covariance = state["mean"], state["covariance"]
