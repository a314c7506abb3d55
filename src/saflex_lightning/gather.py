"""Gather rows over processes, with every derivative that training and the engines need."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["gather_rows"]


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all processes, one block per rank, connected to those of this process.

    Backward gives each process the sum over ranks of the gradients of its rows, so that averaging
    parameter gradients over ranks, as DDP does, gives the gradient of the mean of the ranks'
    losses. Forward mode carries tangents across (``torch.distributed.all_gather`` alone drops
    both). Without a process group it returns ``rows``.

    Every rank must call it at the same point with the same number of rows.

    Args:
        rows: Features of this process, ``(batch, features)``.

    Returns:
        ``(world_size * batch, features)``.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return rows
    return _GatherRows.apply(rows) if distributed.get_world_size() > 1 else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return _all_gather(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total)
        return total.chunk(torch.distributed.get_world_size())[torch.distributed.get_rank()]

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _all_gather(tangents[0])


def _all_gather(rows: Tensor) -> Tensor:
    rows = rows.contiguous()
    blocks = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(blocks, rows)
    return torch.cat(blocks)
