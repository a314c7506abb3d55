"""Figures of what was collected, by matplotlib, which is imported where a figure is drawn."""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from .collect import RowTable, WeightHistory
from .images import DoubtedImage
from .summary import Names

__all__ = ["can_draw", "draw_all", "plain_text"]

_MOST_CLASSES = 40  # of a label matrix that can be read
_MOST_LINES = 20  # groups whose lines can be told apart


def can_draw() -> bool:
    """Say whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_all(
    table: RowTable, history: WeightHistory, images: Sequence[DoubtedImage], names: Names
) -> Iterator[tuple[str, Any]]:
    """Yield every figure that there is something for, by its name."""
    if history.points:
        yield "groups", draw_history(history, names)
    if history.histogram.any():
        yield "weights", draw_weights(history)
    label, suggested = table.facts["label"], table.facts["suggested"]
    if (suggested >= 0).any() and label.max() < _MOST_CLASSES and suggested.max() < _MOST_CLASSES:
        yield "labels", draw_labels(table, names)
    if images:
        yield "doubted", draw_images(images, names)


def draw_history(history: WeightHistory, names: Names) -> Any:
    """Draw mean weight of each group over the steps."""
    figure = _figure(8, 3)
    axes = figure.subplots()
    points = np.array(history.points)
    for group in np.unique(points[:, 1])[:_MOST_LINES].astype(int):
        steps, _, weight = points[points[:, 1] == group].T
        axes.plot(steps, weight, label=plain_text(names.group(group)))
    axes.set(xlabel="step", ylabel="mean weight")
    axes.legend(fontsize="x-small", ncols=2)
    return figure


def draw_weights(history: WeightHistory) -> Any:
    """Draw the histogram of the weights."""
    figure = _figure(6, 3)
    axes = figure.subplots()
    axes.stairs(history.histogram, history.edges, fill=True)
    axes.set(xlabel="weight of a row (the last bin holds what is larger)", ylabel="visits")
    return figure


def draw_labels(table: RowTable, names: Names) -> Any:
    """Draw how many rows of each given label have each suggested one."""
    label, suggested = table.facts["label"], table.facts["suggested"]
    is_judged = (suggested >= 0) & (label >= 0)
    size = int(max(label.max(), suggested.max())) + 1
    counts = np.zeros((size, size), dtype=int)
    np.add.at(counts, (label[is_judged], suggested[is_judged]), 1)
    figure = _figure(2 + 0.35 * size, 2 + 0.35 * size)
    axes = figure.subplots()
    axes.imshow(counts, cmap="Blues")
    ticks = [plain_text(names.label(number)) for number in range(size)]
    axes.set_xticks(range(size), ticks, rotation=90)
    axes.set_yticks(range(size), ticks)
    axes.set(xlabel="suggested label", ylabel="given label")
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if count > counts.max() / 2 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=7)
    return figure


def draw_images(images: Sequence[DoubtedImage], names: Names) -> Any:
    """Draw images with the label they have and the one that is suggested."""
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    figure = _figure(2 * columns, 2.6 * rows)
    for axes, doubted in zip(
        figure.subplots(rows, columns, squeeze=False).flat, images, strict=False
    ):
        low, high = doubted.image.min(), doubted.image.max()
        shown = ((doubted.image - low) / (high - low).clamp(min=1e-12)).movedim(0, -1)
        axes.imshow(shown.squeeze(-1).numpy(), cmap="gray")
        given, suggested = (plain_text(names.label(n)) for n in (doubted.given, doubted.suggested))
        title = f"row {doubted.index}\n{given}\n\N{RIGHTWARDS ARROW} {suggested}"
        axes.set_title(title, fontsize=9)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure


def plain_text(text: str) -> str:
    """Return text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure  # of an extra; opens no window

    return Figure(figsize=(width, height), layout="constrained", dpi=120)
