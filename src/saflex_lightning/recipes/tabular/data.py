"""A tabular set as a Lightning datamodule."""

from collections.abc import Sequence
from typing import Any

import torch

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.datamodule import Splits, UnionDataModule
from saflex_lightning.recipes.tabular.batches import (
    AugmentationName,
    CleanTable,
    TrainingTable,
    make_cutmix,
)
from saflex_lightning.recipes.tabular.csv_file import Roles
from saflex_lightning.recipes.tabular.facts import SetName
from saflex_lightning.recipes.tabular.preprocessing import Preprocessing
from saflex_lightning.recipes.tabular.sets import check_set_name, read_table
from saflex_lightning.recipes.tabular.table import Table, drop_duplicates, split_rows

__all__ = ["TabularDataModule"]


class TabularDataModule(UnionDataModule):
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
        num_numeric: Number of numeric columns, if the file is to be checked.
        cardinalities: Codes of each categorical column (its levels, and two for missing and
            unseen), if the file is to be checked.
        num_classes: Number of classes, if the file is to be checked.
        deduplicate: Keep one of rows that agree in everything, before they are split.
        stratified: Split every class by itself, for classes with few rows.
        augmentation: Upstream augmentation, drawn anew for each batch: ``"cutmix"`` replaces
            single cells and keeps the label, ``"cutmix_columns"`` replaces columns and mixes
            labels.
        augmentation_settings: Attributes of `CutMix`: ``probability`` of a cell to be replaced or,
            with ``"cutmix_columns"``, of a batch to be mixed; ``num_groups`` bins of strength that
            become groups of rows; with ``"cutmix_columns"`` ``alpha``, the kept share being
            Beta(alpha, alpha). None keeps their defaults.
        batch_size: As for `UnionDataModule`.
        eval_batch_size: As for `UnionDataModule`.
        **shared: As for `UnionDataModule`.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range.

    Example:
        >>> data = TabularDataModule("qsar", batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.inputs.numeric.shape, batch.augmented
        (torch.Size([4, 41]), tensor([False, False,  True,  True]))
    """

    def __init__(
        self,
        dataset: SetName | None = "qsar",
        path: str | None = None,
        *,
        target: str | int | None = None,
        categorical: list[str | int] | None = None,
        numeric: list[str | int] | None = None,
        num_numeric: int | None = None,
        cardinalities: list[int] | None = None,
        num_classes: int | None = None,
        deduplicate: bool = True,
        stratified: bool = False,
        augmentation: AugmentationName = "cutmix",
        augmentation_settings: dict[str, Any] | None = None,
        batch_size: int = 256,
        eval_batch_size: int = 1024,
        **shared: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, eval_batch_size=eval_batch_size, **shared)
        check_set_name(dataset, path)
        check("a path", optional=True, path=path)
        check("True or False", deduplicate=deduplicate, stratified=stratified)
        check("a non-negative integer", optional=True, num_numeric=num_numeric)
        check("a positive integer", optional=True, num_classes=num_classes)
        check("a list of positive integers", optional=True, cardinalities=cardinalities)
        self.expected = {
            "num_numeric": num_numeric,
            "cardinalities": None if cardinalities is None else list(cardinalities),
            "num_classes": num_classes,
        }
        self.dataset: SetName | None = dataset
        self.path = path
        self.roles = _read_roles(target, categorical, numeric)
        self.deduplicate = deduplicate
        self.stratified = stratified
        self.augmentation: AugmentationName = augmentation
        self._augment = make_cutmix(augmentation, augmentation_settings)
        self.augmentation_settings = dict(augmentation_settings or {})

    def make_splits(self) -> Splits:
        """Read the file and split it."""
        table = read_table(self.dataset, self.path, roles=self.roles)
        self._sizes = {
            "num_numeric": table.numeric.shape[1],
            "cardinalities": table.cardinalities,
            "num_classes": len(table.classes),
        }
        for name, value in self.expected.items():
            if value not in (None, self._sizes[name]):
                raise ValueError(
                    f"Expected `{name}` to be {self._sizes[name]}, as in the file, but got "
                    f"{value}. Correct it, or leave `{name}` out."
                )
        self.classes = table.classes
        if self.deduplicate:
            table = drop_duplicates(table)
        train, val, test = split_rows(table, seed=self.seed, stratified=self.stratified)
        return Splits(train, val, [test])

    def sizes(self) -> dict[str, Any]:
        """Return the numbers of columns, levels and classes; needs `setup`."""
        return self._sizes

    def fit_to(self, train: Table) -> None:
        """Fit means, deviations and codes."""
        self.preprocessing = Preprocessing(train)

    def make_clean(self, rows: Table) -> CleanTable:
        """Return model inputs and labels."""
        return CleanTable(self.preprocessing.transform(rows), torch.from_numpy(rows.target))

    def make_augmented(self, clean: CleanTable) -> TrainingTable:
        """Return training batches."""
        return TrainingTable(
            clean,
            len(self.classes),
            augmentation=self._augment,
            replace=self.batch == "replace",
            seed=self.seed,
        )

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for."""
        return ("clean",) if self._augment is None else self._augment.group_names


def _read_roles(target: Any, categorical: Any, numeric: Any) -> Roles | None:
    target, categorical, numeric = map(_as_names, ([target], categorical, numeric))
    check("a list of names", optional=True, categorical=categorical, numeric=numeric)
    if target == [None] and (categorical is not None or numeric is not None):
        raise ValueError(
            "Expected `target` beside `categorical` and `numeric`, but got None. Name the column "
            "to predict too."
        )
    if target == [None]:
        return None
    check("a name", target=target[0])
    return Roles(target[0], tuple(categorical or ()), None if numeric is None else tuple(numeric))


def _as_names(columns: Any) -> Any:
    """Return integers in a list as the names they are in a file: a config takes 3 for a number."""
    if not isinstance(columns, Sequence) or isinstance(columns, str):
        return columns
    return [str(name) if type(name) is int else name for name in columns]
