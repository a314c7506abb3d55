"""What a data pipeline tells the solve about the rows of a batch."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["AugmentedBatch", "check_batch", "row_field"]


class AugmentedBatch(NamedTuple):
    """Rows of one training batch together with what the data pipeline knows about them.

    A union batch (Ding et al. 2024, Eq. 3) holds clean and augmented rows side by side; only the
    augmented ones are refined. The class is a named tuple, so collation, pinning and transfer
    treat it like any other tuple, and ``inputs, target = batch[:2]`` works.

    Attributes:
        inputs: Model inputs; every tensor in it has the rows in its first dimension.
        target: Labels, ``(batch,)`` int64 or ``(batch, classes)`` float with rows summing to 1.
        augmented: True where the row is augmented, ``(batch,)`` bool.
        group: What made the row (augmentation operation, strength bin, generator),
            ``(batch,)`` int64; 0 means clean.
        index: Identity of the row across epochs, ``(batch,)`` int64.
        source: Position in this batch of the clean row it was made from, ``(batch,)`` int64;
            -1 where there is none.
    """

    inputs: Any
    target: Tensor
    augmented: Tensor
    group: Tensor
    index: Tensor  # pyright: ignore[reportIncompatibleMethodOverride]  tuple.index is not used
    source: Tensor


def check_batch(batch: Any) -> None:
    """Refuse an `AugmentedBatch` whose fields cannot belong to one another.

    Args:
        batch: The training batch; others have nothing to check.

    Raises:
        ValueError: If a field has another length than the target, or another dtype.
    """
    if isinstance(batch, AugmentedBatch):
        target: Any = batch.target  # None where scores are contrastive
        size = len(batch.augmented if target is None else target)
        for name, dtype in _ROW_FIELDS.items():
            _check_rows(f"AugmentedBatch.{name}", getattr(batch, name), size, dtype, "target")


def row_field(
    batch: Any, name: Literal["augmented", "group", "index"], given: Tensor | None, size: int
) -> Tensor | None:
    """Return the mask, the group or the index of every row, or None where nobody tells.

    Args:
        batch: The training batch.
        name: Field of `AugmentedBatch`.
        given: The caller's own; not beside an `AugmentedBatch`, which has one.
        size: Rows that were scored.

    Returns:
        ``(batch,)`` bool or int64, or None; None as mask means that all rows are augmented.

    Raises:
        ValueError: If there are two of them, it has another length or dtype, or the batch holds
            an `AugmentedBatch` in a dictionary or list and nobody says whose rows were scored.
    """
    if isinstance(batch, AugmentedBatch):
        if given is not None:
            raise ValueError(
                f"Expected `{name}` to be None beside an `AugmentedBatch`, but got a second one. "
                "The extra pass has measured the batch's own rows; change them in the batch."
            )
        given = getattr(batch, name)
    elif given is None and _holds_augmented(batch):
        raise ValueError(
            f"Expected `saflex_loss(..., {name}=)` where an `AugmentedBatch` is a part of the "
            f"training batch, but got None, and which part was scored cannot be told. Pass "
            f"`{name}=part.{name}` of that one."
        )
    _check_rows(name, given, size, _ROW_FIELDS[name])
    return given


def _holds_augmented(batch: Any) -> bool:
    if isinstance(batch, AugmentedBatch):
        return True
    parts = batch.values() if isinstance(batch, dict) else batch
    return isinstance(batch, (dict, list, tuple)) and any(map(_holds_augmented, parts))


_ROW_FIELDS = {
    "augmented": torch.bool,
    "group": torch.int64,
    "index": torch.int64,
    "source": torch.int64,
}


def _check_rows(
    name: str, given: Tensor | None, size: int, dtype: torch.dtype, rows_of: str = "logits"
) -> None:
    if given is not None and (given.shape != (size,) or given.dtype != dtype):
        kind = "a bool" if dtype == torch.bool else "an int64"
        raise ValueError(
            f"Expected `{name}` to be {kind} tensor of shape ({size},), but got {given.dtype} of "
            f"shape {tuple(given.shape)}. Pass one entry per row of the {rows_of}."
        )
