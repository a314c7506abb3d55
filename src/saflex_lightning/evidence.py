r"""Evidence about groups of augmented rows, gathered over steps, and the gates made of it.

A single step's gradient inner products are mostly noise; their mean over all rows of one
augmentation operation, gathered over many steps, is not. The evidence here is that of the last
layer alone, so it needs the layer's inputs (features) and no backward pass: with features h and
residuals r = p - y of the validation rows, the mean mu and covariance Sigma of training features,

.. math::
    G = \frac 1 V \sum_v (h_v - \mu) r_v^\top, \qquad b = \frac 1 V \sum_v r_v, \qquad
    u_i = G^\top (\Sigma + \rho I)^{-1} (h_i - \mu) + b, \qquad
    \Pi_{ik} = -\Big(u_{ik} - \sum_j p_{ij} u_{ij}\Big).

The features of a batch have one row per sample; group 0 is the clean rows. Where several processes
share a batch, ``reduce_sum`` adds a tensor over them, and every result is the same on all of them.
"""

import torch
from torch import Tensor

from .functional import ReduceSum, project_tangent, sum_over_ranks

__all__ = [
    "draw_rejected",
    "group_evidence",
    "last_layer_products",
    "next_log_weights",
    "rescale_weights",
]

_RIDGE = 0.1  # rho, in units of the covariance's mean diagonal
_RATE = 0.5  # change of log w for evidence 1 of a group of average size
_MOST_SHARE = 2.0  # a group counts at most as so many groups of average size
_LOG_RANGE = (-6.0, 0.7)  # of log w: w is between 0.0025 and 2, so every group can recover
_FLOOR = 1e-12  # below this, a variance or a root mean square counts as zero


def last_layer_products(
    features: Tensor,
    probs: Tensor,
    mean: Tensor,
    covariance: Tensor,
    val_features: Tensor,
    val_residuals: Tensor,
    present: Tensor | None = None,
) -> Tensor:
    """Return the last layer's gradient inner products, by the formula at the top of this file.

    Dividing by the covariance is what a second-order step on that layer would do, so that a few
    directions in which all features vary do not drown the others.

    Args:
        features: h of training rows, ``(batch, features)``.
        probs: p of training rows, ``(batch, classes)``.
        mean: mu, ``(features,)``.
        covariance: Sigma, ``(features, features)``.
        val_features: h of validation rows, ``(rows, features)``.
        val_residuals: r of validation rows, ``(rows, classes)``.
        present: 1 for validation rows that count, else 0, ``(rows,)``; None counts all. The others
            are 0 in features and residuals.

    Returns:
        Pi, ``(batch, classes)``; positive lowers the validation loss. ``(probs * Pi).sum(-1)`` is
        0.
    """
    size = val_features.shape[0] if present is None else present.sum().clamp(min=1)
    bias = val_residuals.sum(0) / size
    gradient = val_features.T @ val_residuals / size - torch.outer(mean, bias)
    ridge = (_RIDGE * covariance.diagonal().mean()).clamp(min=_FLOOR)
    damped = covariance + ridge * torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
    factor, _ = torch.linalg.cholesky_ex(damped)  # unlike `cholesky` it does not wait to check
    drift = (features - mean) @ torch.cholesky_solve(gradient, factor) + bias
    return project_tangent(-drift, probs, "log_probs")


def group_evidence(
    products: Tensor,
    labels: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    usable: Tensor | None = None,
    reduce_sum: ReduceSum | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Return each group's mean evidence for the given labels.

    .. math::
        s_i = \frac{\sum_k y_{ik} \Pi_{ik}}{\mathrm{rms}(\Pi)}, \qquad
        m_g = \frac{1}{n_g} \sum_{i \in g} s_i

    Args:
        products: Pi of training rows, ``(batch, classes)``.
        labels: Their labels, ``(batch, classes)``.
        group: ``(batch,)`` int64 in [0, num_groups]; 0 is clean.
        num_groups: Number of augmented groups.
        usable: 1 for rows that count, else 0, ``(batch,)``; None counts all.
        reduce_sum: Adds a tensor over ranks.

    Returns:
        m and n, ``(num_groups + 1,)``; m is 0 where n is 0.
    """
    usable = torch.ones_like(products[:, 0]) if usable is None else usable
    given = (labels * products).sum(-1) * usable
    squares = products.square().mean(-1) * usable
    sums = products.new_zeros(3, num_groups + 1)
    sums = sums.index_add(1, group, torch.stack([given, usable, squares]))
    totals, counts, squares = sum_over_ranks(sums, reduce_sum)
    rms = (squares.sum() / counts.sum().clamp(min=1)).sqrt()
    return totals / (counts.clamp(min=1) * rms.clamp(min=_FLOOR)), counts


def next_log_weights(log_weights: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    r"""Return the gates' logarithms after one step of evidence.

    .. math:: \log w_g \leftarrow \log w_g + 0.5 \min(2, n_g\, \text{groups} / B)\, (m_g - m_0)

    for groups present, where clean rows are present too, clipped to [-6, 0.7]. B is the number of
    augmented rows. Only the difference to the clean rows of the same batch means anything: the
    sign of m itself follows how well the model is calibrated.

    Args:
        log_weights: log w, ``(groups + 1,)``; entry 0 belongs to clean rows and stays 0.
        means: m of `group_evidence`.
        counts: n of `group_evidence`.

    Returns:
        ``(groups + 1,)``. Non-finite evidence changes nothing.

    Example:
        >>> means, counts = torch.tensor([0.1, 0.1, -0.9]), torch.tensor([4.0, 2.0, 2.0])
        >>> next_log_weights(torch.zeros(3), means, counts)
        tensor([ 0.0000,  0.0000, -0.5000])
    """
    share = counts * (len(counts) - 1) / counts[1:].sum().clamp(min=1)
    change = _RATE * share.clamp(max=_MOST_SHARE) * (means - means[0])
    known = (counts > 0) & (counts[0] > 0) & change.isfinite()
    return (log_weights + torch.where(known, change, 0)).clamp(*_LOG_RANGE)


def draw_rejected(
    log_weights: Tensor, group: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which rows the gates reject; a row is kept with probability min(1, w) of its group.

    Args:
        log_weights: log w, ``(groups + 1,)``.
        group: ``(batch,)`` int64; clean rows, of group 0, are never rejected.
        generator: Source of the draws, on the CPU.

    Returns:
        ``(batch,)`` bool.
    """
    # Drawn on the CPU, so that the draws of a seed are the same on every device.
    draws = torch.rand(group.shape, generator=generator).to(
        group.device, non_blocking=group.is_cuda
    )
    return draws >= log_weights.exp()[group]


def rescale_weights(
    weights: Tensor, factors: Tensor, augmented: Tensor, reduce_sum: ReduceSum | None = None
) -> Tensor:
    """Multiply the weights of augmented rows by factors, keeping their sum.

    Args:
        weights: Sample weights, ``(batch,)``.
        factors: Non-negative, ``(batch,)``.
        augmented: ``(batch,)`` bool.
        reduce_sum: Adds a tensor over ranks.

    Returns:
        ``(batch,)``; weights of the other rows are as they were.
    """
    raised = torch.where(augmented, weights * factors, 0)
    before = torch.where(augmented, weights, 0).sum()
    sums = sum_over_ranks(torch.stack([before, raised.sum()]), reduce_sum)
    scale = sums[0] / torch.where(sums[1] > 0, sums[1], 1)
    return torch.where(augmented, raised * scale, weights)
