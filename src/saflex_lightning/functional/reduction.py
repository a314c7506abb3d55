"""Sums over the processes that share a batch."""

from collections.abc import Callable

from torch import Tensor

__all__ = ["ReduceSum", "sum_over_ranks"]

ReduceSum = Callable[[Tensor], Tensor]


def sum_over_ranks(tensor: Tensor, reduce_sum: ReduceSum | None) -> Tensor:
    """Add a tensor over ranks.

    Args:
        tensor: This rank's part.
        reduce_sum: Adds a tensor over ranks; None means one process.

    Returns:
        The sum, equal on every rank; for one process the tensor itself.
    """
    return tensor if reduce_sum is None else reduce_sum(tensor)
