"""Messages that say nothing about a run of the recipes."""

import logging
import warnings

__all__ = ["silence_hints"]

HINTS = (
    # The images are in memory: loader processes would only take the cores from the training.
    ".*does not have many workers.*",
    # Lightning's use of a PyTorch class and PyTorch's use of its own compiler in forward mode.
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*torch\.jit\.script` is deprecated.*",
)


def silence_hints() -> None:
    """Hide Lightning's hints that a run of the recipes cannot act on; entry points call it."""
    for hint in HINTS:
        warnings.filterwarnings("ignore", message=hint)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_tip)


def _is_no_tip(record: logging.LogRecord) -> bool:
    return "Tip: For seamless cloud" not in record.getMessage()
