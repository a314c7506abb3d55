"""CutMix for tables: cells of a row are replaced by the same columns of another row of the batch.

Two definitions are public and the paper names neither (Ding et al. 2024, section 5 and appendix C,
say "CutMix" and "augmentation probability like 0.1"):

- `replace_cells`, as in SAINT's augmentation: each cell by itself, with a probability; the label
  stays. This fits the paper's words and is the default of the recipes.
- `mix_columns`, Onishi and Meguro's: a share of the columns of each row, and a label that is mixed
  by the share of cells that stayed equal.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from saflex_lightning.recipes.tabular.table import TabularInputs

__all__ = ["MixedRows", "draw_ratio", "mix_columns", "replace_cells"]


class MixedRows(NamedTuple):
    """Augmented rows, one per clean row.

    Attributes:
        inputs: The cells.
        target: ``(batch,)`` int64, or ``(batch, classes)`` float32 with rows summing to 1.
        changed: Share of the cells of a row that differ from the clean row, ``(batch,)`` in [0, 1].
    """

    inputs: TabularInputs
    target: Tensor
    changed: Tensor


def replace_cells(
    inputs: TabularInputs, target: Tensor, *, probability: float, generator: torch.Generator
) -> MixedRows:
    """Replace each cell with a probability; labels stay (SAINT's CutMix).

    Args:
        inputs: Clean rows.
        target: Their labels, ``(batch,)``.
        probability: Of a cell to be replaced, in [0, 1].
        generator: Draws the other rows, one permutation per batch, and the cells.

    References:
        Somepalli et al. 2021, "SAINT: Improved Neural Networks for Tabular Data via Row Attention
        and Contrastive Pre-Training", section 4.
    """
    rows, columns = _shape(inputs)
    partner = torch.randperm(rows, generator=generator)
    replaced = torch.rand(rows, columns, generator=generator) < probability
    mixed = _replace(inputs, partner, replaced)
    return MixedRows(mixed, target, 1.0 - _equal_share(mixed, inputs))


def mix_columns(
    inputs: TabularInputs,
    target: Tensor,
    *,
    num_classes: int,
    ratio: float,
    generator: torch.Generator,
) -> MixedRows:
    r"""Keep a share of each row's columns, take the others from another row, mix the label.

    With s the share of cells equal to those of the clean row (which counts cells of both rows that
    agree), :math:`y = s\, e_{\text{own}} + (1 - s)\, e_{\text{other}}`.

    Args:
        inputs: Clean rows.
        target: Their labels, ``(batch,)`` int64.
        num_classes: Number of classes.
        ratio: Share of columns that are kept, in [0, 1]; their number is rounded down.
        generator: Draws the other rows, one permutation per batch, and each row's columns.

    References:
        Onishi and Meguro, supervised FT-Transformer with CutMix, in the code of "Rethinking data
        augmentation for tabular data in deep learning" (2023).
    """
    rows, columns = _shape(inputs)
    partner = torch.randperm(rows, generator=generator)
    rank = torch.rand(rows, columns, generator=generator).argsort(1).argsort(1)
    mixed = _replace(inputs, partner, rank >= int(columns * ratio))
    share = _equal_share(mixed, inputs)
    own = F.one_hot(target, num_classes).float()
    return MixedRows(mixed, torch.lerp(own[partner], own, share[:, None]), 1.0 - share)


def draw_ratio(*, alpha: float, probability: float, generator: torch.Generator) -> float:
    """Draw one batch's share of kept columns: Beta(alpha, alpha), or 1 where it is left alone.

    Args:
        alpha: Both parameters of the Beta distribution, positive; small values give shares near
            0 and 1.
        probability: Of a batch to be mixed, in [0, 1].
        generator: Makes the draw.
    """
    seed = torch.randint(2**62, (1,), generator=generator)
    numbers = np.random.default_rng(int(seed))  # torch's own Beta takes no generator
    return float(numbers.beta(alpha, alpha)) if numbers.random() < probability else 1.0


def _shape(inputs: TabularInputs) -> tuple[int, int]:
    return len(inputs.numeric), inputs.numeric.shape[1] + inputs.categorical.shape[1]


def _replace(inputs: TabularInputs, partner: Tensor, replaced: Tensor) -> TabularInputs:
    numeric, categorical = replaced.split([part.shape[1] for part in inputs], dim=1)
    return TabularInputs(
        torch.where(numeric, inputs.numeric[partner], inputs.numeric),
        torch.where(categorical, inputs.categorical[partner], inputs.categorical),
    )


def _equal_share(mixed: TabularInputs, clean: TabularInputs) -> Tensor:
    """Return the share of cells that two batches have in common, row by row."""
    equal = [one == other for one, other in zip(mixed, clean, strict=True)]
    return torch.cat(equal, dim=1).float().mean(1)
