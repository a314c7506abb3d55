"""What is remembered of the last layer: validation rows, and the moments of training features.

What is remembered is the same on all ranks.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from saflex_lightning.engines.head import LastLayer
from saflex_lightning.functional.losses import Scores, dense_target, widen
from saflex_lightning.functional.ranks import Ranks

__all__ = ["RunningMoments", "ValidationMemory"]

_MOMENTS_DECAY = 0.95  # of the mean and covariance of training features, per training batch
_MOST_ROWS = 8192  # of validation


class ValidationMemory:
    """Remember the newest validation rows: features, residuals and labels.

    A ring with room for one pass over the validation data. Each call adds the rows that the ranks
    drew. A row with a non-finite number is left out.
    """

    def __init__(self) -> None:
        self._room = _MOST_ROWS
        self._added = 0
        self._chunk: int | None = None  # rows that a rank adds at a time, at most
        self._num_classes = 0
        self._rows: Tensor | None = None  # features, residuals, labels, 1 for a row that is there

    def start(self, num_rows: int | None, device: torch.device) -> None:
        """Set the room, before the first row, by the number of validation rows; None is unknown."""
        self._room = min(num_rows or _MOST_ROWS, _MOST_ROWS)
        if self._rows is not None:
            self._rows = self._rows.to(device)

    def add(self, features: Tensor, residuals: Tensor, labels: Tensor, ranks: Ranks) -> None:
        """Put this rank's rows, and those of the others, in the place of the oldest.

        Features are inputs of the last layer, ``(rows, features)``; residuals the gradient of each
        row's loss with respect to its logits, and labels, both ``(rows, classes)``.
        """
        rows = torch.cat([features, residuals, labels, torch.ones_like(features[:, :1])], 1)
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0)
        if self._chunk is None:
            self._chunk = ranks.most_rows(rows)
        chunk = ranks.gather(rows, self._chunk)
        if self._rows is None:
            self._rows = rows.new_zeros(max(self._room, len(chunk)), rows.shape[1])
            self._num_classes = residuals.shape[1]
        places = torch.arange(self._added, self._added + len(chunk), device=rows.device)
        self._rows[places % len(self._rows)] = chunk
        self._added += len(chunk)

    def watching(
        self,
        run: Callable[[], Scores],
        loss: Callable[[Scores], Tensor],
        target: Callable[[], Tensor | None],  # of the pass that ran
        last: LastLayer,
        ranks: Ranks,
    ) -> Callable[[], Scores]:
        """Return a pass over validation rows that also adds them."""

        def watch() -> Scores:
            recording = last.record()
            try:
                scores = run()
            finally:
                recording.close()
            features = widen(recording.take(scores))
            assert isinstance(scores, Tensor)
            logits = widen(scores.detach()).requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss(logits), logits)
            labels_of_rows = target()
            assert labels_of_rows is not None
            labels = dense_target(labels_of_rows, logits.shape[-1], logits.dtype)
            self.add(features, len(logits) * gradient, labels, ranks)
            return scores

        return watch

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return features, residuals and labels, and 1 or 0 for whether a row is there.

        All are 0 where it is not.
        """
        if self._rows is None:
            raise RuntimeError("Expected `add` to be called before `read`, but it was not.")
        classes = self._num_classes
        sizes = [self._rows.shape[1] - 2 * classes - 1, classes, classes, 1]
        features, residuals, labels, present = self._rows[: self._added].split(sizes, dim=1)
        return features, residuals, labels, present[:, 0]

    def clear(self) -> None:
        """Forget all rows."""
        self._added = 0
        self._rows = None

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {
            "rows": self._rows,
            "added": self._added,
            "chunk": self._chunk,
            "num_classes": self._num_classes,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        rows = state["rows"]
        self._rows, self._added = None if rows is None else rows.clone(), state["added"]
        self._chunk, self._num_classes = state["chunk"], state["num_classes"]


class RunningMoments:
    """Average the mean and the covariance of training features over steps and ranks."""

    def __init__(self) -> None:
        self.mean: Tensor | None = None
        self.covariance: Tensor | None = None

    def update(self, features: Tensor, usable: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """Take a batch into the averages and return them; its covariance is about its own mean.

        ``usable`` is 1 for rows that count, else 0. The first batch that has usable rows starts the
        averages (both are 0 until then); one without changes nothing.
        """
        sums = ranks.sum(torch.cat([usable @ features, usable.sum().unsqueeze(0)]))
        count = sums[-1].clamp(min=1)
        mean = sums[:-1] / count
        centred = (features - mean) * usable.unsqueeze(1)
        covariance = ranks.sum(centred.T @ centred) / count
        if self.mean is None or self.covariance is None:
            if not sums[-1] > 0:  # waits for the device, until there are averages
                return mean, covariance
            self.mean, self.covariance = mean, covariance
        else:
            rate = (1 - _MOMENTS_DECAY) * (sums[-1] > 0).to(mean.dtype)
            self.mean = torch.lerp(self.mean, mean, rate)
            self.covariance = torch.lerp(self.covariance, covariance, rate)
        return self.mean, self.covariance

    def to(self, device: torch.device) -> None:
        """Move the averages, after `load_state_dict`."""
        if self.mean is not None and self.covariance is not None:
            self.mean, self.covariance = self.mean.to(device), self.covariance.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed run needs."""
        return {"mean": self.mean, "covariance": self.covariance}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.mean, self.covariance = state["mean"], state["covariance"]
