"""Contrastive learning as classification: the pairs of a batch are the classes."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .ranks import Ranks

__all__ = ["contrastive_scores", "contrastive_target", "gather_rows", "same_class_target"]


def contrastive_scores(
    first: Float[Tensor, "batch features"],
    second: Float[Tensor, "batch features"],
    logit_scale: Tensor | float = 1.0,
    *,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Float[Tensor, "batch pairs"], Float[Tensor, "batch pairs"]]:
    r"""Return scaled cosine similarities, once per direction.

    Row i of the first matrix scores element i of ``first`` against every element of ``second``;
    the second matrix is its transpose. The B pairs are B proxy classes of two classification
    tasks. With ``gather`` the rows stay those of this process and the pairs of all processes are
    the classes.

    Args:
        first: Features of one view or modality, ``(batch, features)``; normalised here.
        second: Features of the other, ``(batch, features)``.
        logit_scale: Inverse temperature of the similarities, positive.
        gather: Returns the rows of all processes, such as `saflex_lightning.gather_rows`; None
            means that the pairs of this process are all.

    Returns:
        Two score matrices, ``(batch, pairs)``; pairs is batch without ``gather``.

    References:
        Ding et al. 2024, section 3.3 and Eq. 12.
    """
    first = torch.nn.functional.normalize(first, dim=-1)
    second = torch.nn.functional.normalize(second, dim=-1)
    if gather is None:
        similarities = logit_scale * first @ second.T
        return similarities, similarities.T
    return logit_scale * first @ gather(second).T, logit_scale * second @ gather(first).T


def contrastive_target(scores: Tensor) -> Int[Tensor, " batch"]:
    """Return the diagonal target: row i belongs to proxy class i.

    Where the pairs of all processes are the columns, those of rank r are block number r.

    Raises:
        ValueError: If the scores are neither square nor as wide as the pairs of all processes.
    """
    ranks = Ranks.current()
    rows, columns = scores.shape if scores.ndim == 2 else (0, -1)
    if columns not in {rows, ranks.size * rows}:
        wide = "" if ranks.size == 1 else f" or one {ranks.size} times as wide as high"
        raise ValueError(
            f"Expected a square similarity matrix{wide} when no target is given, but got shape "
            f"{tuple(scores.shape)}. Pass `target` for classification."
        )
    first = 0 if columns == rows else ranks.rank * rows
    return torch.arange(first, first + rows, device=scores.device)


def same_class_target(
    labels: Int[Tensor, " batch"], pair_labels: Int[Tensor, " pairs"] | None = None
) -> Float[Tensor, "batch pairs"]:
    """Return the target that shares each row's mass among all pairs of its class.

    Two pairs of one class are false negatives of each other under the diagonal target; here they
    are positives. The target serves both directions.

    Args:
        labels: Class of each row, ``(batch,)`` int64.
        pair_labels: Class of each pair, ``(pairs,)`` int64, with every class of ``labels`` in it;
            None means that the rows are the pairs.

    Returns:
        ``(batch, pairs)``; rows sum to 1.

    Example:
        >>> same_class_target(torch.tensor([5, 2, 5]))
        tensor([[0.5000, 0.0000, 0.5000],
                [0.0000, 1.0000, 0.0000],
                [0.5000, 0.0000, 0.5000]])
    """
    same = (labels.unsqueeze(1) == (labels if pair_labels is None else pair_labels)).float()
    return same / same.sum(-1, keepdim=True)


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
    return _GatherRows.apply(rows) if Ranks.current().size > 1 else rows


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
