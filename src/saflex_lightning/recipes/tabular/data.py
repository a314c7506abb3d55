"""A tabular set as a Lightning datamodule: training batches and the rows that steer."""

from typing import Any, Literal, get_args

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saflex_lightning import AugmentedBatch
from saflex_lightning.recipes.data import split_stratified
from saflex_lightning.recipes.data_checks import (
    check_shares,
    check_sizes,
    check_steering,
)
from saflex_lightning.recipes.loaders import (
    SteeringName,
    loader_options,
    make_train_loader,
)
from saflex_lightning.recipes.options import check_choice
from saflex_lightning.recipes.tabular.batches import (
    AugmentationName,
    CleanTable,
    TrainingTable,
    as_it_is,
    make_cutmix,
)
from saflex_lightning.recipes.tabular.csv_file import Roles
from saflex_lightning.recipes.tabular.facts import SetName
from saflex_lightning.recipes.tabular.preprocessing import Preprocessing
from saflex_lightning.recipes.tabular.sets import read_table
from saflex_lightning.recipes.tabular.table import (
    Table,
    TabularInputs,
    drop_duplicates,
    join_rows,
    split_rows,
    take_rows,
)

__all__ = ["TabularDataModule"]

CleanLoader = DataLoader[tuple[TabularInputs, Tensor]]


