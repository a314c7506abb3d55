"""iWildCam2020-wilds as it lies on a disk: images of animals and a table of splits and labels."""

import csv
from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.augment import (
    AugmentationName,
    augmentation_group_names,
    make_image_augmentation,
    make_mixing,
)
from saflex_lightning.recipes.batches import CleanImages
from saflex_lightning.recipes.data_checks import check_sizes, check_steering
from saflex_lightning.recipes.folders import FileImages
from saflex_lightning.recipes.loaders import loader_options, make_image_loader
from saflex_lightning.recipes.medmnist import Split
from saflex_lightning.recipes.options import check_choice

__all__ = ["IWildCamDataModule"]

SPLITS = ("train", "id_val", "id_test", "test")


class IWildCamDataModule(L.LightningDataModule):
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
        augmentation: Upstream augmentation of one image, drawn anew in each epoch; the mixing
            ones have labels that no caption says, so they are refused.
        augmentation_settings: Keyword values of its torchvision transform.
        batch: ``"union"``: clean rows, then one augmented row per clean row; ``"replace"``:
            augmented rows only.
        batch_size: Clean images per step and process; a union batch has twice as many rows.
        eval_batch_size: Images per validation, test or steering batch and process.
        steering: Rows that steer SAFLEX: ``"val"`` or ``"train"`` (clean training rows).
        merge_val: Train on the validation rows too. Then there are none: nothing can be selected
            on them, and SAFLEX needs ``steering`` ``"train"``.
        seed: Seed of the order of the rows and of the augmentation.
        num_workers: Loader processes.

    Raises:
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        root: str,
        *,
        num_classes: int | None = None,
        image_size: int = 224,
        augmentation: AugmentationName = "randaugment",
        augmentation_settings: dict[str, Any] | None = None,
        batch: Literal["union", "replace"] = "union",
        batch_size: int = 256,
        eval_batch_size: int = 256,
        steering: Literal["val", "train"] = "val",
        merge_val: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_choice("augmentation", augmentation, get_args(AugmentationName))
        check_choice("batch", batch, ("union", "replace"))
        check_choice("steering", steering, ("train", "val"))
        check_sizes(image_size=image_size, batch_size=batch_size, eval_batch_size=eval_batch_size)
        settings = dict(augmentation_settings or {})
        if augmentation == "soft_crop" or make_mixing(augmentation, 2, settings) is not None:
            raise ValueError(
                "Expected an `augmentation` that keeps the label, since a caption names one class, "
                f"but got '{augmentation}'. Choose randaugment, trivialaugment, autoaugment, "
                "augmix or crop."
            )
        self.root = root
        self.num_classes = num_classes
        self.image_size = image_size
        self.augmentation: AugmentationName = augmentation
        self.augmentation_settings = settings
        self.batch: Literal["union", "replace"] = batch
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.steering = steering
        self.merge_val = merge_val
        self.seed = seed
        self.num_workers = num_workers
        self._is_set_up = False

    def setup(self, stage: str) -> None:
        """Read the two tables once."""
        if self._is_set_up:
            return
        root = Path(self.root).expanduser()
        self._names = _read_categories(root / "categories.csv", self.num_classes)
        rows = _read_rows(root / "metadata.csv", len(self._names))
        if self.merge_val:
            rows["train"] += rows["id_val"]
        self._rows = {name: self._make_split(root / "train", rows[name]) for name in SPLITS}
        self._val = CleanImages(self._rows["id_val"])
        self._tests = [CleanImages(self._rows[name]) for name in ("id_test", "test")]
        # The same object where the rows are the same, so that SAFLEX can tell.
        self._steering = self._val if self.steering == "val" else CleanImages(self._rows["train"])
        self._is_set_up = True

    def _make_split(self, folder: Path, rows: list[tuple[str, int]]) -> Split:
        files = [folder / name for name, _ in rows]
        if not files[0].is_file():
            raise FileNotFoundError(
                f"Expected the images of `metadata.csv` in {folder}, but there is no {files[0]}. "
                "Point `root` at the folder of iWildCam2020-wilds that holds both."
            )
        # Read one by one, by the row number, as a tensor would be.
        images = cast("Tensor", FileImages(files, self.image_size))
        return Split(images, torch.tensor([label for _, label in rows]))

    def class_names(self) -> list[str]:
        """Return the name of each label; needs `setup`."""
        return self._names

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch."""
        augment = make_image_augmentation(
            self.augmentation, len(self._names), self.augmentation_settings
        )
        # Rows of all processes are gathered, and every batch of this loader is as large.
        return make_image_loader(
            self._rows["train"],
            augment,
            None,
            batch=self.batch,
            batch_size=self.batch_size,
            trainer=self.trainer,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def saflex_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the rows that steer SAFLEX, without augmentation.

        Raises:
            MisconfigurationException: If those are validation rows that are trained on.
        """
        check_steering(self.steering, merge_val=self.merge_val)
        return self._make_loader(self._steering)

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for."""
        return augmentation_group_names(self.augmentation, self.augmentation_settings)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """Return the loader of validation rows in distribution; none where it is trained on."""
        if self.merge_val:
            return []
        return self._make_loader(self._val)

    def test_dataloader(self) -> list[DataLoader[tuple[Tensor, Tensor]]]:
        """Return the loaders of test rows in and out of distribution."""
        return [self._make_loader(rows) for rows in self._tests]

    def _make_loader(self, rows: CleanImages) -> DataLoader[Any]:
        options = loader_options(self.num_workers, self.seed)
        return DataLoader(rows, self.eval_batch_size, **options)


_UNUSED = 99_999  # the label of categories that occur in no split


def _read_table(file: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    if not file.is_file():
        raise FileNotFoundError(
            f"Expected iWildCam2020-wilds v2.0 in {file.parent}, but there is no {file.name} in "
            "it. Download the set with `wilds.get_dataset('iwildcam', download=True)` and point "
            "`root` at its folder."
        )
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        missing = sorted(set(columns) - set(reader.fieldnames or ()))
        if missing:
            raise ValueError(
                f"Expected {file} to have the columns {list(columns)}, but {missing} are missing. "
                "Take the file of version 2.0 as it was downloaded."
            )
        return list(reader)


def _read_categories(file: Path, num_classes: int | None) -> list[str]:
    """Return the names in the order of their labels; labels without a name get a number.

    An added column ``english`` goes before the scientific ``name``, as in FLYP's captions.
    """
    rows = [row for row in _read_table(file, ("y", "name")) if int(row["y"]) < _UNUSED]
    names = {int(row["y"]): row.get("english") or row["name"] for row in rows}
    if num_classes is not None and max(names) + 1 != num_classes:
        raise ValueError(
            f"Expected {num_classes} classes in {file}, but its labels `y` end at {max(names)}. "
            "Take the file of version 2.0 (182 classes), or set `num_classes` to what it has."
        )
    return [names.get(label, f"unknown animal {label}") for label in range(max(names) + 1)]


def _read_rows(file: Path, num_classes: int) -> dict[str, list[tuple[str, int]]]:
    """Return file name and label of each row, by split."""
    rows: dict[str, list[tuple[str, int]]] = {name: [] for name in SPLITS}
    for row in _read_table(file, ("split", "filename", "y")):
        label = int(row["y"])
        if not 0 <= label < num_classes:
            raise ValueError(
                f"Expected labels in [0, {num_classes - 1}] in {file}, as categories.csv has, but "
                f"{row['filename']} has {label}. Take both files of one version."
            )
        if row["split"] in rows:
            rows[row["split"]].append((row["filename"], label))
    if empty := sorted(name for name, found in rows.items() if not found):
        raise ValueError(
            f"Expected rows of the splits {list(SPLITS)} in {file}, but {empty} have none. Take "
            "the file of version 2.0 as it was downloaded."
        )
    return rows
