"""Training batches of a table: whole batches at a time, since a row alone is too little work."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from saflex_lightning import AugmentedBatch
from saflex_lightning.data.checks import check
from saflex_lightning.data.mixing import mixing_group
from saflex_lightning.data.resumable import draw_and_row
from saflex_lightning.data.union import MadeRows, join_rows
from saflex_lightning.recipes.tabular.cutmix import (
    MixedRows,
    draw_ratio,
    mix_columns,
    replace_cells,
)
from saflex_lightning.recipes.tabular.table import TabularInputs

__all__ = ["AugmentationName", "CleanTable", "CutMix", "TrainingTable", "make_cutmix"]

AugmentationName = Literal["none", "cutmix", "cutmix_columns"]
_SETTINGS = {
    "none": (),
    "cutmix": ("num_groups", "probability"),
    "cutmix_columns": ("alpha", "num_groups", "probability"),
}


@dataclass(frozen=True, kw_only=True)
class CutMix:
    """Settings of an upstream augmentation.

    Attributes:
        mix_labels: `mix_columns` instead of `replace_cells`.
        probability: Of a cell to be replaced; with ``mix_labels``, of a batch to be mixed.
        alpha: With ``mix_labels``, see `draw_ratio`.
        num_groups: Bins of the share of changed cells that become groups.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If one is out of its range.
    """

    mix_labels: bool = False
    probability: float = 0.1
    alpha: float = 1.0
    num_groups: int = 4

    def __post_init__(self) -> None:
        check("True or False", mix_labels=self.mix_labels)
        check("a number in (0, 1]", probability=self.probability)
        check("a positive number", alpha=self.alpha)
        check("a positive integer", num_groups=self.num_groups)

    def draw(
        self, inputs: TabularInputs, target: Tensor, num_classes: int, generator: torch.Generator
    ) -> MixedRows:
        """Return one augmented row per clean row."""
        if not self.mix_labels:
            return replace_cells(inputs, target, probability=self.probability, generator=generator)
        ratio = draw_ratio(alpha=self.alpha, probability=self.probability, generator=generator)
        return mix_columns(
            inputs, target, num_classes=num_classes, ratio=ratio, generator=generator
        )

    def group(self, changed: Tensor) -> Tensor:
        """Return the strength bin of each row, 1 to ``num_groups``.

        Bins have equal width from 0 to the largest share to expect: 1 where columns are mixed, and
        twice the probability where single cells are replaced, beyond which lies the last bin.
        """
        return mixing_group(1.0 - (changed / self._largest).clamp(max=1.0), self.num_groups)

    @property
    def group_names(self) -> tuple[str, ...]:
        """What each group stands for; the numbers are shares of changed cells in percent."""
        edges = [100.0 * self._largest * n / self.num_groups for n in range(self.num_groups)]
        bins = pairwise([*edges, 100.0])
        return ("clean", *(f"cutmix_{low:.0f}_{high:.0f}" for low, high in bins))

    @property
    def _largest(self) -> float:
        return 1.0 if self.mix_labels else min(1.0, 2.0 * self.probability)


def make_cutmix(name: AugmentationName, settings: Mapping[str, Any] | None) -> CutMix | None:
    """Return an upstream augmentation by name; None for ``"none"``.

    Args:
        name: ``"cutmix"`` (`replace_cells`), ``"cutmix_columns"`` (`mix_columns`) or ``"none"``.
        settings: Attributes of `CutMix` other than ``mix_labels``; None keeps their defaults.

    Raises:
        ValueError: If the name is unknown, or it has no such setting.
    """
    check(tuple(_SETTINGS), augmentation=name)
    check("a mapping of names to values", optional=True, augmentation_settings=settings)
    settings = dict(settings or {})
    if unknown := sorted(set(settings) - set(_SETTINGS[name])):
        raise ValueError(
            f"Expected `augmentation_settings` of '{name}' to be among {list(_SETTINGS[name])}, "
            f"but got {unknown}. Remove them."
        )
    return None if name == "none" else CutMix(mix_labels=name == "cutmix_columns", **settings)


class CleanTable(Dataset[tuple[TabularInputs, Tensor]]):
    """Rows and labels without augmentation."""

    def __init__(self, inputs: TabularInputs, target: Tensor) -> None:
        self.inputs = inputs
        self.target = target

    def __len__(self) -> int:
        return len(self.target)

    def __getitem__(self, row: int) -> tuple[TabularInputs, Tensor]:
        return TabularInputs(*(part[row] for part in self.inputs)), self.target[row]


class TrainingTable(Dataset[AugmentedBatch]):
    """Training batches, each augmented by draws that depend on (seed, draw, its rows) alone.

    Neither the number of loader workers nor what the training does with the global random state
    changes them, so runs with and without SAFLEX see the same ones. Batches are addressed by lists
    of ``(draw, row)`` (see `EpochSampler`).

    Args:
        rows: The clean rows.
        num_classes: Number of classes.
        augmentation: None leaves all rows clean.
        replace: Keep the augmented rows alone, instead of one behind the clean rows for each.
        seed: Seed of the augmentation.
    """

    def __init__(
        self,
        rows: CleanTable,
        num_classes: int,
        *,
        augmentation: CutMix | None,
        replace: bool,
        seed: int,
    ) -> None:
        self.rows = rows
        self.num_classes = num_classes
        self.augmentation = augmentation
        self.replace = replace
        self.seed = seed

    @property
    def keeps_labels(self) -> bool:
        """Whether every augmented row has the label of its own row."""
        return self.augmentation is None or not self.augmentation.mix_labels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int] | int) -> AugmentedBatch:
        return self.__getitems__([key])

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> AugmentedBatch:
        """Return the batch of some ``(draw, row)``; the loader asks for a whole one."""
        pairs = [draw_and_row(key) for key in keys]
        index = torch.tensor([row for _, row in pairs])
        inputs = TabularInputs(*(part[index] for part in self.rows.inputs))
        target = self.rows.target[index]
        made = None
        if self.augmentation is not None:
            # No other batch holds the first pair.
            draw = np.random.SeedSequence((self.seed, *pairs[0])).generate_state(1, np.uint64)
            generator = torch.Generator().manual_seed(int(draw[0]))
            mixed = self.augmentation.draw(inputs, target, self.num_classes, generator)
            made = MadeRows(mixed.inputs, mixed.target, self.augmentation.group(mixed.changed))
        return join_rows(inputs, target, index, made, num_rows=len(self), replace=self.replace)

    def collate(self, batch: AugmentedBatch) -> AugmentedBatch:
        """Return the batch that the loader has asked for as a whole."""
        return batch
