"""A MedMNIST set as a Lightning datamodule: training batches and the rows that steer."""

from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.augment import (
    AugmentationName,
    augmentation_group_names,
    make_image_augmentation,
    make_mixing,
)
from saflex_lightning.recipes.batches import CleanImages
from saflex_lightning.recipes.data_checks import (
    check_shares,
    check_sizes,
    check_steering,
)
from saflex_lightning.recipes.loaders import (
    SteeringName,
    loader_options,
    make_image_loader,
)
from saflex_lightning.recipes.medmnist import Split, read_medmnist
from saflex_lightning.recipes.medmnist_sets import (
    MEDMNIST_SETS,
    download_medmnist,
    find_medmnist,
)
from saflex_lightning.recipes.options import check_choice

__all__ = ["MedMNISTDataModule", "split_stratified"]

SetName = Literal[
    "blood_subset", "path", "derma", "tissue", "blood", "oct", "organa", "organc", "organs"
]


def split_stratified(target: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split row numbers in two, class by class.

    Args:
        target: Labels, ``(n,)`` int64.
        fraction: Share of every class that goes to the second part, in (0, 1); rounded, but each
            class with two rows or more is in both parts.
        seed: Seed of the draw.

    Returns:
        Sorted row numbers of the first and of the second part.

    Example:
        >>> kept, carved = split_stratified(torch.tensor([0, 0, 0, 0, 1, 1]), 0.5, seed=0)
        >>> len(kept), len(carved)
        (3, 3)
    """
    generator = torch.Generator().manual_seed(seed)
    kept, carved = [], []
    for label in target.unique():
        rows = (target == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        size = min(max(round(fraction * len(rows)), 1), len(rows) - 1)
        carved.append(rows[:size])
        kept.append(rows[size:])
    return torch.cat(kept).sort().values, torch.cat(carved).sort().values


class MedMNISTDataModule(L.LightningDataModule):
    """A 2D MedMNIST set with an upstream augmentation and the rows that steer SAFLEX.

    Args:
        dataset: ``"blood_subset"`` is the part of BloodMNIST that ships with the package; the
            others are the official sets of `MEDMNIST_SETS`, in ``<root>/<dataset>mnist.npz``.
        path: A file in the same format to read instead; its checksum is not looked at.
        root: Folder of the official files.
        download: Download the official file into ``root`` where it is missing (extra
            ``[medmnist]``).
        check_md5: Refuse an official file with another checksum.
        num_classes: Number of classes; None takes that of the set.
        in_channels: 1 for grey images, 3 for colour; None takes that of the set.
        augmentation: Upstream augmentation, drawn anew for each image in each epoch.
        augmentation_settings: Keyword values of its torchvision transform (`SoftCrop` for
            ``"soft_crop"``); None keeps their defaults.
        batch: ``"union"``: clean rows, then one augmented row per clean row; ``"replace"``:
            augmented rows only.
        batch_size: Clean images per step and process; a union batch has twice as many rows. The
            number of steps per epoch does not depend on ``batch``.
        eval_batch_size: Images per validation, test or steering batch and process.
        steering: Rows that steer SAFLEX: ``"val"`` the official validation split, ``"split"`` a
            stratified part of the training split, which is then not trained on, ``"train"`` the
            clean training rows.
        steering_fraction: Share of the training split that ``"split"`` takes, in (0, 1).
        merge_val: Train on the validation split too. Then there are no validation rows: nothing
            can be selected on them, and SAFLEX needs ``steering`` ``"train"`` or ``"split"``.
        seed: Seed of the order of the rows, of the augmentation and of the split.
        num_workers: Loader processes; 0 loads in the training process, which is enough for 28
            pixels.

    Raises:
        ValueError: If a setting is out of its range.

    Example:
        >>> data = MedMNISTDataModule(batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.augmented, batch.source
        (tensor([False, False,  True,  True]), tensor([-1, -1,  0,  1]))
    """

    def __init__(
        self,
        dataset: SetName = "blood_subset",
        *,
        path: str | None = None,
        root: str = "data",
        download: bool = False,
        check_md5: bool = True,
        num_classes: int | None = None,
        in_channels: int | None = None,
        augmentation: AugmentationName = "randaugment",
        augmentation_settings: dict[str, Any] | None = None,
        batch: Literal["union", "replace"] = "union",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        steering: SteeringName = "val",
        steering_fraction: float = 0.2,
        merge_val: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_choice("dataset", dataset, get_args(SetName))
        check_choice("augmentation", augmentation, get_args(AugmentationName))
        check_choice("batch", batch, ("union", "replace"))
        check_choice("steering", steering, get_args(SteeringName))
        check_sizes(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
        )
        check_shares(steering_fraction=steering_fraction)
        facts = MEDMNIST_SETS[dataset.removesuffix("_subset")]
        self.dataset = dataset
        self.path = path
        self.root = root
        self.download = download and dataset in MEDMNIST_SETS and path is None
        self.check_md5 = check_md5
        self.num_classes = facts.num_classes if num_classes is None else num_classes
        self.in_channels = facts.in_channels if in_channels is None else in_channels
        self.augmentation: AugmentationName = augmentation
        self.augmentation_settings = dict(augmentation_settings or {})
        self.batch: Literal["union", "replace"] = batch
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steering: SteeringName = steering
        self.steering_fraction = steering_fraction
        self.merge_val = merge_val
        self.seed = seed
        self.num_workers = num_workers
        made = (augmentation, self.num_classes, self.augmentation_settings)
        self._augment = make_image_augmentation(*made)
        self._mix = make_mixing(*made)
        self._is_set_up = False

    def prepare_data(self) -> None:
        """Download the file, where that was asked for and it is missing."""
        if self.download:
            download_medmnist(self.dataset, self.root)

    def setup(self, stage: str) -> None:
        """Read the file once and set the steering rows aside."""
        if self._is_set_up:
            return
        file = self.path
        if file is None and self.dataset in MEDMNIST_SETS:
            file = find_medmnist(self.dataset, self.root, check_md5=self.check_md5)
        splits = read_medmnist(file, num_classes=self.num_classes, in_channels=self.in_channels)
        train, val = splits["train"], splits["val"]
        if self.merge_val:
            train = Split(*(torch.cat(parts) for parts in zip(train, val, strict=True)))
        steering = train
        if self.steering == "split":
            kept, carved = split_stratified(train.target, self.steering_fraction, self.seed)
            steering = Split(train.images[carved], train.target[carved])
            train = Split(train.images[kept], train.target[kept])
        self._train = train
        self._val = CleanImages(val)
        self._test = CleanImages(splits["test"])
        # The same object where the rows are the same, so that SAFLEX can tell.
        self._steering = self._val if self.steering == "val" else CleanImages(steering)
        self._is_set_up = True

    def class_counts(self) -> Tensor:
        """Return the number of training rows of each class, ``(classes,)`` int64."""
        return self._train.target.bincount(minlength=self.num_classes)

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch."""
        return make_image_loader(
            self._train,
            self._augment,
            self._mix,
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
        """Return the loader of the official validation split; none where it is trained on."""
        if self.merge_val:
            return []
        return self._make_loader(self._val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the official test split."""
        return self._make_loader(self._test)

    def _make_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        options = loader_options(self.num_workers, self.seed)
        return DataLoader(dataset, self.eval_batch_size, **options)
