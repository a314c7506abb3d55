"""What a data pipeline tells about the rows of a batch, and how any batch is read."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = [
    "AugmentedBatch",
    "check_batch",
    "check_replaceable",
    "read_batch",
    "replace_rows",
    "row_field",
]

_ROW_FIELDS = {
    "augmented": torch.bool,
    "group": torch.int64,
    "index": torch.int64,
    "source": torch.int64,
}
_INPUTS = ("inputs", "input", "x", "image", "images")
_TARGETS = ("target", "targets", "y", "label", "labels")


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
    """Refuse an `AugmentedBatch` whose fields cannot belong to one another."""
    if isinstance(batch, AugmentedBatch):
        target: Any = batch.target  # None where scores are contrastive
        size = len(batch.augmented if target is None else target)
        for name, dtype in _ROW_FIELDS.items():
            _check_rows(f"AugmentedBatch.{name}", getattr(batch, name), size, dtype, "target")


def row_field(
    batch: Any, name: Literal["augmented", "group", "index"], given: Tensor | None, size: int
) -> Tensor | None:
    """Return the mask, the group or the index of every row, or None where nobody tells.

    Raises:
        ValueError: If there are two of them, it has another length or dtype, or the batch holds
            an `AugmentedBatch` in a dictionary or list and nobody says whose rows were scored.
    """
    if isinstance(batch, AugmentedBatch):
        if given is not None:
            raise ValueError(
                f"Expected `{name}` to be None beside an `AugmentedBatch`, but got a second one. "
                "The batch's own rows are refined; change them in the batch."
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


def read_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return the inputs and the target of a batch; see `SAflexMixin.saflex_val_batch`.

    Raises:
        TypeError: If the batch has no such fields, or several that could be meant.
    """
    if isinstance(batch, (tuple, list)) and len(batch) >= 2:
        return batch[0], batch[1]
    if is_dataclass(batch):
        found: Mapping[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    else:
        found = batch if isinstance(batch, Mapping) else getattr(batch, "__dict__", {})
    inputs = [name for name in _INPUTS if name in found]
    targets = [name for name in _TARGETS if name in found]
    if len(inputs) != 1 or len(targets) != 1:
        raise TypeError(
            "Expected a validation batch to be a tuple or list of (inputs, target), or a mapping "
            f"or dataclass with one of {_INPUTS} and one of {_TARGETS}, but got "
            f"{type(batch).__name__} with fields {sorted(map(str, found))}. Override "
            "`saflex_val_batch(batch)` to return (inputs, target)."
        )
    return found[inputs[0]], found[targets[0]]


def check_replaceable(batch: AugmentedBatch, otherwise: str) -> None:
    """Refuse a batch whose augmented rows cannot give way to the clean rows they were made from."""
    size = len(batch.augmented)
    source = batch.source[batch.augmented]
    inside = (source >= 0) & (source < size)
    if not bool(inside.all()) or bool(batch.augmented[source].any()):
        raise MisconfigurationException(
            "Expected `AugmentedBatch.source` to be the position of a clean row of the batch for "
            "every augmented row for `gates=True`, but some have none, or an augmented one. "
            f"Yield union batches that tell the source. {otherwise}"
        )


def replace_rows(values: Any, places: Tensor) -> Any:
    """Return values with row ``places[i]`` in the place of row i, in new tensors.

    Raises:
        MisconfigurationException: If a leaf is no tensor with these rows.
    """
    size = len(places)

    def replace(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and len(leaf) == size:
            return leaf[places]
        if leaf is None or isinstance(leaf, (bool, int, float)):
            return leaf
        found = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        raise MisconfigurationException(
            f"Expected the inputs of `saflex_forward` to be tensors with {size} rows for "
            f"`gates=True`, but got {found}. Put what is not a row elsewhere. Pass `gates=False` "
            "to train without."
        )

    return apply_to_collection(values, object, replace, wrong_dtype=(dict, list, tuple))


def _holds_augmented(batch: Any) -> bool:
    if isinstance(batch, AugmentedBatch):
        return True
    parts = batch.values() if isinstance(batch, dict) else batch
    return isinstance(batch, (dict, list, tuple)) and any(map(_holds_augmented, parts))


def _check_rows(
    name: str, given: Tensor | None, size: int, dtype: torch.dtype, rows_of: str = "logits"
) -> None:
    if given is not None and (given.shape != (size,) or given.dtype != dtype):
        kind = "a bool" if dtype == torch.bool else "an int64"
        raise ValueError(
            f"Expected `{name}` to be {kind} tensor of shape ({size},), but got {given.dtype} of "
            f"shape {tuple(given.shape)}. Pass one entry per row of the {rows_of}."
        )
