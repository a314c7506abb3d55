"""Evidence of a fit: what validation rows say about augmented ones, gathered over many steps."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from saflex_lightning.functional.losses import (
    NO_OPTIONS,
    LossOptions,
    dense_target,
    looking_is_free,
)
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.solve import SAflexSolution, loss_inner_products

from .averages import RowAverages
from .discriminant import MOST_SCORES, Discriminant, best_temperature, fit_discriminant
from .groups import GroupMeans
from .memory import ValidationMemory
from .weights import SURE, Array, GroupWeights, host_array

__all__ = ["Evidence", "GatheredRows", "GroupEvidence", "Judgement"]

_REFIT = 10  # steps between two discriminants
_WARM_UP = 10  # training batches during which nothing is learned of groups
_WARM_UP_ALONE = 100  # and during which rows without clean ones beside them all count
_UNNAMED = 64  # groups that are served without names
_FLOOR = 1e-12  # below this, a root mean square counts as zero
_TRUST = 4  # the power of the information of validation rows that a step counts for
_LEAST_INFORMATION = 1e-3  # nats per row
_SMOOTHING = 0.3  # share of the newest discriminant in their running mean


class Judgement(NamedTuple):
    """What one step thinks of its rows.

    Attributes:
        posteriors: Of the given label, ``(rows,)``, in [0.0001, 0.9999].
        given: Gradient inner product of that label, ``(rows,)``.
        products: Those of every class, ``(rows, classes)``.
        classes: Posteriors of every class, ``(rows, classes)``.
    """

    posteriors: Tensor
    given: Tensor
    products: Tensor
    classes: Tensor


class GatheredRows(SAflexSolution):
    """What is made of a batch; what a step itself does not need is computed where it is read.

    Args:
        weights: ``(rows,)``, in [0, 2.01]; 1 for clean rows.
        failed: Whether a row's scores were not finite; such a row has weight 1, scalar bool.
        beliefs: Posterior of each label, averaged over the visits of its row where that is known,
            ``(rows,)``.
        target: Labels of the rows, which are kept.
        judgement: Of the rows.
        useless: Rows whose scores are not finite, ``(rows,)`` bool.
        ignored: These and clean rows, ``(rows,)`` bool.
        sizes: How many rows there are of each group, on all ranks, and the sum of the mean squares
            of their inner products, ``(groups, 2)``.
    """

    def __init__(
        self,
        weights: Tensor,
        failed: Tensor,
        beliefs: Tensor,
        target: Tensor,
        judgement: Judgement,
        useless: Tensor,
        ignored: Tensor,
        sizes: Tensor,
    ) -> None:
        vars(self).update(weights=weights, failed=failed)  # fields of the base are frozen
        self.beliefs = beliefs
        self._target, self._judgement = target, judgement
        self._useless, self._ignored, self._sizes = useless, ignored, sizes

    @cached_property
    def soft_labels(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Labels of the rows as they came, ``(rows, classes)``."""
        products = self._judgement.products
        return dense_target(self._target, products.shape[1], products.dtype)

    @cached_property
    def inner_products(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Inner products of gradients over `inner_product_rms`, 0 for rows that are ignored."""
        products = self._judgement.products / self.inner_product_rms.clamp(min=_FLOOR)
        return products.masked_fill(self._ignored.unsqueeze(1), 0)

    @cached_property
    def inner_product_rms(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Root mean square of the inner products of all rows, scalar."""
        count, squares = self._sizes.sum(0)
        return (squares / count.clamp(min=1)).sqrt()

    @cached_property
    def suggested(self) -> Tensor:
        """Most probable class, ``(rows,)`` int64; -1 for a row whose scores tell nothing."""
        return self._judgement.classes.argmax(-1).masked_fill(self._useless, -1)


class GroupEvidence(NamedTuple):
    """What steps have told of each group; the first is that of clean rows.

    Attributes:
        names: Of the groups; empty where the data names none.
        wrong_labels: Estimated share of wrong labels, ``(groups,)`` in [0, 0.9]; NaN for a group
            that was not seen.
        mean: Mean evidence of its rows as they are in the newest steps, positive where the group
            lowers the validation loss, ``(groups,)``.
        error: Its standard error, ``(groups,)``.
        steps: How many steps have shown the group beside clean rows, faded ones counting less,
            ``(groups,)``.
    """

    names: tuple[str, ...]
    wrong_labels: Tensor
    mean: Tensor
    error: Tensor
    steps: Tensor


class Evidence:
    """Judge rows by validation rows, weigh them, and learn what their groups are worth."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] | None = None  # () where the data names none
        self.memory = ValidationMemory()
        self.averages = RowAverages()
        self.rule = GroupWeights()
        self.groups = GroupMeans()
        self.seen = np.zeros(0)  # rows of each group so far, ``(groups,)``; clean ones first
        self.mean_weights = np.zeros(0)  # of the newest step that showed the group
        self.is_alone = True  # whether no clean row was shown when validation rows were last seen
        self._discriminant: Discriminant | None = None
        self._temperature: Tensor | None = None
        self._expected: Tensor | None = None  # mean log posterior of validation labels, by both
        self._fitted = 0  # the step at which it was
        self._information: float | None = None  # running mean, nats per validation row
        self._looks = True  # at values, in every step
        self._has_looked = False
        self._waiting: list[tuple[int, Tensor]] = []  # numbers of steps, and what they showed

    def start(self, names: Sequence[str], num_rows: int | None, device: torch.device) -> None:
        """Take the groups of a fit and the number of its validation rows, where they are known.

        Raises:
            MisconfigurationException: If a checkpoint's evidence belongs to other groups.
        """
        if self.names is not None and self.names != tuple(names):
            raise MisconfigurationException(
                f"Expected the groups of the checkpoint, {list(self.names)}, but the training data "
                f"names {list(names)}. Resume with the augmentation of that run, or start a new "
                "run."
            )
        self.names = tuple(names)
        self._looks = looking_is_free(device)
        groups = max(len(names), 2) if names else _UNNAMED
        self.memory.start(num_rows, device)
        self.averages.to(device)
        self.rule.start(groups)
        self.groups.start(groups)
        if not len(self.seen):
            self.seen, self.mean_weights = np.zeros(groups), np.ones(groups)
        self._waiting = [(number, sums.to(device)) for number, sums in self._waiting]
        if self._discriminant is not None:
            self._discriminant = Discriminant(*(part.to(device) for part in self._discriminant))
        if self._temperature is not None:
            self._temperature = self._temperature.to(device)
        if self._expected is not None:
            self._expected = self._expected.to(device)

    # Validation rows

    def remember(
        self, number: int, scores: Tensor, residuals: Tensor, labels: Tensor, ranks: Ranks
    ) -> None:
        """Take validation rows in before a step, and fit a new discriminant where it is due.

        What steps have shown is taken in as well: this is when the device is waited for.
        """
        self._take_in()
        self.averages.take_in()
        self.memory.add(scores, residuals, labels, ranks)
        if self._discriminant is None or number >= self._fitted + _REFIT:
            if self._temperature is None and scores.shape[1] > MOST_SCORES:
                rank_zero_info(
                    f"SAFLEX takes the covariance of {scores.shape[1]} scores to be diagonal, as "
                    f"of all that are more than {MOST_SCORES}."
                )
            rows = self.memory.read()
            scores, _, labels, present = rows
            self._temperature, information = best_temperature(scores, labels, present)
            self._trust(information.item())
            self._fitted = number
            self._discriminant = fit_discriminant(*rows)
            told = self.judge(scores, labels, NO_OPTIONS).posteriors.log() * present
            self._expected = told.sum() / present.sum().clamp(min=1)
        self.is_alone = not self.seen[0]

    def _trust(self, information: float) -> None:
        """Take in how much a new discriminant tells, in nats per row."""
        new = max(information, _LEAST_INFORMATION)
        old = new if self._information is None else self._information
        self._information = old + _SMOOTHING * (new - old)

    @property
    def _worth(self) -> float:
        """What a step counts for what many tell together."""
        assert self._information is not None
        return self._information**_TRUST

    def forget(self) -> None:
        """Let go of validation rows whose residuals are those of another loss."""
        self.memory.clear()
        self._discriminant = None

    # Training rows

    @torch.no_grad()
    def weigh(
        self,
        number: int,
        scores: Tensor,
        target: Tensor,
        augmented: Tensor,
        group: Tensor | None,
        index: Tensor | None,
        options: LossOptions,
        ranks: Ranks,
    ) -> GatheredRows | None:
        """Return what is made of a batch, having learned from it; None without validation rows.

        Scores are float32 or wider.
        """
        if self._discriminant is None:
            return None
        assert self._expected is not None
        group = self._group(group, augmented)
        judgement = self.judge(scores, target, options)
        posteriors, given, products, _ = judgement
        useless = (posteriors + given).isnan()  # of scores that are not finite
        ignored = useless | ~augmented
        newest = posteriors
        if index is not None:
            posteriors = self.averages.update(index, posteriors, ignored, ranks, self._worth)
        log_weights, own, told = self.rule.weigh(posteriors, group, scores.shape[-1])
        weights, trust = both = torch.stack([log_weights, own]).masked_fill(ignored, 0).exp()
        ones = torch.ones_like(given)
        sizes, expected = products.square().mean(-1), self._expected.expand_as(ones)
        columns = [weights, trust, *(both * given), ones, given, sizes, newest.log(), expected]
        columns = torch.column_stack([*columns, told])
        places = group.masked_fill(useless, len(self.seen))  # the last of the sums is of no use
        sums = columns.new_zeros(len(self.seen) + 1, columns.shape[1])
        sums = sums.index_add_(0, places, columns)[:-1]
        sums = ranks.sum(sums) if ranks.size > 1 else sums
        self._waiting.append((number, sums))
        if self._looks:
            self._take_in()
        if self.is_alone and number < _WARM_UP_ALONE:
            weights = ones
        return GatheredRows(
            weights,
            (useless & augmented).any(),
            posteriors,
            target,
            judgement,
            useless,
            ignored,
            sums[:, 4:7:2],  # `ones` and `sizes`
        )

    def judge(self, scores: Tensor, target: Tensor, options: LossOptions) -> Judgement:
        """Return what the discriminant thinks of rows; of clean ones too."""
        assert self._discriminant is not None
        assert self._temperature is not None
        logits, products = self._discriminant.judge(scores)
        products = loss_inner_products(products, *options)
        posteriors = classes = (self._temperature * logits).softmax(-1)
        if target.ndim == 1:
            column = target.long().unsqueeze(1)
            posteriors, given = (v.gather(1, column).squeeze(1) for v in (posteriors, products))
        else:
            labels = target.to(products)
            posteriors, given = ((labels * v).sum(-1) for v in (posteriors, products))
        return Judgement(posteriors.clamp(SURE, 1 - SURE), given, products, classes)

    def _group(self, group: Tensor | None, augmented: Tensor) -> Tensor:
        """Return the group of every row: 0 for clean ones, and 1 for the others of no group.

        Raises:
            ValueError: If an augmented row is in no group, or in one without a name; on others than
                the CPU looking waits for the device, and is done once.
        """
        if group is None:
            return augmented.long()
        if self._looks or not self._has_looked:
            self._has_looked = True
            self._check(group, augmented)
        return group * augmented

    def _check(self, group: Tensor, augmented: Tensor) -> None:
        most, groups = len(self.seen) - 1, group.cpu().numpy()
        wrong = augmented.cpu().numpy() & ((groups < 1) | (groups > most))
        if wrong.any():
            row = int(wrong.argmax())
            named = f"there are {most + 1} group names" if self.names else "none is named"
            raise ValueError(
                f"Expected the group of every augmented row to be in 1 to {most}, as {named}, "
                f"but got {groups[row]} in row {row}. Tell which operation made each row "
                "in `AugmentedBatch.group`, and name all with `saflex_group_names()`."
            )

    def _take_in(self) -> None:
        """Learn from what steps have shown; this looks at values."""
        if not self._waiting:
            return
        numbers, sums = zip(*self._waiting, strict=True)
        self._waiting = []
        for number, shown in zip(numbers, torch.stack(sums).cpu().double().numpy(), strict=True):
            self._learn(number, shown)

    def _learn(self, number: int, sums: Array) -> None:
        """Learn from the sums of a step, ``(groups, columns)``."""
        v, u, vs, us, count, s, squares = sums[:, :7].T
        scale = max((squares.sum() / max(count.sum(), 1)) ** 0.5, _FLOOR)
        total, present = max(v.sum(), _FLOOR), count > 0
        if present[1:].any():
            self.rule.compare(*-sums[0, 7:9])
            self.rule.watch(_of_groups(sums[:, 9:]), self._worth)
            if number >= _WARM_UP and not self.is_alone:
                slope = (vs - vs.sum() / total * v) / (scale * total)
                self.rule.ascend(_of_groups(slope))
        if number >= _WARM_UP and not self.is_alone:
            means = np.stack([s / count.clip(1), us / u.clip(_FLOOR)]) / scale
            self.rule.move_gates(self.groups.update(means, present))
        self.seen = self.seen + count
        self.mean_weights = np.where(present, v / count.clip(1), self.mean_weights)

    # What was learned

    def metrics(self) -> dict[str, Tensor]:
        """Return each group's share of wrong labels, and mean weight of its rows, by its name."""
        found: dict[str, Tensor] = {}
        names = self.names or [f"group {number}" for number in range(len(self.seen))]
        numbers, wrong = range(1, len(names)), self._wrong_labels()
        for number in numbers if self.names else [n for n in numbers if self.seen[n]]:
            found[f"wrong_labels/{names[number]}"] = torch.tensor(wrong[number])
            found[f"weight/{names[number]}"] = torch.tensor(self.mean_weights[number])
        return found

    def read_groups(self) -> GroupEvidence | None:
        """Return what the newest steps tell of each group; None before a fit has begun."""
        if self.names is None:
            return None
        mean, error = (parts[0] for parts in self.groups.read())
        columns = (self._wrong_labels(), mean, error, self.groups.steps)
        return GroupEvidence(self.names or (), *(torch.from_numpy(part.copy()) for part in columns))

    def _wrong_labels(self) -> Array:
        """Return the estimated share of wrong labels of each group; clean rows have none."""
        found = np.where(self.seen > 0, self.rule.wrong_labels, np.nan)
        found[0] = 0
        return found

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs, equal on every rank."""
        return {
            "names": self.names,
            "memory": self.memory.state_dict(),
            "rows": self.averages.state_dict(),
            "rule": self.rule.state_dict(),
            "groups": self.groups.state_dict(),
            "seen": torch.from_numpy(self.seen),
            "mean_weights": torch.from_numpy(self.mean_weights),
            "waiting_numbers": tuple(number for number, _ in self._waiting),
            "waiting": tuple(sums for _, sums in self._waiting) or None,
            "discriminant": self._discriminant and tuple(self._discriminant),
            "temperature": self._temperature,
            "expected": self._expected,
            "information": self._information,
            "fitted": self._fitted,
            "is_alone": self.is_alone,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.names = None if state["names"] is None else tuple(state["names"])
        self.memory.load_state_dict(state["memory"])
        self.averages.load_state_dict(state["rows"])
        self.rule.load_state_dict(state["rule"])
        self.groups.load_state_dict(state["groups"])
        self.seen, self.mean_weights = (host_array(state[n]) for n in ("seen", "mean_weights"))
        self._waiting = list(zip(state["waiting_numbers"], state["waiting"] or (), strict=True))
        parts = state["discriminant"]
        self._discriminant = None if parts is None else Discriminant(*parts)
        self._temperature = state["temperature"]
        self._expected = state["expected"]
        self._information = state["information"]
        self._fitted = state["fitted"]
        self.is_alone = state["is_alone"]


def _of_groups(values: Array) -> Array:
    """Return values of groups with 0 for the clean rows, of which nothing is learned."""
    return np.concatenate([np.zeros_like(values[:1]), values[1:]])