class TabularDataModule(L.LightningDataModule):
    """A tabular set, split by seed, with CutMix upstream and the rows that steer SAFLEX.

    Rows are split at random into 65 % training, 15 % validation and 20 % test rows. Means,
    deviations and level codes come from the training rows alone.

    Args:
        dataset: A set of the paper (see `SETS`), checked against its Table 5; None for a set of
            your own.
        path: The file (``.npz`` or ``.csv``) or its folder; None reads what ships with the
            package: ``"qsar"`` and ``"arrhythmia"``.
        target: CSV: the column to predict; None takes the named set's own roles.
        categorical: CSV: columns of levels.
        numeric: CSV: columns of numbers; None means all others.
        num_numeric: Numeric columns that the model was built for; None skips the check.
        cardinalities: Codes of each categorical column (its levels, and two for missing and
            unseen) that the model was built for; None skips the check.
        num_classes: Classes that the model was built for; None skips the check.
        deduplicate: Keep one of rows that agree in everything, before they are split.
        stratified: Split every class by itself, for classes with few rows.
        augmentation: Upstream augmentation, drawn anew for each batch: ``"cutmix"`` replaces
            single cells and keeps the label, ``"cutmix_columns"`` replaces columns and mixes
            labels.
        augmentation_settings: Attributes of `CutMix`: ``probability`` of a cell to be replaced or,
            with ``"cutmix_columns"``, of a batch to be mixed; ``num_groups`` bins of strength that
            become groups of rows; with ``"cutmix_columns"`` ``alpha``, the kept share being
            Beta(alpha, alpha). None keeps their defaults.
        batch: ``"union"``: clean rows, then one augmented row per clean row; ``"replace"``:
            augmented rows only.
        batch_size: Clean rows per step and process; a union batch has twice as many.
        eval_batch_size: Rows per validation, test or steering batch and process.
        steering: Rows that steer SAFLEX: ``"val"`` the validation rows, ``"split"`` a stratified
            part of the training rows, which is then not trained on, ``"train"`` the clean
            training rows.
        steering_fraction: Share of the training rows that ``"split"`` takes, in (0, 1).
        merge_val: Train on the validation rows too. Then there are none: nothing can be selected
            on them, and SAFLEX needs ``steering`` ``"train"`` or ``"split"``.
        seed: Seed of the split, of the order of the rows and of the augmentation.
        num_workers: Loader processes; 0 loads in the training process.

    Raises:
        ValueError: If a number is out of its range.

    Example:
        >>> data = TabularDataModule("qsar", batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.inputs.numeric.shape, batch.source
        (torch.Size([4, 41]), tensor([-1, -1,  0,  1]))
    """

    def __init__(
        self,
        dataset: SetName | None = "qsar",
        path: str | None = None,
        *,
        target: str | None = None,
        categorical: list[str] | None = None,
        numeric: list[str] | None = None,
        num_numeric: int | None = None,
        cardinalities: list[int] | None = None,
        num_classes: int | None = None,
        deduplicate: bool = True,
        stratified: bool = False,
        augmentation: AugmentationName = "cutmix",
        augmentation_settings: dict[str, Any] | None = None,
        batch: Literal["union", "replace"] = "union",
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        steering: SteeringName = "val",
        steering_fraction: float = 0.2,
        merge_val: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
        )
        check_shares(steering_fraction=steering_fraction)
        check_choice("batch", batch, ("union", "replace"))
        check_choice("steering", steering, get_args(SteeringName))
        self.dataset: SetName | None = dataset
        self.path = path
        self.roles = None
        if target is not None:
            columns = None if numeric is None else tuple(numeric)
            self.roles = Roles(target, tuple(categorical or ()), columns)
        self.num_numeric = num_numeric
        self.cardinalities = None if cardinalities is None else list(cardinalities)
        self.num_classes = num_classes
        self.deduplicate = deduplicate
        self.stratified = stratified
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
        self._augment = make_cutmix(augmentation, self.augmentation_settings)
        self._is_set_up = False

    def setup(self, stage: str) -> None:
        """Read the file once, split it, and set the steering rows aside."""
        if self._is_set_up:
            return
        table = read_table(self.dataset, self.path, roles=self.roles)
        self._check_model(table)
        if self.deduplicate:
            table = drop_duplicates(table)
        train, val, test = split_rows(table, seed=self.seed, stratified=self.stratified)
        if self.merge_val:
            train = join_rows(train, val)
        steering = train
        if self.steering == "split":
            kept, carved = split_stratified(
                torch.from_numpy(train.target), self.steering_fraction, self.seed
            )
            steering, train = take_rows(train, carved.numpy()), take_rows(train, kept.numpy())
        prepare = Preprocessing(train)

        def clean(rows: Table) -> CleanTable:
            return CleanTable(prepare.transform(rows), torch.from_numpy(rows.target))

        self.classes = table.classes
        self._train, self._val, self._test = clean(train), clean(val), clean(test)
        # The same object where the rows are the same, so that SAFLEX can tell.
        same = {"val": self._val, "train": self._train}
        self._steering = same.get(self.steering) or clean(steering)
        self._is_set_up = True

    def class_counts(self) -> Tensor:
        """Return the number of training rows of each class, ``(classes,)`` int64."""
        return self._train.target.bincount(minlength=len(self.classes))

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch."""
        dataset = TrainingTable(
            self._train,
            len(self.classes),
            augmentation=self._augment,
            batch=self.batch,
            seed=self.seed,
        )
        return make_train_loader(
            dataset,
            self.batch_size,
            trainer=self.trainer,
            seed=self.seed,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
        )

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for."""
        return ("clean",) if self._augment is None else self._augment.group_names

    def saflex_dataloader(self) -> CleanLoader:
        """Return the loader of the rows that steer SAFLEX, without augmentation.

        Raises:
            MisconfigurationException: If those are validation rows that are trained on.
        """
        check_steering(self.steering, merge_val=self.merge_val)
        return self._make_loader(self._steering)

    def val_dataloader(self) -> CleanLoader | list[Any]:
        """Return the loader of the validation rows; none where they are trained on."""
        if self.merge_val:
            return []
        return self._make_loader(self._val)

    def test_dataloader(self) -> CleanLoader:
        """Return the loader of the test rows."""
        return self._make_loader(self._test)

    def _make_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        options = loader_options(self.num_workers, self.seed)
        return DataLoader(dataset, self.eval_batch_size, **options)

    def _check_model(self, table: Table) -> None:
        found = {
            "num_numeric": table.numeric.shape[1],
            "cardinalities": table.cardinalities,
            "num_classes": len(table.classes),
        }
        for setting, value in found.items():
            expected = getattr(self, setting)
            if expected is not None and expected != value:
                raise ValueError(
                    f"Expected `{setting}` to be {value}, as in the file, but got {expected}. Set "
                    f"`{setting}` of the data and of the model to {value}."
                )
