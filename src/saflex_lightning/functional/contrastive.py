"""Contrastive learning as classification: the pairs of a batch are the classes."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["contrastive_scores", "contrastive_target", "info_nce", "same_class_target"]


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


def contrastive_target(
    scores: Tensor, *, rank: int = 0, world_size: int = 1
) -> Int[Tensor, " batch"]:
    """Return the diagonal target: row i belongs to proxy class i.

    Args:
        scores: Similarities, ``(batch, batch)``, or ``(batch, world_size * batch)`` where the
            pairs of all processes are the classes.
        rank: This process; its pairs are block number ``rank`` of the columns.
        world_size: Number of processes whose pairs are columns.

    Returns:
        ``(batch,)`` int64.

    Raises:
        ValueError: If the scores have another shape.

    Example:
        >>> contrastive_target(torch.zeros(2, 4), rank=1, world_size=2)
        tensor([2, 3])
    """
    if scores.ndim != 2 or scores.shape[1] != world_size * scores.shape[0]:
        wide = "" if world_size == 1 else f" or one {world_size} times as wide as high"
        raise ValueError(
            f"Expected a square similarity matrix{wide} when no target is given, but got shape "
            f"{tuple(scores.shape)}. Pass `target` for classification."
        )
    rows = scores.shape[0]
    return torch.arange(rank * rows, (rank + 1) * rows, device=scores.device)


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


def info_nce(
    first: Float[Tensor, "batch features"],
    second: Float[Tensor, "batch features"],
    logit_scale: Tensor | float = 1.0,
) -> Float[Tensor, " batch"]:
    r"""Return the symmetric contrastive loss of each pair.

    .. math:: \ell_i = -\tfrac12 \Big(\log \frac{e^{s_{ii}}}{\sum_j e^{s_{ij}}}
        + \log \frac{e^{s_{ii}}}{\sum_j e^{s_{ji}}}\Big)

    No reduction.

    Args:
        first: Features of one view or modality, ``(batch, features)``.
        second: Features of the other, ``(batch, features)``.
        logit_scale: Inverse temperature of the similarities, positive.

    Returns:
        Loss of each pair in nats, ``(batch,)``.

    Example:
        >>> info_nce(torch.eye(2), torch.eye(2), 10.0).round(decimals=6)
        tensor([4.5000e-05, 4.5000e-05])

    References:
        Ding et al. 2024, Eq. 12.
    """
    per_first, per_second = contrastive_scores(first, second, logit_scale)
    target = contrastive_target(per_first)
    cross_entropy = torch.nn.functional.cross_entropy
    return (
        cross_entropy(per_first, target, reduction="none")
        + cross_entropy(per_second, target, reduction="none")
    ) / 2
