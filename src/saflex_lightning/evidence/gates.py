r"""Which groups of augmented rows pass.

A single step's gradient inner products are mostly noise; their mean over all rows of one
augmentation operation, gathered over many steps, is not. Group 0 is the clean rows. Where several
processes share a batch, what is learned is the same on all of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from saflex_lightning.batch import AugmentedBatch, check_replaceable
from saflex_lightning.functional.losses import LossOptions
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.solve import loss_inner_products

from .memory import RunningMoments, ValidationMemory
from .products import last_layer_products, rescale_weights

__all__ = ["GatedRows", "Gates", "draw_rejected", "group_evidence", "next_log_weights"]

_WARM_UP = 0.1  # share of training during which the gates watch and do not move
_RATE = 0.5  # change of log w for evidence 1 of a group of average size
_MOST_SHARE = 2.0  # a group counts at most as so many groups of average size
_LOG_RANGE = (-6.0, 0.7)  # of log w: w is between 0.0025 and 2, so every group can recover
_FLOOR = 1e-12  # below this, a root mean square counts as zero
_WITHOUT = "Pass `gates=False` to train without."


def group_evidence(
    products: Tensor, labels: Tensor, group: Tensor, num_groups: int, usable: Tensor, ranks: Ranks
) -> tuple[Tensor, Tensor]:
    r"""Return each group's mean evidence for the given labels, and its rows, group 0 first.

    .. math::
        s_i = \frac{\sum_k y_{ik} \Pi_{ik}}{\mathrm{rms}(\Pi)}, \qquad
        m_g = \frac{1}{n_g} \sum_{i \in g} s_i

    ``usable`` is 1 for rows that count, else 0; m is 0 where n is 0.
    """
    given = (labels * products).sum(-1) * usable
    squares = products.square().mean(-1) * usable
    sums = products.new_zeros(3, num_groups + 1)
    sums = sums.index_add(1, group, torch.stack([given, usable, squares]))
    totals, counts, squares = ranks.sum(sums)
    rms = (squares.sum() / counts.sum().clamp(min=1)).sqrt()
    return totals / (counts.clamp(min=1) * rms.clamp(min=_FLOOR)), counts


def next_log_weights(log_weights: Tensor, means: Tensor, counts: Tensor) -> Tensor:
    r"""Return the gates' logarithms after one step of evidence.

    .. math:: \log w_g \leftarrow \log w_g + 0.5 \min(2, n_g\, \text{groups} / B)\, (m_g - m_0)

    for groups present, where clean rows are present too, clipped to [-6, 0.7]. B is the number of
    augmented rows. Only the difference to the clean rows of the same batch means anything: the
    sign of m itself follows how well the model is calibrated. Non-finite evidence changes nothing.

    Example:
        >>> means, counts = torch.tensor([0.1, 0.1, -0.9]), torch.tensor([4.0, 2.0, 2.0])
        >>> next_log_weights(torch.zeros(3), means, counts)
        tensor([ 0.0000,  0.0000, -0.5000])
    """
    share = counts * (len(counts) - 1) / counts[1:].sum().clamp(min=1)
    change = _RATE * share.clamp(max=_MOST_SHARE) * (means - means[0])
    known = (counts > 0) & (counts[0] > 0) & change.isfinite()
    return (log_weights + torch.where(known, change, 0)).clamp(*_LOG_RANGE)


def draw_rejected(log_weights: Tensor, group: Tensor, generator: torch.Generator) -> Tensor:
    """Draw which rows are rejected; a row is kept with probability min(1, w) of its group."""
    # Drawn on the CPU, so that the draws of a seed are the same on every device.
    draws = torch.rand(group.shape, generator=generator).to(
        group.device, non_blocking=group.is_cuda
    )
    return draws >= log_weights.exp()[group]


class GatedRows(NamedTuple):
    """What the gates leave of a training batch.

    Attributes:
        augmented: True for augmented rows that are left, ``(batch,)``.
        group: ``(batch,)`` int64, 0 for clean, replaced and dropped rows.
        dropped: True for rejected rows whose batch does not tell their source, ``(batch,)``.
        left_fraction: Share of the augmented rows that are left, scalar; 1 where there were none.
    """

    augmented: Tensor
    group: Tensor
    dropped: Tensor
    left_fraction: Tensor


class Gates:
    """Gather evidence by group, and let fewer rows of harmful groups through.

    They start to move after a tenth of the training.
    """

    def __init__(self, memory: ValidationMemory) -> None:
        self._memory = memory
        self.names: tuple[str, ...] = ()
        self.log_weights = torch.zeros(0)
        self._moments = RunningMoments()
        self._is_checked = False

    def start(self, names: Sequence[str], num_batches: float, device: torch.device) -> None:
        """Take the groups of a fit, the clean rows first, and its number of batches.

        Raises:
            MisconfigurationException: If a checkpoint's gates belong to other groups.
        """
        if self.names and self.names != tuple(names):
            raise MisconfigurationException(
                f"Expected the gates of the checkpoint to be those of {list(names)}, but they "
                f"belong to {list(self.names)}. Resume with the augmentation of that run, or pass "
                "`gates=False`."
            )
        self._first_move = _WARM_UP * num_batches
        if not self.names:
            self.names = tuple(names)
            self.log_weights = torch.zeros(len(names))
        self.log_weights = self.log_weights.to(device)
        self._moments.to(device)

    def draw(self, batch: Any, generator: torch.Generator) -> Tensor | None:
        """Return which rows of an `AugmentedBatch` are rejected, of those that tell their source.

        None for any other batch: its rejected rows are dropped by `take`.
        """
        if not isinstance(batch, AugmentedBatch):
            return None
        if batch.group is None or batch.source is None:
            raise MisconfigurationException(
                "Expected `AugmentedBatch` to tell `group` and `source` of its rows for "
                f"`gates=True`, but one of them is None. {_WITHOUT}"
            )
        self._check(batch.augmented, batch.group, batch)
        rejected = draw_rejected(self.log_weights, batch.group, generator)
        return rejected & batch.augmented & (batch.source >= 0)

    def take(
        self,
        augmented: Tensor,
        group: Tensor | None,
        replaced: Tensor | None,
        generator: torch.Generator,
    ) -> GatedRows:
        """Return what is left of a batch whose loss is asked for.

        Raises:
            MisconfigurationException: If nobody tells the groups.
        """
        if group is None:
            raise MisconfigurationException(
                "Expected an `AugmentedBatch`, or `saflex_loss(..., augmented=, group=)`, for "
                "`gates=True`, but the training batch does not tell which group made its rows. "
                f"Yield an `AugmentedBatch` with `group` and `source`. {_WITHOUT}"
            )
        dropped = torch.zeros_like(augmented)
        if replaced is None:
            self._check(augmented, group)
            dropped = replaced = draw_rejected(self.log_weights, group, generator) & augmented
        left = augmented & ~replaced
        removed = replaced.sum()
        fraction = torch.where(removed > 0, left.sum() / (left.sum() + removed).clamp(min=1), 1)
        return GatedRows(left, torch.where(left, group, 0), dropped, fraction)

    def reweigh(self, weights: Tensor, gated: GatedRows, ranks: Ranks) -> Tensor:
        """Return sample weights with helpful groups raised and dropped rows at 0."""
        factors = self.log_weights.exp().clamp(min=1)[gated.group]
        weights = rescale_weights(weights, factors, gated.augmented, ranks)
        return weights.masked_fill(gated.dropped, 0)

    def update(
        self,
        number: int,
        features: Tensor,
        probs: Tensor,
        labels: Tensor,
        gated: GatedRows,
        options: LossOptions,
        ranks: Ranks,
    ) -> None:
        """Take a training batch's evidence in, and move the gates once the warm-up is over."""
        usable = features.isfinite().all(1) & probs.isfinite().all(1) & ~gated.dropped
        features = torch.where(usable.unsqueeze(1), features, 0)
        probs = torch.where(usable.unsqueeze(1), probs, 0)
        counted = usable.to(features.dtype)
        mean, covariance = self._moments.update(features, counted, ranks)
        val_features, val_residuals, _, present = self._memory.read()
        products = last_layer_products(
            features, probs, mean, covariance, val_features, val_residuals, present
        )
        products = loss_inner_products(products, *options)
        num_groups = len(self.names) - 1
        means, counts = group_evidence(products, labels, gated.group, num_groups, counted, ranks)
        if number >= self._first_move:
            self.log_weights = next_log_weights(self.log_weights, means, counts)

    def metrics(self) -> dict[str, Tensor]:
        """Return each group's w by its name."""
        weights = self.log_weights.exp()
        return {f"gate/{name}": weights[number] for number, name in enumerate(self.names) if number}

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank."""
        return {
            "names": self.names,
            "log_weights": self.log_weights,
            "moments": self._moments.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.names, self.log_weights = tuple(state["names"]), state["log_weights"]
        self._moments.load_state_dict(state["moments"])

    def _check(self, augmented: Tensor, group: Tensor, batch: AugmentedBatch | None = None) -> None:
        """Look at the values of a batch; once where that waits for the device."""
        if (self._is_checked and group.device.type != "cpu") or not bool(augmented.any()):
            return
        if bool(augmented.all()):
            raise MisconfigurationException(
                "Expected clean rows beside the augmented ones for `gates=True`, but every row of "
                "the batch is augmented. Only the difference to clean rows tells whether a group "
                f"helps: yield union batches. {_WITHOUT}"
            )
        num_groups = len(self.names) - 1
        wrong = augmented & ((group < 1) | (group > num_groups))
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0])
            raise MisconfigurationException(
                f"Expected the group of every augmented row to be in 1 to {num_groups} for "
                f"`gates=True`, as `saflex_group_names()` has {num_groups + 1} names, but got "
                f"{int(group[row])} in row {row}. Tell which operation made each row in "
                f"`AugmentedBatch.group`. {_WITHOUT}"
            )
        if batch is not None:
            check_replaceable(batch, _WITHOUT)
        self._is_checked = True
