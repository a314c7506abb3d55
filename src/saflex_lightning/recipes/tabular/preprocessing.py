"""From a table to model inputs: everything that is fitted is fitted on training rows."""

import numpy as np
import torch

from saflex_lightning.recipes.tabular.table import Table, TabularInputs

__all__ = ["Preprocessing"]


class Preprocessing:
    """Impute and standardise numbers, give levels a code; by scikit-learn.

    A missing number becomes the mean of its column; then columns get mean 0 and standard deviation
    1. A categorical column has code 0 for missing, 1 for levels that no training row has, and one
    code from 2 on for each level that one has.

    Args:
        train: The training rows, and no others.

    Attributes:
        columns: A table without rows that has their columns, levels and classes.

    Raises:
        ImportError: If scikit-learn is not installed.
    """

    def __init__(self, train: Table) -> None:
        try:
            from sklearn.impute import SimpleImputer
            from sklearn.pipeline import make_pipeline
            from sklearn.preprocessing import OrdinalEncoder, StandardScaler
        except ImportError as error:
            raise ImportError(
                "Expected scikit-learn for tabular data, but it is not installed. Run "
                "`pip install 'saflex-lightning[tabular]'`."
            ) from error
        self.columns = train.take(np.arange(0))
        self._scale = make_pipeline(
            SimpleImputer(strategy="mean", keep_empty_features=True), StandardScaler()
        )
        self._encode = OrdinalEncoder(handle_unknown="use_encoded_value", unknown_value=-1)
        if train.numeric.shape[1]:
            self._scale.fit(train.numeric)
        if train.categorical.shape[1]:
            self._encode.fit(train.categorical)

    def transform(self, table: Table) -> TabularInputs:
        """Return the model inputs of some rows.

        Args:
            table: Rows with the columns of the training rows.

        Returns:
            One row per row; every code is below its column's entry in `Table.cardinalities`.
        """
        numeric, codes = table.numeric, table.categorical
        if numeric.shape[1]:
            numeric = self._scale.transform(numeric)
        if codes.shape[1]:
            # Where training rows have missing cells, those are the encoder's first level.
            offset = [2 - int(levels[0] == -1) for levels in self._encode.categories_]
            seen = self._encode.transform(codes)
            codes = np.where(seen < 0, 1, seen + offset)
            codes = np.where(table.categorical < 0, 0, codes)
        return TabularInputs(
            torch.from_numpy(np.ascontiguousarray(numeric, np.float32)),
            torch.from_numpy(np.ascontiguousarray(codes, np.int64)),
        )
