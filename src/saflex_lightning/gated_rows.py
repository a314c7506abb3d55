"""The rows of a training batch that gates act on: what must hold of them, and the swap."""

from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from .batch import AugmentedBatch

__all__ = ["WITHOUT_GATES", "check_gated_rows", "swap_rows"]

WITHOUT_GATES = "Pass `gates=False` to train without."


def check_gated_rows(
    augmented: Tensor, group: Tensor, num_groups: int, batch: AugmentedBatch | None = None
) -> None:
    """Check a batch that has augmented rows; looking at values waits for the device.

    Args:
        augmented: Mask of augmented rows, ``(batch,)``, not all False.
        group: ``(batch,)`` int64.
        num_groups: Groups there are; group 0 is that of clean rows and not counted.
        batch: The batch whose rows will be replaced; None where they are dropped instead.

    Raises:
        MisconfigurationException: If there are no clean rows to compare with, a group is unknown,
            or a row does not tell the clean row it was made from.
    """
    if bool(augmented.all()):
        raise MisconfigurationException(
            "Expected clean rows beside the augmented ones for `gates=True`, but every row of "
            "the batch is augmented. Only the difference to clean rows tells whether a group "
            f"helps: yield union batches. {WITHOUT_GATES}"
        )
    found = group[augmented]
    if bool(((found < 1) | (found > num_groups)).any()):
        raise MisconfigurationException(
            f"Expected the group of every augmented row to be in 1 to {num_groups} for "
            f"`gates=True`, as `saflex_group_names()` has {num_groups + 1} names, but got "
            f"{sorted(set(found.tolist()))}. Tell which operation made each row in "
            f"`AugmentedBatch.group`. {WITHOUT_GATES}"
        )
    if batch is not None:
        _check_sources(batch)


def swap_rows(batch: AugmentedBatch, rows: Tensor) -> None:
    """Write the clean source of some rows in their place, in the batch's own tensors.

    Inputs, target and index are the source's; the row then counts as clean.

    Args:
        batch: The batch.
        rows: Which rows; each has a source, ``(batch,)`` bool.
    """
    here = torch.arange(len(rows), device=rows.device)
    places = torch.where(rows, batch.source, here)

    def swap(tensor: Tensor) -> Tensor:
        return tensor.copy_(tensor[places])

    apply_to_collection(batch.inputs, Tensor, swap)
    swap(batch.target)
    index: Any = batch.index
    if index is not None:
        swap(index)
    batch.augmented.masked_fill_(rows, False)
    batch.group.masked_fill_(rows, 0)
    batch.source.masked_fill_(rows, -1)


def _check_sources(batch: AugmentedBatch) -> None:
    size = len(batch.augmented)
    source = batch.source[batch.augmented]
    inside = (source >= 0) & (source < size)
    if not bool(inside.all()) or bool(batch.augmented[source].any()):
        raise MisconfigurationException(
            "Expected `AugmentedBatch.source` to be the position of a clean row of the batch for "
            "every augmented row for `gates=True`, but some have none, or an augmented one. "
            f"Yield union batches that tell the source. {WITHOUT_GATES}"
        )
    leaves: list[object] = []
    apply_to_collection(batch.inputs, object, leaves.append, wrong_dtype=(dict, list, tuple))
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0 or len(leaf) != size:
            found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
            raise MisconfigurationException(
                f"Expected the inputs of an `AugmentedBatch` to be tensors with {size} rows for "
                f"`gates=True`, but got {found}. Put what is not a row elsewhere. {WITHOUT_GATES}"
            )
