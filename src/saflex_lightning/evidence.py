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

from typing import Any

import torch
from torch import Tensor

from .functional import ReduceSum, project_tangent, sum_over_ranks

__all__ = [
    "FeatureBank",
    "RunningMoments",
    "close_groups",
    "draw_rejected",
    "group_evidence",
    "keep_probabilities",
    "largest_size",
    "last_layer_products",
    "next_log_weights",
    "rescale_weights",
    "share_rows",
]

_MOMENTS_DECAY = 0.95  # of the mean and covariance of training features, per training batch
_RIDGE = 0.1  # rho, in units of the covariance's mean diagonal
_RATE = 0.15  # change of log w for evidence 1 of a group of average size
_MOST_SHARE = 2.0  # a group counts at most as so many groups of average size
_LOG_RANGE = (-6.0, 0.7)  # of log w: w is between 0.0025 and 2
_CLOSED_BELOW = 0.5  # w under which a group may be switched off
_LEAST_KEPT = 0.05  # probability of keeping a row of the worst group: it can still recover
_BANK_ROWS = 8192  # most validation rows that are remembered
_FLOOR = 1e-12  # below this, a variance or a root mean square counts as zero


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
        places = torch.arange(self._added, self._added + len(chunk)) % len(self._rows)
        self._rows[places.to(rows.device)] = chunk
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

    .. math:: \log w_g \leftarrow \log w_g + 0.15 \min(2, n_g\, \text{groups} / B)\, (m_g - m_0)

    for groups present, where clean rows are present too, clipped to [-6, 0.7]. B is the number of
    augmented rows. Only the difference to the clean rows of the same batch means anything: the
    sign of m itself follows how well the model is calibrated.

    Args:
        log_weights: log w, ``(groups + 1,)``; entry 0 belongs to clean rows and stays 0.
        means: m of `group_evidence`.
        counts: n of `group_evidence`.

    Returns:
        ``(groups + 1,)``. Non-finite evidence changes nothing, and a closed group stays closed.

    Example:
        >>> means, counts = torch.tensor([0.1, 0.1, -0.9]), torch.tensor([4.0, 2.0, 2.0])
        >>> next_log_weights(torch.zeros(3), means, counts)
        tensor([ 0.0000,  0.0000, -0.1500])
    """
    share = counts * (len(counts) - 1) / counts[1:].sum().clamp(min=1)
    change = _RATE * share.clamp(max=_MOST_SHARE) * (means - means[0])
    known = (counts > 0) & (counts[0] > 0) & change.isfinite()
    moved = (log_weights + torch.where(known, change, 0)).clamp(*_LOG_RANGE)
    return torch.where(log_weights.isneginf(), log_weights, moved)


def close_groups(log_weights: Tensor) -> Tensor:
    """Switch groups with w below 0.5 off for good.

    Args:
        log_weights: log w, ``(groups + 1,)``.

    Returns:
        ``(groups + 1,)``; minus infinity, w = 0, for groups that are off.

    Example:
        >>> close_groups(torch.tensor([0.0, -0.6, -0.8]))
        tensor([ 0.0000, -0.6000,    -inf])
    """
    return log_weights.masked_fill(log_weights.exp() < _CLOSED_BELOW, -torch.inf)


def keep_probabilities(log_weights: Tensor) -> Tensor:
    """Return the probability that a row of each group is kept, in [0.05, 1]; 0 for closed ones.

    Args:
        log_weights: log w, ``(groups + 1,)``.
    """
    return log_weights.exp().clamp(_LEAST_KEPT, 1.0).masked_fill(log_weights.isneginf(), 0)


def draw_rejected(
    log_weights: Tensor, group: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Draw which rows the gates reject.

    Args:
        log_weights: log w, ``(groups + 1,)``.
        group: ``(batch,)`` int64; clean rows, of group 0, are never rejected.
        generator: Source of the draws, on the CPU.

    Returns:
        ``(batch,)`` bool.
    """
    # Drawn on the CPU, so that the draws of a seed are the same on every device.
    draws = torch.rand(group.shape, generator=generator).to(group.device)
    return draws >= keep_probabilities(log_weights)[group]


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
