"""Rows mixed with one another, in groups by how much of a row is foreign."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from .checks import check

__all__ = ["check_mixing", "group_of_mixed", "is_mixing", "mixing_group", "mixing_group_names"]

_KORNIA_MIXING = ("RandomCutMixV2", "RandomMixUpV2", "RandomMosaic", "RandomTransplantation")


def mixing_group(kept_share: Tensor, num_bins: int = 4) -> Tensor:
    r"""Return the group of mixed rows, by strength.

    A row mixed as :math:`\lambda x_i + (1 - \lambda) x_j` keeps the share lambda of its source i;
    the foreign share 1 - lambda falls into one of equal bins of [0, 1].

    Args:
        kept_share: lambda, ``(batch,)`` or scalar, in [0, 1]. For cell-wise mixing it is the share
            of cells that were kept.
        num_bins: Number of groups, at least 1.

    Returns:
        int64 of the same shape, in 1 to ``num_bins``; 1 is the weakest mixing.

    Raises:
        TypeError: If ``num_bins`` is no integer.
        ValueError: If it is not positive.

    Example:
        >>> mixing_group(torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0]))
        tensor([1, 1, 3, 4, 4])
    """
    check("a positive integer", num_bins=num_bins)
    return ((1 - kept_share) * num_bins).floor().long().clamp(0, num_bins - 1) + 1


def mixing_group_names(name: str, num_bins: int = 4) -> tuple[str, ...]:
    """Return the name of every group of `mixing_group`, with that of clean rows before them.

    Args:
        name: Name of the augmentation.
        num_bins: As for `mixing_group`.

    Returns:
        ``num_bins + 1`` names; the numbers in them are foreign shares in percent.

    Raises:
        TypeError: If ``num_bins`` is no integer.
        ValueError: If it is not positive.

    Example:
        >>> mixing_group_names("mixup", 2)
        ('clean', 'mixup_0_50', 'mixup_50_100')
    """
    check("a positive integer", num_bins=num_bins)
    edges = [round(100 * number / num_bins) for number in range(num_bins + 1)]
    return ("clean", *(f"{name}_{low}_{high}" for low, high in pairwise(edges)))


def is_mixing(augment: object) -> bool:
    """Say whether a transform mixes the rows of a batch: MixUp, CutMix, one of these, or timm's."""
    if isinstance(augment, v2.RandomChoice):
        return all(map(is_mixing, augment.transforms))
    if isinstance(augment, (v2.MixUp, v2.CutMix)):
        return True
    return f"{type(augment).__module__}.{type(augment).__name__}" == "timm.data.mixup.Mixup"


def check_mixing(augment: object) -> None:
    """Refuse augmentations of kornia that mix rows, whose labels have another form."""
    parts = augment.modules() if isinstance(augment, nn.Module) else ()
    for name in (type(part).__name__ for part in parts):
        if name in _KORNIA_MIXING:
            raise ValueError(
                f"Expected `augment` to leave labels alone, or to return class probabilities, but "
                f"{name} of kornia mixes rows and gives the labels apart. Pass `MixUp` or `CutMix` "
                "of torchvision."
            )


def group_of_mixed(mixed: Tensor, target: Tensor, *, per_row: bool = False) -> Tensor:
    """Return the group of rows whose labels ``target`` became ``mixed``, ``(batch, classes)``.

    A share drawn for the whole batch shows wherever two classes were mixed; one drawn ``per_row``
    does not where a row was mixed with one of its own class, which is then in group 1.
    """
    own = F.one_hot(target.long(), mixed.shape[-1]) if target.ndim == 1 else target
    kept = (mixed * own).sum(-1)
    return mixing_group(kept if per_row else kept.min().expand(len(target)))
