"""Run the extra pass on the augmented rows alone, where that changes nothing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .parameters import Scores, as_tuple
from .unchanged import unchanged_state

__all__ = ["RowSubset"]

_RATES = ("p", "drop_prob", "dropout")  # what layers call their dropout rate
_TOLERANCE = 1e-3  # of the scores' spread: far above rounding, far below batch statistics


class RowSubset:
    """Decide whether a model scores each row on its own, by trying it.

    Batch normalisation in training mode, dropout and contrastive scores all make the scores of a
    row depend on what else is in the batch or on the order of random draws. Instead of guessing
    from module types, a subset is scored once and compared; the answer is kept until the training
    mode or the dropout rate of some submodule changes.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._modes: tuple[object, ...] | None = None
        self._independent = False

    def probe(
        self,
        scores: Callable[..., Scores],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        augmented: Tensor,
    ) -> tuple[Callable[[], Scores] | None, Tensor | None]:
        """Return the extra pass to run, and its rows.

        Args:
            scores: Function from inputs to scores.
            args: Its positional inputs.
            kwargs: Its keyword inputs.
            augmented: Rows that need a tangent, ``(batch,)`` bool.

        Returns:
            The pass over augmented rows with their positions, or two None to use every row.
        """
        parts = list(self.module.modules())
        modes = tuple((part.training, *map(part.__dict__.get, _RATES)) for part in parts)
        if modes == self._modes and not self._independent:
            return None, None  # before the mask is read, which waits for the device
        rows = augmented.nonzero().squeeze(-1)
        batch_size = augmented.shape[0]
        if rows.numel() in {0, batch_size}:
            return None, None
        inputs = [*args, *kwargs.values()]
        if not all(_has_rows(value, batch_size) for value in inputs):
            return None, None
        some_args = tuple(value[rows] for value in args)
        some_kwargs = {key: value[rows] for key, value in kwargs.items()}

        def subset() -> Scores:
            return scores(*some_args, **some_kwargs)

        if any(isinstance(part, nn.SyncBatchNorm) and part.training for part in parts):
            # It waits for every rank, and one without augmented rows would take no trial.
            return None, None
        if modes != self._modes:
            independent = self._is_independent(lambda: scores(*args, **kwargs), subset, rows)
            self._modes = None if independent is None else modes
            self._independent = bool(independent)
        return (subset, rows) if self._independent else (None, None)

    def _is_independent(
        self, whole: Callable[[], Scores], subset: Callable[[], Scores], rows: Tensor
    ) -> bool | None:
        """Compare the scores of a subset with those of the whole batch.

        Args:
            whole: Scores the batch.
            subset: Scores the rows alone.
            rows: Their positions.

        Returns:
            None where the scores of all rows are equal, as under a head that starts at zero.
        """
        with unchanged_state(self.module), torch.no_grad():
            everything = whole()
            try:
                # The random state is left to run on, so that dropout shows up as a difference.
                alone = subset()
            except Exception:
                return False  # a model that needs the whole batch, or more than these few rows
        tasks, parts = as_tuple(everything), as_tuple(alone)
        if not all(bool(scores.std(correction=0) > 0) for scores in tasks):
            return None
        return all(_same(full[rows], part, full) for full, part in zip(tasks, parts, strict=True))


def _has_rows(value: object, batch_size: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == batch_size


def _same(expected: Tensor, found: Tensor, scale: Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    error = (expected - found).abs().max()
    return bool(error <= _TOLERANCE * scale.std(correction=0))
