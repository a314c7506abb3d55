"""SAINT: attention between the columns of a row and between the rows of a batch.

Written from the paper (Somepalli et al. 2021, arXiv 2106.01342). Where its text and its authors'
code differ or are silent, this follows the code's structure: gated feed-forward layers, head
dimensions 16 (columns) and 64 (rows), a head with 1,000 hidden units, and no dropout of attention
weights (their code sets a rate and does not use it). One thing is not theirs: a block adds to its
input, x + f(norm(x)), where their code adds to the normalised one, norm(x) + f(norm(x)).
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.tabular.mlp import check_columns, make_offsets

__all__ = ["SAINT", "AcrossRows", "ColumnEmbedding", "ResidualAttention", "ResidualFeedForward"]

AttentionName = Literal["colrow", "col", "row"]


class ColumnEmbedding(nn.Module):
    """One token per column, and one in front that collects the answer.

    A level has an embedding of its own; a number passes through a perceptron of its column,
    1 -> hidden -> dim with ReLU.

    Args:
        num_numeric: Numeric columns.
        cardinalities: Codes of each categorical column.
        dim: Size of a token.
        hidden: Hidden units of a numeric column's perceptron.
    """

    offsets: Tensor

    def __init__(
        self, num_numeric: int, cardinalities: Sequence[int], dim: int, hidden: int = 100
    ) -> None:
        super().__init__()
        self.register_buffer("offsets", make_offsets(cardinalities), persistent=False)
        self.answer = nn.Parameter(torch.randn(dim))
        self.levels = nn.Embedding(sum(cardinalities), dim) if cardinalities else None

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:  # as nn.Linear starts
            return nn.Parameter(torch.empty(shape).uniform_(-1.0, 1.0) / math.sqrt(fan_in))

        self.weight_in = uniform(num_numeric, hidden, fan_in=1)
        self.bias_in = uniform(num_numeric, hidden, fan_in=1)
        self.weight_out = uniform(num_numeric, hidden, dim, fan_in=hidden)
        self.bias_out = uniform(num_numeric, dim, fan_in=hidden)

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Return ``(batch, 1 + columns, dim)``: answer, categorical, numeric."""
        hidden = torch.relu(numeric[:, :, None] * self.weight_in + self.bias_in)
        numbers = torch.einsum("bch,chd->bcd", hidden, self.weight_out) + self.bias_out
        tokens = [self.answer.expand(len(numeric), 1, -1), numbers]
        if self.levels is not None:
            tokens.insert(1, self.levels(categorical + self.offsets))
        return torch.cat(tokens, dim=1)


class ResidualAttention(nn.Module):
    """Multi-head self-attention behind a layer norm, added to its input.

    Args:
        dim: Size of a token.
        heads: Number of heads.
        head_dim: Size of a head's query, key and value.
    """

    def __init__(self, dim: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, 3 * heads * head_dim, bias=False)
        self.merge = nn.Linear(heads * head_dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(batch, tokens, dim)``; tokens attend to those of the same batch entry."""
        parts = self.project(self.norm(tokens)).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts]
        mixed = F.scaled_dot_product_attention(*heads)  # of queries, keys and values
        return tokens + self.merge(mixed.transpose(1, 2).flatten(2))


class ResidualFeedForward(nn.Module):
    """Gated feed-forward layer behind a layer norm, added to its input.

    Args:
        dim: Size of a token; the layer is four times as wide.
        dropout: In [0, 1).
    """

    def __init__(self, dim: int, *, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.widen = nn.Linear(dim, 8 * dim)
        self.dropout = nn.Dropout(dropout)
        self.narrow = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what the shape of ``tokens`` has; each token by itself."""
        values, gates = self.widen(self.norm(tokens)).chunk(2, dim=-1)
        return tokens + self.narrow(self.dropout(values * F.gelu(gates)))


class AcrossRows(nn.Module):
    """Apply a block to the batch as one sequence, whose tokens are whole rows.

    Args:
        block: From ``(1, batch, columns * dim)`` to the same shape.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(batch, columns, dim)``."""
        return self.block(tokens.flatten(1)[None])[0].unflatten(1, tokens.shape[1:])


class SAINT(nn.Module):
    """Classifier of table rows by attention over columns and rows.

    Row attention makes the scores of a row depend on the other rows of its batch, in evaluation
    too: metrics depend a little on the evaluation batch size, and in a union batch an augmented row
    can attend to the clean row it was made from.

    Args:
        num_numeric: Numeric columns.
        num_classes: Number of logits.
        cardinalities: Codes of each categorical column; None for no such column.
        attention: ``"colrow"``: columns, then rows, in every block; ``"col"`` or ``"row"``: one of
            them.
        dim: Size of a token; None is 32, or 8 where there are more than 100 columns, as the authors
            have it (row attention grows with the square of columns times size).
        depth: Blocks.
        heads: Heads of each attention.
        dropout: Of the feed-forward layers, in [0, 1).
        head_width: Hidden units between the answer and the logits.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If it is out of its range, or there is no column.

    References:
        Somepalli et al. 2021, "SAINT: Improved Neural Networks for Tabular Data via Row Attention
        and Contrastive Pre-Training", section 3.
    """

    def __init__(
        self,
        num_numeric: int,
        num_classes: int,
        *,
        cardinalities: list[int] | None = None,
        attention: AttentionName = "colrow",
        dim: int | None = None,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.8,
        head_width: int = 1000,
    ) -> None:
        super().__init__()
        cardinalities = check_columns(num_numeric, cardinalities, num_classes)
        check(get_args(AttentionName), attention=attention)
        check("a positive integer", heads=heads, head_width=head_width)
        check("a positive integer", optional=True, dim=dim)
        check("a non-negative integer", depth=depth)
        check("a number in [0, 1)", dropout=dropout)
        columns = num_numeric + len(cardinalities)
        dim = dim or (8 if columns > 100 else 32)
        self.embed = ColumnEmbedding(num_numeric, cardinalities, dim)
        row_dim = dim * (1 + columns)
        blocks: list[nn.Module] = []
        for _ in range(depth):
            if "col" in attention:
                blocks.append(ResidualAttention(dim, heads=heads, head_dim=16))
                blocks.append(ResidualFeedForward(dim, dropout=dropout))
            if "row" in attention:
                blocks.append(AcrossRows(ResidualAttention(row_dim, heads=heads, head_dim=64)))
                blocks.append(AcrossRows(ResidualFeedForward(row_dim, dropout=dropout)))
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(
            nn.Linear(dim, head_width), nn.ReLU(), nn.Linear(head_width, num_classes)
        )

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``, of numbers and codes; see `TabularMLP.forward`."""
        tokens = self.blocks(self.embed(numeric, categorical))
        return self.head(tokens[:, 0])
