"""Charts of a page as inline SVG that follows its light or dark colours."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["Line", "draw_evidence", "draw_lines"]

Line = tuple[Sequence[float], Sequence[float]]  # x and y

_INK = "#123456"  # stands for the colour of the text around the chart
# Of Okabe and Ito: told apart by everyone, on white and on black.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_HARMS, _HELPS = "#d55e00", "#009e73"
_MOST_LINES = 12


def draw_lines(lines: Mapping[str, Line], label: str) -> str:
    """Return a chart of lines over training steps; at most twelve are drawn.

    Args:
        lines: Points by the name of the line.
        label: What y is.
    """
    figure, axes = _make(3.0)
    for number, (name, (x, y)) in enumerate(list(lines.items())[:_MOST_LINES]):
        style = "-" if number < len(_COLORS) else "--"
        axes.plot(x, y, style, color=_COLORS[number % len(_COLORS)], label=_plain(name))
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize="small", labelcolor=_INK)
    return _svg(figure)


def draw_evidence(groups: Sequence[tuple[str, float, float]], errors: float) -> str:
    """Return a chart of each group's mean evidence.

    Args:
        groups: Name, mean and standard error.
        errors: Standard errors that the bars show.
    """
    figure, axes = _make(0.8 + 0.3 * len(groups))
    for place, (name, mean, error) in enumerate(reversed(groups)):
        color = _HELPS if mean - errors * error > 0 else _HARMS if mean < 0 else _INK
        axes.errorbar(mean, place, xerr=errors * error, fmt="o", color=color, capsize=3)
        axes.text(
            0,
            place,
            f"{_plain(name)}  ",
            ha="right",
            va="center",
            color=_INK,
            transform=axes.get_yaxis_transform(),
        )
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks([])
    axes.set_xlabel(f"harms   |   helps    (mean evidence, {errors:.0f} standard errors)")
    return _svg(figure)


def _make(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes: Any = figure.subplots()
    axes.patch.set_alpha(0)
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(_INK)
    return figure, axes


def _svg(figure: Any) -> str:
    from matplotlib import rc_context

    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "saflex"}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    found = stream.getvalue()
    svg = found[found.index("<svg") :].replace(_INK, "currentColor")
    # Sizes follow the page, and what describes the file names addresses outside of it.
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)


def _plain(text: str) -> str:
    """Return text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")
