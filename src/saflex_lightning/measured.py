"""What calls of `SAflexMixin.saflex_forward` returned, and which of them a loss belongs to."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .engines import Scores, as_tuple

__all__ = ["MeasuredScores", "find_call"]


@dataclass
class MeasuredScores:
    """What one call of `SAflexMixin.saflex_forward` returned, and how it moves.

    Attributes:
        scores: What it returned.
        tangent: The detached tangent of some rows.
        rows: Which rows of the batch those are, int64; None means all.
        is_used: Whether a loss was computed from the scores.
    """

    scores: Scores
    tangent: Scores
    rows: Tensor | None = None
    is_used: bool = False

    def returned(self, logits: Scores) -> bool:
        """Say whether logits are the very tensors that the call returned.

        Args:
            logits: What `SAflexMixin.saflex_loss` was given.
        """
        pairs = zip(as_tuple(self.scores), as_tuple(logits), strict=False)
        return all(ours is theirs for ours, theirs in pairs)


def find_call(calls: Sequence[MeasuredScores], logits: Scores) -> MeasuredScores:
    """Return the call that made the logits: by identity, else the one that must be meant.

    Args:
        calls: Those of the step, at least one.
        logits: What `SAflexMixin.saflex_loss` was given.

    Returns:
        One of them.

    Raises:
        ValueError: If several can be meant.
    """
    meant = (
        [call for call in calls if call.returned(logits)]
        or [call for call in calls if not call.is_used]
        or calls
    )
    if len(meant) > 1:
        raise ValueError(
            f"Expected `logits` to be what one of the {len(calls)} calls of `saflex_forward` in "
            "this step returned, but they are the tensors of none. Pass them on unchanged."
        )
    return meant[0]
