"""A MedMNIST set as a Lightning datamodule: training batches and the rows that steer."""

from functools import partial
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.batches import (
    AugmentedImages,
    CleanImages,
    EpochSampler,
    collate_rows,
)
from saflex_lightning.recipes.medmnist import Split, read_medmnist
from saflex_lightning.recipes.operations import TagOperations, group_names_of

__all__ = ["MedMNISTDataModule", "split_stratified"]


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
        path: An official MedMNIST ``.npz``; None reads the shipped BloodMNIST subset.
        num_classes: Number of classes, checked against the labels; None skips the check.
        augmentation: Upstream augmentation, drawn anew for each image in each epoch.
        num_ops: RandAugment: operations per image.
        magnitude: RandAugment: strength of the operations, in 0 to 30.
        batch: ``"union"``: clean rows, then one augmented row per clean row; ``"replace"``:
            augmented rows only.
        batch_size: Clean images per step and process; a union batch has twice as many rows. The
            number of steps per epoch does not depend on ``batch``.
        eval_batch_size: Images per validation, test or steering batch and process.
        steering: Rows that steer SAFLEX: ``"val"`` the official validation split, ``"split"`` a
            stratified part of the training split, which is then not trained on, ``"train"`` the
            clean training rows.
        steering_fraction: Share of the training split that ``"split"`` takes, in (0, 1).
        seed: Seed of the order of the rows, of the augmentation and of the split.
        num_workers: Loader processes; 0 loads in the training process, which is enough for 28
            pixels.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = MedMNISTDataModule(batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.augmented, batch.source
        (tensor([False, False,  True,  True]), tensor([-1, -1,  0,  1]))
    """

    def __init__(
        self,
        path: str | None = None,
        num_classes: int | None = None,
        *,
        augmentation: Literal["none", "randaugment", "trivialaugment"] = "randaugment",
        num_ops: int = 2,
        magnitude: int = 9,
        batch: Literal["union", "replace"] = "union",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        steering: Literal["val", "split", "train"] = "val",
        steering_fraction: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        for name, size in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if size < 1:
                raise ValueError(
                    f"Expected `{name}` to be at least 1, but got {size}. Pass a number of images."
                )
        if not 0.0 < steering_fraction < 1.0:
            raise ValueError(
                "Expected `steering_fraction` to be between 0 and 1, both excluded, but got "
                f"{steering_fraction}. Pass 0.2 to steer by a fifth of the training split."
            )
        self.path = path
        self.num_classes = num_classes
        self.augmentation = augmentation
        self.num_ops = num_ops
        self.magnitude = magnitude
        self.batch: Literal["union", "replace"] = batch
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steering = steering
        self.steering_fraction = steering_fraction
        self.seed = seed
        self.num_workers = num_workers
        self._is_set_up = False

    def setup(self, stage: str) -> None:
        """Read the file once and set the steering rows aside."""
        if self._is_set_up:
            return
        splits = read_medmnist(self.path, num_classes=self.num_classes)
        train = steering = splits["train"]
        if self.steering == "split":
            kept, carved = split_stratified(train.target, self.steering_fraction, self.seed)
            steering = Split(train.images[carved], train.target[carved])
            train = Split(train.images[kept], train.target[kept])
        self._train = train
        self._val = CleanImages(splits["val"])
        self._test = CleanImages(splits["test"])
        # The same object where the rows are the same, so that SAFLEX can tell.
        self._steering = self._val if self.steering == "val" else CleanImages(steering)
        self._is_set_up = True

    def class_counts(self) -> Tensor:
        """Return the number of training rows of each class, ``(classes,)`` int64."""
        return self._train.target.bincount(minlength=self.num_classes or 0)

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch."""
        # Without a trainer, or with one process, there is nothing to share out.
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {
            "num_replicas": 1,
            "rank": 0,
        }
        dataset = AugmentedImages(self._train, self._make_augmentation(), self.seed)
        # The sampler adds the epoch to its seed: keep the orders of neighbouring seeds apart.
        spread = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        sampler = EpochSampler(dataset, seed=spread, **share)
        if len(sampler) < self.batch_size:
            raise ValueError(
                f"Expected `batch_size` to be at most {len(sampler)}, the training rows of one "
                f"process, but got {self.batch_size}. Pass a smaller `batch_size`."
            )
        collate = partial(collate_rows, batch=self.batch, num_rows=len(dataset))
        # The last, smaller batch is left out: its rows come in other epochs, and every step has
        # the same size.
        return self._make_loader(
            dataset, self.batch_size, sampler=sampler, collate_fn=collate, drop_last=True
        )

    def saflex_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the rows that steer SAFLEX, without augmentation."""
        return self._make_loader(self._steering, self.eval_batch_size)

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for."""
        return group_names_of(self._make_augmentation())

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the official validation split."""
        return self._make_loader(self._val, self.eval_batch_size)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the official test split."""
        return self._make_loader(self._test, self.eval_batch_size)

    def _make_loader(self, dataset: Dataset[Any], size: int, **kwargs: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            # Otherwise each pass over a loader draws from the global random state.
            generator=torch.Generator().manual_seed(self.seed),
            **kwargs,
        )

    def _make_augmentation(self) -> v2.Transform | TagOperations | None:
        if self.augmentation == "none":
            return None
        if self.augmentation == "randaugment":
            return TagOperations(v2.RandAugment(self.num_ops, self.magnitude))
        return TagOperations(v2.TrivialAugmentWide())
