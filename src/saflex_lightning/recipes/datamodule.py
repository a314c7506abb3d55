"""What the datamodules share: union batches to train on, and the rows that steer SAFLEX."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import DataLoader

from saflex_lightning import AugmentedBatch
from saflex_lightning.data import ResumableLoader, read_row_weights
from saflex_lightning.data.checks import check
from saflex_lightning.data.draws import mix_seeds
from saflex_lightning.data.resumable import EpochSampler

__all__ = [
    "BatchName",
    "Splits",
    "SteeringName",
    "UnionDataModule",
    "check_batch_size",
    "process_share",
    "split_stratified",
]

BatchName = Literal["union", "replace"]
SteeringName = Literal["val", "split", "train"]
CleanLoader = DataLoader[tuple[Any, Tensor]]


class Rows(Protocol):
    """Rows that a file holds; ``target`` is ``(n,)`` integer, a tensor or an array."""

    @property
    def target(self) -> Any:
        """Labels."""
        ...

    def take(self, rows: Tensor) -> Any:
        """Return some of the rows."""
        ...

    def join(self, other: Any) -> Any:
        """Return these rows and others behind them."""
        ...


class Splits(NamedTuple):
    """What `UnionDataModule.make_splits` reads; several sets of test rows have a loader each."""

    train: Rows
    val: Rows
    tests: Sequence[Rows]


class UnionDataModule(L.LightningDataModule):
    """Training batches of clean and augmented rows, and the rows that steer SAFLEX.

    A subclass says how files are read (`make_splits`), what a dataset of clean and one of augmented
    rows is (`make_clean`, `make_augmented`), and how large its rows are (`sizes`).

    Args:
        batch: ``"union"``: clean rows, then the augmented rows made from them; ``"replace"``:
            augmented rows only.
        batch_size: Clean rows per step and process; augmented ones come on top in a union batch.
            The number of steps per epoch does not depend on ``batch``.
        eval_batch_size: Rows per validation, test or steering batch and process.
        steering: Rows that steer SAFLEX: ``"val"`` the validation rows, ``"split"`` a stratified
            part of the training rows, which is then not trained on, ``"train"`` the clean training
            rows.
        steering_fraction: Share of the training rows that ``"split"`` takes, in (0, 1).
        merge_val: Train on the validation rows too. Then there are none: nothing can be selected
            on them, and SAFLEX needs ``steering`` ``"train"`` or ``"split"``.
        row_weights: ``saflex_rows.csv`` of an earlier run with the same training rows, by whose
            weights rows are drawn, see `read_row_weights`; validation rows that are trained on have
            weight 1. None takes each row once in an epoch.
        seed: Seed of the order of the rows, of the augmentation and of every split.
        num_workers: Loader processes; 0 loads in the training process.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        batch: BatchName = "union",
        batch_size: int = 64,
        eval_batch_size: int = 256,
        steering: SteeringName = "val",
        steering_fraction: float = 0.2,
        merge_val: bool = False,
        row_weights: str | None = None,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check(get_args(BatchName), batch=batch)
        check(get_args(SteeringName), steering=steering)
        check("a positive integer", batch_size=batch_size, eval_batch_size=eval_batch_size)
        check("a non-negative integer below 2**32", seed=seed)
        check("a non-negative integer", num_workers=num_workers)
        check("a number between 0 and 1, both excluded", steering_fraction=steering_fraction)
        check("True or False", merge_val=merge_val)
        check("a path", optional=True, row_weights=row_weights)
        self.batch: BatchName = batch
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steering: SteeringName = steering
        self.steering_fraction = steering_fraction
        self.merge_val = merge_val
        self.row_weights = row_weights
        self.seed = seed
        self.num_workers = num_workers
        self._is_set_up = False

    # What a subclass says

    def make_splits(self) -> Splits:
        """Read the files."""
        raise NotImplementedError

    def make_clean(self, rows: Any) -> Any:
        """Return a dataset of inputs and labels, with a ``target``."""
        raise NotImplementedError

    def make_augmented(self, clean: Any) -> Any:
        """Return a dataset by ``(draw, row)`` whose ``collate`` makes training batches."""
        raise NotImplementedError

    def sizes(self) -> dict[str, Any]:
        """Return what a network is built for, by the names of its arguments; needs `setup`."""
        raise NotImplementedError

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for."""
        raise NotImplementedError

    def fit_to(self, train: Any) -> None:
        """Fit what training rows alone may decide."""

    # What follows

    def setup(self, stage: str) -> None:
        """Read the files once and set the steering rows aside."""
        if self._is_set_up:
            return
        splits = self.make_splits()
        train = splits.train.join(splits.val) if self.merge_val else splits.train
        target = torch.as_tensor(train.target)
        self._whole, self._kept, carved = train, torch.arange(len(target)), None
        if self.steering == "split":
            self._kept, carved = split_stratified(target, self.steering_fraction, self.seed)
            train = self._whole.take(self._kept)
        self.fit_to(train)
        self._train, self._val = self.make_clean(train), self.make_clean(splits.val)
        self._tests = [self.make_clean(rows) for rows in splits.tests]
        # The same object where the rows are the same, so that SAFLEX can tell.
        self._steering = self._val if self.steering == "val" else self._train
        if carved is not None:
            self._steering = self.make_clean(self._whole.take(carved))
        self._is_set_up = True

    def class_counts(self) -> Tensor:
        """Return the number of training rows of each class, ``(classes,)`` int64; needs `setup`."""
        return self._train.target.bincount(minlength=self.sizes()["num_classes"])

    def doubted_rows(self) -> Any:
        """Return the dataset of the rows whose labels may be wrong, as they are; needs `setup`."""
        return self._train

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch.

        It resumes in the middle of an epoch. The last, smaller batch is left out: its rows come in
        other epochs, and every step has the same size.

        Raises:
            FileNotFoundError: If ``row_weights`` is no file.
            ValueError: If a process has fewer rows than a batch, ``row_weights`` is the file of
                other rows, or ``steering`` splits rows that are merged.
        """
        if self.row_weights is not None and self.merge_val and self.steering == "split":
            raise ValueError(
                "Expected `steering` other than 'split' beside `row_weights` and `merge_val`, but "
                "got it, which leaves other rows than in a run without `merge_val`. Pass 'train', "
                "or no SAFLEX: `method=train_plus_val` needs no steering."
            )
        rows = self.make_augmented(self._train)
        known = len(rows) - self.num_merged()
        labels = torch.as_tensor(self._train.target)[:known] if rows.keeps_labels else None
        weights = self.read_weights(known, first_index=known, labels=labels)
        if weights is not None:
            weights = torch.cat([weights, torch.ones(self.num_merged())])
        # The sampler adds the epoch to its seed: keep the orders of neighbouring seeds apart.
        sampler = EpochSampler(
            rows,
            seed=mix_seeds(self.seed),
            weights=weights,
            **process_share(self.trainer),
        )
        check_batch_size(self.batch_size, len(sampler))
        return ResumableLoader(
            rows,
            self.batch_size,
            sampler=sampler,
            collate_fn=rows.collate,
            drop_last=True,
            **self.loader_options(),
        )

    def read_weights(
        self, num_rows: int, *, first_index: int, labels: Tensor | None
    ) -> Tensor | None:
        """Return the weights of an earlier run, see `read_row_weights`; None without one.

        Raises:
            FileNotFoundError: If there is no file of them.
        """
        if self.row_weights is None:
            return None
        if not Path(self.row_weights).is_file():
            raise FileNotFoundError(
                "Expected `row_weights` to be the saflex_rows.csv of an earlier run, but there is "
                f"no file {self.row_weights}. `SAflexInsight` writes one, and `saflex-train` too."
            )
        return read_row_weights(self.row_weights, num_rows, first_index=first_index, labels=labels)

    def num_merged(self) -> int:
        """Return how many validation rows are trained on; they come behind the training rows."""
        return len(self._val) if self.merge_val else 0

    def saflex_dataloader(self) -> CleanLoader:
        """Return the loader of the rows that steer SAFLEX, without augmentation.

        Raises:
            MisconfigurationException: If those are validation rows that are trained on.
        """
        if self.merge_val and self.steering == "val":
            raise MisconfigurationException(
                "Expected `steering` other than 'val' with `merge_val`=True, but got 'val'. The "
                "validation rows are trained on; choose 'train', the clean training rows, or "
                "'split', a part of them."
            )
        return self._make_loader(self._steering)

    def val_dataloader(self) -> CleanLoader | list[Any]:
        """Return the loader of the validation rows; none where they are trained on."""
        return [] if self.merge_val else self._make_loader(self._val)

    def test_dataloader(self) -> CleanLoader | list[CleanLoader]:
        """Return the loader of the test rows, or a list of them."""
        loaders = [self._make_loader(rows) for rows in self._tests]
        return loaders[0] if len(loaders) == 1 else loaders

    def loader_options(self) -> dict[str, Any]:
        """Return what every loader is made with; worker processes persist."""
        return {
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            # Otherwise each pass over a loader draws from the global random state.
            "generator": torch.Generator().manual_seed(self.seed),
        }

    def _make_loader(self, rows: Any) -> CleanLoader:
        return DataLoader(rows, self.eval_batch_size, **self.loader_options())


def process_share(trainer: L.Trainer | None) -> dict[str, int]:
    """Return how many processes there are and which this is, as a distributed sampler takes it."""
    given: Mapping[str, int] = (trainer and trainer.distributed_sampler_kwargs) or {}
    return {"num_replicas": given.get("num_replicas", 1), "rank": given.get("rank", 0)}


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Refuse a batch larger than the training rows of a process."""
    if num_rows < batch_size:
        raise ValueError(
            f"Expected `batch_size` to be at most {num_rows}, the training rows of one process, "
            f"but got {batch_size}. Pass a smaller `batch_size`."
        )


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
