"""A perceptron for tables."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from saflex_lightning.data.checks import check

__all__ = ["TabularMLP", "check_columns", "make_offsets"]


def make_offsets(cardinalities: Sequence[int]) -> Tensor:
    """Return where each column's codes begin in one table of embeddings, ``(columns,)`` int64."""
    ends = torch.tensor([0, *cardinalities]).cumsum(0)
    return ends[:-1]


def check_columns(num_numeric: Any, cardinalities: Any, num_classes: Any) -> list[int]:
    """Return the codes of each categorical column, after refusing sizes that no table has."""
    check("a non-negative integer", num_numeric=num_numeric)
    check("a list of positive integers", optional=True, cardinalities=cardinalities)
    check("a positive integer", num_classes=num_classes)
    cardinalities = list(cardinalities or ())
    if not num_numeric and not cardinalities:
        raise ValueError(
            "Expected `num_numeric` or `cardinalities` to tell of a column, but got 0 and none. "
            "Pass those of the table."
        )
    return cardinalities


class TabularMLP(nn.Module):
    """Perceptron on standardised numbers and embedded levels.

    Args:
        num_numeric: Numeric columns.
        num_classes: Number of logits.
        cardinalities: Codes of each categorical column; None for no such column.
        width: Units of a hidden layer.
        depth: Hidden layers.
        dropout: Probability of dropout behind each hidden layer, in [0, 1).
        batch_norm: Batch normalisation before each activation.
        embedding_dim: Numbers that a level becomes.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If it is out of its range, or there is no column.
    """

    offsets: Tensor

    def __init__(
        self,
        num_numeric: int,
        num_classes: int,
        *,
        cardinalities: list[int] | None = None,
        width: int = 256,
        depth: int = 2,
        dropout: float = 0.1,
        batch_norm: bool = False,
        embedding_dim: int = 8,
    ) -> None:
        super().__init__()
        cardinalities = check_columns(num_numeric, cardinalities, num_classes)
        check("a positive integer", width=width, embedding_dim=embedding_dim)
        check("a non-negative integer", depth=depth)
        check("a number in [0, 1)", dropout=dropout)
        check("True or False", batch_norm=batch_norm)
        self.register_buffer("offsets", make_offsets(cardinalities), persistent=False)
        self.embed = nn.Embedding(sum(cardinalities), embedding_dim) if cardinalities else None
        size = num_numeric + embedding_dim * len(cardinalities)
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers.append(nn.Linear(size, width))
            if batch_norm:
                layers.append(nn.BatchNorm1d(width))
            layers += [nn.ReLU(), nn.Dropout(dropout)]
            size = width
        self.hidden = nn.Sequential(*layers)
        self.head = nn.Linear(size, num_classes)

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Return logits.

        Args:
            numeric: ``(batch, numeric columns)`` float.
            categorical: ``(batch, categorical columns)`` int64 codes.

        Returns:
            ``(batch, classes)``.
        """
        features = numeric
        if self.embed is not None:
            levels = self.embed(categorical + self.offsets)
            features = torch.cat([numeric, levels.flatten(1)], dim=1)
        return self.head(self.hidden(features))
