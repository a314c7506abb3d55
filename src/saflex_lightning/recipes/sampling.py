"""Batches of steering rows in which no class is missing."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

__all__ = ["ClassBatchSampler", "rows_per_class"]


def rows_per_class(class_counts: Tensor, batch_size: int, *, balanced: bool) -> Tensor:
    """Share the rows of a batch out among the classes, at least one row for each.

    Args:
        class_counts: Rows of each class in the data, ``(classes,)`` int64, positive.
        batch_size: Rows of a batch, at least one per class.
        balanced: As many rows of each class, instead of shares like those in the data.

    Returns:
        ``(classes,)`` int64, summing to ``batch_size``.

    Example:
        >>> rows_per_class(torch.tensor([990, 10]), 16, balanced=False)
        tensor([15,  1])
    """
    shares = torch.ones(len(class_counts)) if balanced else class_counts.float()
    wanted = shares * batch_size / shares.sum()
    counts = wanted.floor().long().clamp(min=1)
    while (missing := batch_size - int(counts.sum())) != 0:
        # The class that is furthest from its share gets a row, or gives one.
        gap = wanted - counts
        if missing < 0:
            gap[counts == 1] = torch.inf
        counts[gap.argmax() if missing > 0 else gap.argmin()] += 1 if missing > 0 else -1
    return counts


class ClassBatchSampler(Sampler[list[int]]):
    """Yield batches with a fixed number of rows of every class.

    Each class goes through its own rows in shuffled passes without end; several processes share
    them out. A pass over this sampler has as many batches as the data has rows for, and the next
    one goes on where it stopped. What is drawn is a function of (seed, draw, rank).

    Args:
        target: Labels of the rows, ``(n,)`` int64.
        batch_size: Rows per batch and process.
        balanced: See `rows_per_class`.
        seed: Seed of the order, the same on every rank.
        rank: This process.
        world_size: Number of processes.

    Raises:
        ValueError: If a batch has fewer rows than there are classes, or a class has no row.
    """

    def __init__(
        self,
        target: Tensor,
        batch_size: int,
        *,
        balanced: bool,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        counts = target.bincount()
        if batch_size < len(counts) or (counts == 0).any():
            raise ValueError(
                "Expected `steering_batch_size` to be at least the number of classes and every "
                f"class to have rows, but got {batch_size} and rows per class {counts.tolist()}. "
                "Pass a larger `steering_batch_size`, or split the rows class by class."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._draws = 0
        self._num_rows = len(target)
        self._rows = [(target == label).nonzero().flatten().numpy() for label in counts.nonzero()]
        self._counts = rows_per_class(counts, batch_size, balanced=balanced).tolist()

    def __len__(self) -> int:
        return max(1, self._num_rows // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(len(self)):
            self._draws += 1
            yield self.rows(self._draws - 1)

    def rows(self, draw: int) -> list[int]:
        """Return the rows of one batch, class by class.

        Args:
            draw: Number of the batch, from 0.
        """
        chosen = []
        for label, (rows, count) in enumerate(zip(self._rows, self._counts, strict=True)):
            first = (draw * self.world_size + self.rank) * count
            positions = np.arange(first, first + count)
            for number in np.unique(positions // len(rows)):
                order = np.random.default_rng((self.seed, label, number)).permutation(rows)
                places = positions[positions // len(rows) == number] % len(rows)
                chosen += order[places].tolist()
        return chosen
