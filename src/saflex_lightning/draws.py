"""Which rows a draw holds: a function of (seed, draw number, rank).

Every rank cuts its slice from one endless sequence of permutations, so several processes together
see the batch that one would see, and a resumed run needs to remember nothing but how many batches
were drawn.
"""

import itertools
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

__all__ = ["EndlessBatchSampler", "mix_seed"]


class EndlessBatchSampler(Sampler[list[int]]):
    """Yield this rank's rows of one shuffled pass after another, without end.

    Args:
        num_rows: Rows of the dataset.
        batch_size: Rows per batch and process.
        seed: Seed of the permutations, the same on every rank.
        rank: This process.
        world_size: Number of processes.
        start: Number of the first draw.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.start = start
        self._pass = -1
        self._order: list[int] = []

    def rows(self, draw: int) -> list[int]:
        """Return the rows of one draw.

        Args:
            draw: Number of the draw, from 0.

        Returns:
            ``batch_size`` row numbers. A batch that crosses from one pass into the next may hold a
            row twice.
        """
        first = (draw * self.world_size + self.rank) * self.batch_size
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows(draw) for draw in itertools.count(self.start))

    def _row(self, position: int) -> int:
        number, place = divmod(position, self.num_rows)
        if number != self._pass:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, number))
            self._order = torch.randperm(self.num_rows, generator=generator).tolist()
            self._pass = number
        return self._order[place]


def mix_seed(*numbers: int) -> int:
    """Return one seed made from several numbers, such as (seed, step, rank).

    Args:
        *numbers: Integers.

    Returns:
        A number in [0, 2**63).
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed
