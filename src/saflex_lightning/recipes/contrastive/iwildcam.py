"""iWildCam2020-wilds as it lies on a disk: images of animals and a table of splits and labels."""

from pathlib import Path, PurePosixPath
from typing import Any

import torch

from saflex_lightning.data.checks import check
from saflex_lightning.data.files import read_records
from saflex_lightning.data.mixing import is_mixing
from saflex_lightning.recipes.datamodule import Splits
from saflex_lightning.recipes.folders import FileImages
from saflex_lightning.recipes.image_data import ImageDataModule
from saflex_lightning.recipes.images import Split
from saflex_lightning.recipes.soft_crop import SoftCrop

__all__ = ["IWildCamDataModule"]

SPLITS = ("train", "id_val", "id_test", "test")


class IWildCamDataModule(ImageDataModule):
    """iWildCam2020-wilds v2.0, with an upstream augmentation and the rows that steer SAFLEX.

    The package ``wilds`` downloads it (12 GB); nothing but its files is needed here:
    ``metadata.csv`` with the columns ``split``, ``filename`` and ``y``, ``categories.csv`` with
    ``y`` and ``name``, and the images in ``train/``. Images are resized to a square. Validation
    rows are those of known cameras (``id_val``), the first test loader too (``id_test``), the
    second one has unknown cameras (``test``).

    Args:
        root: Folder of the set, usually ``iwildcam_v2.0``.
        num_classes: Number of classes that ``categories.csv`` must have; None skips the check.
        image_size: Side of the images in pixels.
        batch_size: As for `UnionDataModule`.
        **shared: As for `ImageDataModule` and `UnionDataModule`; augmentations that mix labels are
            refused, since no caption says them.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        num_classes: int | None = None,
        image_size: int = 224,
        batch_size: int = 256,
        **shared: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, **shared)
        check("a path", root=root)
        check("a positive integer", image_size=image_size)
        check("a positive integer", optional=True, num_classes=num_classes)
        augment = self._make_augmentation(2)
        if is_mixing(augment) or isinstance(augment, SoftCrop):
            raise ValueError(
                "Expected an `augmentation` that keeps the label, since a caption names one class, "
                f"but got '{self.augmentation}'. Choose randaugment, trivialaugment, autoaugment, "
                "augmix or crop."
            )
        self.root = root
        self.num_classes = num_classes
        self.image_size = image_size

    def make_splits(self) -> Splits:
        """Read the two tables."""
        root = Path(self.root).expanduser()
        self._names = _read_categories(root / "categories.csv", self.num_classes)
        rows = _read_rows(root / "metadata.csv", len(self._names))
        train, val, *tests = (self._make_split(root / "train", rows[name]) for name in SPLITS)
        return Splits(train, val, tests)

    def _make_split(self, folder: Path, rows: list[tuple[str, int]]) -> Split:
        files = [folder / name for name, _ in rows]
        if not files[0].is_file():
            raise FileNotFoundError(
                f"Expected the images of `metadata.csv` in {folder}, but there is no {files[0]}. "
                "Point `root` at the folder of iWildCam2020-wilds that holds both."
            )
        target = torch.tensor([label for _, label in rows])
        return Split(FileImages(files, self.image_size), target)

    def sizes(self) -> dict[str, int]:
        """Return the number of classes and of channels; needs `setup`."""
        return {"num_classes": len(self._names), "in_channels": 3}

    def class_names(self) -> list[str]:
        """Return the name of each label; needs `setup`."""
        return self._names


_UNUSED = 99_999  # the label of categories that occur in no split


def _read_table(
    file: Path, columns: tuple[str, ...], labels: range
) -> list[tuple[int, int, dict[str, str]]]:
    """Return the line, the label and the cells of every row."""
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected iWildCam2020-wilds v2.0 in {file.parent}, but there is no {file.name} in "
            "it. Download the set with `wilds.get_dataset('iwildcam', download=True)` and point "
            "`root` at its folder."
        )
    table = []
    for line, row in read_records(file, columns, "Take the file of version 2.0 as it is."):
        is_number = row["y"].isdecimal() and len(row["y"]) < 10
        label = int(row["y"]) if is_number else -1
        if label not in labels:
            raise ValueError(
                f"Expected labels `y` in [0, {labels[-1]}] in {file}, but line {line} has "
                f"'{row['y']}'. Take both files of one version."
            )
        table.append((line, label, row))
    return table


def _read_categories(file: Path, num_classes: int | None) -> list[str]:
    """Return the names in the order of their labels; labels without a name get a number.

    An added column ``english`` goes before the scientific ``name``, as in FLYP's captions.
    """
    names: dict[int, str] = {}
    for line, label, row in _read_table(file, ("y", "name"), range(_UNUSED + 1)):
        if label in names and label != _UNUSED:
            raise ValueError(
                f"Expected one line per label in {file}, but line {line} has {label} again. Remove "
                "one of the two."
            )
        names[label] = row.get("english") or row["name"]
    names.pop(_UNUSED, None)
    last = max(names, default=-1)
    if last < 0 or num_classes not in (None, last + 1):
        wanted = "one class or more" if num_classes is None else f"{num_classes} classes"
        raise ValueError(
            f"Expected {wanted} in {file}, but its labels `y` end at {last}. Take the file of "
            "version 2.0 (182 classes), or set `num_classes` to what it has."
        )
    return [names.get(label, f"unknown animal {label}") for label in range(last + 1)]


def _read_rows(file: Path, num_classes: int) -> dict[str, list[tuple[str, int]]]:
    """Return file name and label of each row, by split."""
    rows: dict[str, list[tuple[str, int]]] = {name: [] for name in SPLITS}
    columns = ("split", "filename", "y")
    for line, label, row in _read_table(file, columns, range(num_classes)):
        name = PurePosixPath(row["filename"])
        if name.is_absolute() or ".." in name.parts:
            raise ValueError(
                f"Expected files of the set's own folder in {file}, but line {line} has '{name}'. "
                "Take the file of version 2.0 as it is."
            )
        if row["split"] in rows:
            rows[row["split"]].append((row["filename"], label))
    if empty := sorted(name for name, found in rows.items() if not found):
        raise ValueError(
            f"Expected rows of the splits {list(SPLITS)} in {file}, but {empty} have none. Take "
            "the file of version 2.0 as it was downloaded."
        )
    return rows
