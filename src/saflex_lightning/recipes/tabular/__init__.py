"""Tabular data: the paper's sets, CutMix for tables, a perceptron and SAINT."""

from saflex_lightning.recipes.tabular.data import TabularDataModule
from saflex_lightning.recipes.tabular.mlp import TabularMLP
from saflex_lightning.recipes.tabular.saint import SAINT

__all__ = ["SAINT", "TabularDataModule", "TabularMLP"]
