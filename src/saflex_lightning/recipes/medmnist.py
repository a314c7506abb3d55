"""Read a MedMNIST file and check every assumption the recipes make about it."""

from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from saflex_lightning.data.files import read_arrays
from saflex_lightning.recipes.images import Split

__all__ = ["read_medmnist"]

FILE = "bloodmnist_subset.npz"
SPLITS = ("train", "val", "test")


def read_medmnist(
    path: str | Path | None = None,
    *,
    num_classes: int | None = None,
    in_channels: int | None = None,
) -> dict[str, Split]:
    """Return the splits ``train``, ``val`` and ``test`` of a 2D MedMNIST file.

    Args:
        path: An official MedMNIST ``.npz``; None reads the BloodMNIST subset that ships with the
            package.
        num_classes: Number of classes the labels must stay below; None skips the check.
        in_channels: 1 for grey images, 3 for colour; None skips the check.

    Returns:
        One `Split` per name.

    Raises:
        ValueError: If the file is not an ``.npz`` archive, or holds something else than a
            single-label 2D MedMNIST set.

    Example:
        >>> blood = read_medmnist()
        >>> blood["train"].images.shape
        torch.Size([1200, 3, 28, 28])
    """
    file = _find_file(path)
    keys = [f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels")]
    arrays = read_arrays(file, keys, "Pass a 2D MedMNIST file as it was downloaded.")
    splits = {}
    for split in SPLITS:
        images = _check_images(
            arrays[f"{split}_images"], f"`{split}_images` of {file}", in_channels=in_channels
        )
        target = _check_labels(
            arrays[f"{split}_labels"],
            f"`{split}_labels` of {file}",
            rows=len(images),
            num_classes=num_classes,
        )
        splits[split] = Split(images, target)
    return splits


def _find_file(path: str | Path | None) -> Path:
    if path is None:
        # A wheel is unpacked when it is installed, so the resource is a real file.
        return Path(str(resources.files("saflex_lightning.recipes") / "assets" / FILE))
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected `path` to name a MedMNIST .npz file, but there is no file at {file}. "
            "Download one from Zenodo record 10519652; the folder that holds several is `root`, "
            "and `dataset='blood_subset'` ships with the package."
        )
    return file


def _check_images(images: np.ndarray, what: str, *, in_channels: int | None) -> Tensor:
    grey = images.ndim == 3
    colour = images.ndim == 4 and images.shape[-1] == 3
    if images.dtype != np.uint8 or not (grey or colour) or len(images) == 0:
        raise ValueError(
            f"Expected {what} to be uint8 of shape (n, height, width) or (n, height, width, 3), "
            f"n > 0, but got {images.dtype} of shape {images.shape}. Pass a 2D MedMNIST file; 3D "
            "sets are not supported."
        )
    if in_channels not in {None, 1 if grey else 3}:
        raise ValueError(
            f"Expected {what} to have `in_channels`={in_channels}, but got shape {images.shape}. "
            "Pass 1 for grey images and 3 for colour, or leave `in_channels` out."
        )
    tensor = torch.from_numpy(images)
    return tensor.unsqueeze(1) if grey else tensor.permute(0, 3, 1, 2).contiguous()


def _check_labels(labels: np.ndarray, what: str, *, rows: int, num_classes: int | None) -> Tensor:
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape not in {(rows,), (rows, 1)}:
        raise ValueError(
            f"Expected {what} to be integers of shape ({rows}, 1), one class per image, but got "
            f"{labels.dtype} of shape {labels.shape}. Pass a single-label set; multi-label sets "
            "such as ChestMNIST are not supported."
        )
    target = torch.from_numpy(labels.reshape(-1).astype(np.int64))
    low, high = int(target.min()), int(target.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "" if num_classes is None else f" and below `num_classes`={num_classes}"
        raise ValueError(
            f"Expected {what} to be at least 0{limit}, but they range from {low} to {high}. Pass "
            "the number of classes of this set, or leave `num_classes` out."
        )
    return target
