"""What an engine says when it cannot differentiate a model."""

__all__ = ["UnsupportedModelError"]


class UnsupportedModelError(ValueError):
    """The chosen engine cannot differentiate this model; the message names one that can."""
