"""Text in the cells of CSV files: a spreadsheet that opens them runs none of it."""

import math

__all__ = ["as_cell", "from_cell"]

# What a spreadsheet may take for the beginning of a formula, and the mark that says it is text.
_SIGNS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n", "'")


def as_cell(text: str) -> str:
    """Return text as a cell that no spreadsheet runs: a ' goes before signs, but for numbers'.

    Example:
        >>> as_cell("=1+1"), as_cell("-0.5"), from_cell(as_cell("=1+1"))
        ("'=1+1", '-0.5', '=1+1')
    """
    try:
        is_number = math.isfinite(float(text))
    except ValueError:
        is_number = False
    return f"'{text}" if text.startswith(_SIGNS) and not is_number else text


def from_cell(cell: str) -> str:
    """Return the text that `as_cell` wrote."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_SIGNS) else cell
