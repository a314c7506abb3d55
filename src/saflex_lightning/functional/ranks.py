"""The processes that share a batch."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["Ranks"]


class Ranks:
    """Sum, average and gather tensors over the processes that share a batch.

    Args:
        rank: This process.
        size: Number of processes; 1 needs no process group.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank = rank
        self.size = size

    @classmethod
    def current(cls) -> "Ranks":
        """Return those of torch's process group, or this process alone."""
        distributed = torch.distributed
        if not distributed.is_available() or not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, equal on all of them."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    def mean(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the means over ranks, in one flat sum."""
        if self.size == 1:
            return tensors
        pairs = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        flat = self.sum(torch.cat([pair.reshape(-1) for pair in pairs])) / self.size
        pieces = flat.split([pair.numel() for pair in pairs])
        means = [  # the flat one has the widest dtype of all
            piece.view_as(pair).to(pair.dtype) for piece, pair in zip(pieces, pairs, strict=True)
        ]
        return [
            torch.view_as_complex(mean) if tensor.is_complex() else mean
            for mean, tensor in zip(means, tensors, strict=True)
        ]

    def share_first(self, tensors: Iterable[Tensor]) -> None:
        """Write the tensors of the first rank in those of the others."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor.data, 0)

    def most_rows(self, rows: Tensor) -> int:
        """Return how many rows the rank with the most has; on several it waits for the device."""
        if self.size == 1:
            return len(rows)
        sizes = rows.new_zeros(self.size)
        sizes[self.rank] = len(rows)
        return int(self.sum(sizes).max())

    def gather(self, rows: Tensor, room: int) -> Tensor:
        """Return the rows of all ranks, ``room`` of each, the missing ones 0."""
        shared = rows.new_zeros(self.size, room, *rows.shape[1:])
        shared[self.rank, : len(rows)] = rows[:room]
        return self.sum(shared).flatten(0, 1)
