"""A union batch of a batch that is there, augmented as a whole on the device where it is."""

from collections.abc import Callable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from saflex_lightning.batch import AugmentedBatch

from .checks import check
from .mixing import check_mixing, is_mixing
from .operations import TagOperations, can_be_tagged
from .union import MadeRows, check_shape, join_rows, mix_rows

__all__ = ["union_batch"]


def union_batch(
    inputs: Any,
    target: Tensor,
    augment: Callable[..., Any],
    *,
    index: Tensor | None = None,
) -> AugmentedBatch:
    """Return a batch with one augmented row for each of its clean rows.

    For augmentations that work on batches: those of kornia in ``on_after_batch_transfer``, MixUp
    and CutMix there or in a collate function. `group_names_of` has the names of the groups::

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return union_batch(*batch, self.augment) if self.trainer.training else batch

        def saflex_group_names(self):
            return group_names_of(self.augment)

    It draws from the global generators of the process; what `union_loader` draws is a function of
    seed, epoch and row, so that a resumed run draws it again.

    Args:
        inputs: Clean rows, ``(batch, ...)``, or a mapping or sequence of such tensors.
        target: Their labels, ``(batch,)`` integers or ``(batch, classes)`` probabilities.
        augment: From the inputs to others of the same shapes, in group 1; RandAugment and its like
            draw once for the whole batch, and give its group. MixUp and CutMix (torchvision, timm)
            and what has an attribute ``changes_label`` that is True are called with inputs and
            target and return both.
        index: Identity of the clean rows across epochs, ``(batch,)`` int64, not negative; that of
            the row made from row i is ``-1 - index[i]``.

    Returns:
        Twice as many rows, the clean ones first.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a length does not fit, the augmented inputs are of other shapes, or kornia
            mixes them.

    Example:
        >>> batch = union_batch(torch.rand(2, 3, 8, 8), torch.tensor([0, 1]), torch.fliplr)
        >>> batch.inputs.shape, batch.target, batch.augmented
        (torch.Size([4, 3, 8, 8]), tensor([0, 1, 0, 1]), tensor([False, False,  True,  True]))
    """
    check("a function", augment=augment)
    check("a tensor of integers, (rows,)", optional=True, index=index)
    labels: Any = target
    if not isinstance(labels, Tensor) or labels.ndim == 0:
        raise TypeError(
            "Expected `target` to be a tensor with a label per row, but got "
            f"{type(labels).__name__}. Pass torch.tensor(labels)."
        )
    parts: list[Any] = []
    apply_to_collection(inputs, object, parts.append, wrong_dtype=(dict, list, tuple))
    if not parts or not all(isinstance(part, Tensor) and _has_rows(part, target) for part in parts):
        found = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
        raise ValueError(
            f"Expected `inputs` to be tensors with a row for each of {len(target)} labels, but got "
            f"{found}. Leave what is not a row out."
        )
    if index is not None and not _has_rows(index, target):
        raise ValueError(
            f"Expected `index` to have a number for each of {len(target)} rows, but got "
            f"{len(index)}. Pass that of every clean row."
        )
    check_mixing(augment)
    rows = torch.arange(len(target), device=target.device)
    if is_mixing(augment):
        made = mix_rows(augment, inputs, target)
    elif getattr(augment, "changes_label", False):
        images, labels = augment(inputs, target)
        made = MadeRows(images, labels, torch.ones_like(rows))
    elif can_be_tagged(augment):
        tagged = TagOperations(augment)(inputs)
        made = MadeRows(tagged.image, target, torch.full_like(rows, tagged.group))
    else:
        made = MadeRows(augment(inputs), target, torch.ones_like(rows))
    check_shape(inputs, made.inputs, "inputs")
    batch = join_rows(inputs, target, rows, made, num_rows=len(rows))
    batch.index = None if index is None else torch.cat([index, -1 - index])
    return batch


def _has_rows(part: Tensor, target: Tensor) -> bool:
    return part.ndim > 0 and len(part) == len(target)
