"""A perceptron for tables."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["TabularMLP", "make_offsets"]


def make_offsets(cardinalities: Sequence[int]) -> Tensor:
    """Return where each column's codes begin in one table of embeddings, ``(columns,)`` int64."""
    ends = torch.tensor([0, *cardinalities]).cumsum(0)
    return ends[:-1]


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
        cardinalities = list(cardinalities or ())
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
