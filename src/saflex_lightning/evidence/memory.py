"""What is remembered of the newest validation rows, the same on all ranks."""

from typing import Any

import torch
from torch import Tensor

from saflex_lightning.functional.ranks import Ranks

__all__ = ["ValidationMemory"]

_MOST_ROWS = 2048


class ValidationMemory:
    """Remember the newest validation rows: scores, residuals and labels.

    A ring with room for one pass over the validation data. Each call adds the rows that the ranks
    drew. A row with a non-finite number is left out.
    """

    def __init__(self) -> None:
        self._room = _MOST_ROWS
        self._added = 0
        self._chunk: int | None = None  # rows that a rank adds at a time, at most
        self._rows: Tensor | None = None  # scores, residuals, labels, 1 for a row that is there

    def start(self, num_rows: int | None, device: torch.device) -> None:
        """Set the room, before the first row, by the number of validation rows; None is unknown."""
        self._room = min(num_rows or _MOST_ROWS, _MOST_ROWS)
        if self._rows is not None:
            self._rows = self._rows.to(device)

    def add(self, scores: Tensor, residuals: Tensor, labels: Tensor, ranks: Ranks) -> None:
        """Put this rank's rows, and those of the others, in the place of the oldest.

        Residuals are the gradient of each row's loss with respect to its scores; all are
        ``(rows, classes)``.
        """
        rows = torch.cat([scores, residuals, labels, torch.ones_like(scores[:, :1])], 1)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
        if self._chunk is None:
            self._chunk = ranks.most_rows(rows)
        chunk = ranks.gather(rows, self._chunk)
        if self._rows is None:
            self._rows = rows.new_zeros(max(self._room, len(chunk)), rows.shape[1])
        places = torch.arange(self._added, self._added + len(chunk), device=rows.device)
        self._rows[places % len(self._rows)] = chunk
        self._added += len(chunk)

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return scores, residuals and labels, and 1 or 0 for whether a row is there.

        All are 0 where it is not.
        """
        if self._rows is None:
            raise RuntimeError("Expected `add` to be called before `read`, but it was not.")
        classes = self._rows.shape[1] // 3
        scores, residuals, labels, present = self._rows[: self._added].split(
            [classes, classes, classes, 1], dim=1
        )
        return scores, residuals, labels, present[:, 0]

    def clear(self) -> None:
        """Forget all rows."""
        self._added, self._rows = 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"rows": self._rows, "added": self._added, "chunk": self._chunk}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._added, self._chunk = state["added"], state["chunk"]
        self._rows = None if state["rows"] is None else state["rows"].clone()
