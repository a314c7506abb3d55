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
_VERDICTS = {"harms": "#d55e00", "helps": "#009e73"}
_STYLES = ("-", "--", ":")
_MOST_LINES = len(_COLORS) * len(_STYLES)


def draw_lines(lines: Mapping[str, Line], label: str) -> str:
    """Return a chart of lines over training steps; of more than eighteen the first are drawn.

    Args:
        lines: Points by the name of the line.
        label: What y is.
    """
    shown = list(lines.items())[:_MOST_LINES]
    columns = min(3, len(shown))
    figure, axes = _make(2.7 + 0.22 * -(-len(shown) // columns))
    for number, (name, (x, y)) in enumerate(shown):
        style, color = _STYLES[number // len(_COLORS)], _COLORS[number % len(_COLORS)]
        axes.plot(x, y, style, color=color, label=_plain(name))
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    figure.legend(
        loc="outside lower center",
        ncols=columns,
        title=f"the first {len(shown)} of {len(lines)}" if len(shown) < len(lines) else None,
        frameon=False,
        fontsize="small",
        labelcolor=_INK,
    )
    return _svg(figure)


def draw_evidence(groups: Sequence[tuple[str, float, float, str]], errors: float) -> str:
    """Return a chart of each group's mean evidence.

    Args:
        groups: Name, mean, standard error and verdict.
        errors: Standard errors that the bars show.
    """
    figure, axes = _make(0.8 + 0.3 * len(groups))
    places = range(len(groups))[::-1]
    for place, (_, mean, error, verdict) in zip(places, groups, strict=True):
        color = _VERDICTS.get(verdict, _INK)
        axes.errorbar(mean, place, xerr=errors * error, fmt="o", color=color, capsize=3)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(places, [_plain(name) for name, *_ in groups])
    axes.tick_params(axis="y", length=0)
    arrows = "\N{LEFTWARDS ARROW} harms | helps \N{RIGHTWARDS ARROW}"
    axes.set_xlabel(f"{arrows} (mean evidence, {errors:.0f} standard errors)")
    return _svg(figure)


def _make(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5, height), layout="constrained")
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
