"""What a data pipeline tells about the rows of a batch, and how any batch is read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

__all__ = [
    "AugmentedBatch",
    "check_rows",
    "read_batch",
    "row_field",
]

_ROW_FIELDS = {
    "augmented": torch.bool,
    "group": torch.int64,
    "index": torch.int64,
}
_INPUTS = ("inputs", "input", "x", "image", "images")
_TARGETS = ("target", "targets", "y", "label", "labels")


@dataclass(eq=False)
class AugmentedBatch:
    """Rows of one training batch together with what the data pipeline knows about them.

    A union batch (Ding et al. 2024, Eq. 3) holds clean and augmented rows side by side; only the
    augmented ones are refined. Written for pairs works: ``inputs, target = batch``, ``batch[0]``.

    Args:
        inputs: Model inputs; every tensor in it has the rows in its first dimension.
        target: Labels, ``(batch,)`` integers or ``(batch, classes)`` float with rows summing to 1;
            None where scores are contrastive.
        augmented: True where the row is augmented, ``(batch,)`` bool.
        group: What made the row (augmentation operation, strength bin, generator),
            ``(batch,)`` int64; 0 means clean. None where nobody knows.
        index: Identity of the row across epochs, ``(batch,)`` int64, any number.

    Raises:
        ValueError: If a field has another dtype, or not one entry per row.
    """

    inputs: Any
    target: Tensor | None
    augmented: Tensor
    group: Tensor | None = None
    index: Tensor | None = None

    def __post_init__(self) -> None:
        augmented: Any = self.augmented
        rows: Any = augmented if self.target is None else self.target
        if not isinstance(rows, Tensor) or rows.ndim == 0:
            raise ValueError(
                "Expected `AugmentedBatch.target` to be a tensor with a label per row, but got "
                f"{_describe(rows)}. Pass torch.tensor(labels)."
            )
        for name, dtype in _ROW_FIELDS.items():
            _check_rows(f"AugmentedBatch.{name}", getattr(self, name), len(rows), dtype, "target")
        if augmented is None:
            raise ValueError(
                "Expected `AugmentedBatch.augmented` to say which rows are augmented, but got "
                "None. Pass a bool tensor with an entry per row, True for all where none is clean."
            )

    def __iter__(self) -> Iterator[Any]:
        return iter((self.inputs, self.target))

    def __getitem__(self, place: Any) -> Any:
        return (self.inputs, self.target)[place]

    def __len__(self) -> int:
        return 2

    def to(self, device: Any, **_options: Any) -> "AugmentedBatch":
        """Return the batch on a device; Lightning's transfer calls it.

        Args:
            device: The device.
            **_options: Ignored; copies wait for nothing where they can.
        """
        return self._mapped(lambda field: move_data_to_device(field, device))

    def pin_memory(self) -> "AugmentedBatch":
        """Return the batch in pinned memory; `torch.utils.data.DataLoader` calls it."""
        return self._mapped(lambda field: apply_to_collection(field, Tensor, Tensor.pin_memory))

    def _mapped(self, function: Any) -> "AugmentedBatch":
        return AugmentedBatch(*(function(getattr(self, field.name)) for field in fields(self)))


def check_rows(batch: AugmentedBatch) -> None:
    """Refuse groups that can be none; looking waits for the device.

    Raises:
        ValueError: The message names the row and the value.
    """
    group = None if batch.group is None else batch.group.cpu().numpy()
    if group is not None and (group < 0).any():
        row = int((group < 0).argmax())
        raise ValueError(
            f"Expected `AugmentedBatch.group` to be at least 0, but got {group[row]} in row {row}. "
            "Mend the data pipeline."
        )


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
    if isinstance(batch, (tuple, list, AugmentedBatch)) and len(batch) >= 2:
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


def _holds_augmented(batch: Any) -> bool:
    if isinstance(batch, AugmentedBatch):
        return True
    parts = batch.values() if isinstance(batch, dict) else batch
    return isinstance(batch, (dict, list, tuple)) and any(map(_holds_augmented, parts))


def _check_rows(
    name: str, given: Any, size: int, dtype: torch.dtype, rows_of: str = "logits"
) -> None:
    kind = "a bool" if dtype == torch.bool else "an int64"
    fits = isinstance(given, Tensor) and given.shape == (size,) and given.dtype == dtype
    if given is not None and not fits:
        raise ValueError(
            f"Expected `{name}` to be {kind} tensor of shape ({size},), but got "
            f"{_describe(given)}. Pass one entry per row of the {rows_of}."
        )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r:.40}"
