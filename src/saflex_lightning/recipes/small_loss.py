"""The small-loss filter: a rival to learned weights that trusts whatever the model fits already."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

__all__ = ["small_loss", "small_loss_weights"]


def small_loss_weights(losses: Tensor, augmented: Tensor, dropped_share: float) -> Tensor:
    """Return weight 0 for the augmented rows with the largest losses.

    The others share what those lose, so that the weights of augmented rows sum to their number as
    those of SAFLEX do; clean rows weigh 1.

    Args:
        losses: Loss of each row, ``(batch,)``.
        augmented: Mask of augmented rows, ``(batch,)`` bool.
        dropped_share: Share of the augmented rows that is dropped, in [0, 1); rounded down to whole
            rows, so that one is kept at least.

    Returns:
        ``(batch,)`` like ``losses``.

    Example:
        >>> augmented = torch.tensor([False, True, True, True, True])
        >>> small_loss_weights(torch.tensor([9.0, 1.0, 4.0, 3.0, 2.0]), augmented, 0.5)
        tensor([1., 2., 0., 0., 2.])

    References:
        Han et al. 2018, "Co-teaching: Robust training of deep neural networks with extremely noisy
        labels", section 2: the small-loss trick, here with one network and a constant share.
    """
    order = losses.masked_fill(~augmented, -torch.inf).argsort(descending=True, stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
    count = augmented.sum().to(losses.dtype)
    kept = augmented & (place + 1 > dropped_share * count)
    scale = count / kept.sum().clamp(min=1)
    return torch.where(augmented, kept * scale, 1)


def small_loss(
    logits: Tensor,
    target: Tensor,
    augmented: Tensor,
    *,
    dropped_share: float,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the mean cross-entropy without the augmented rows that fit worst.

    Rows are ranked by their plain cross-entropy, whatever the options of the loss; several
    processes filter each their own rows.

    Args:
        logits: ``(batch, classes)``.
        target: Upstream labels, ``(batch,)`` int64 or ``(batch, classes)``.
        augmented: Mask of augmented rows, ``(batch,)`` bool.
        dropped_share: As for `small_loss_weights`.
        class_weight: ``(classes,)``; None weighs all alike.
        label_smoothing: In [0, 1).

    Returns:
        Scalar; ``F.cross_entropy`` with the same options where no row is dropped.
    """
    ranked = cross_entropy(logits.detach(), target, reduction="none")
    weights = total = small_loss_weights(ranked, augmented, dropped_share)
    if class_weight is not None and target.ndim == 1:
        total = weights * class_weight[target]  # as F.cross_entropy averages
    losses = cross_entropy(
        logits, target, class_weight, reduction="none", label_smoothing=label_smoothing
    )
    return (weights * losses).sum() / total.sum()
