"""Test accuracy over the strength of an augmentation, from the results of a sweep.

python benchmarks/strength.py outputs/strength
"""

import argparse
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from saflex_lightning.cli.sweep import read_results

__all__ = ["Point", "collect_curves", "main", "plot_curves"]

SETTING = "data.augmentation_settings.magnitude"


class Point(NamedTuple):
    """Accuracy of one method at one strength.

    Attributes:
        strength: Value of the swept setting.
        accuracy: Mean over seeds, percent.
        spread: Standard deviation over seeds, percentage points; 0 for one seed.
        seeds: Number of runs.
    """

    strength: float
    accuracy: float
    spread: float
    seeds: int


def collect_curves(
    results: Iterable[dict[str, Any]], setting: str = SETTING
) -> dict[str, list[Point]]:
    """Return the points of each method, by strength.

    Args:
        results: What `read_results` returns.
        setting: The setting that was swept.

    Returns:
        Method to its points in increasing strength, methods in the order of the sweep.

    Raises:
        ValueError: If a result does not tell its strength, or differs in another setting too.
    """
    results = list(results)
    prefix = f"{setting}="
    groups: dict[str, dict[float, list[float]]] = {}
    others = set()
    for result in results:
        values = [item for item in result["overrides"] if item.startswith(prefix)]
        others.add(tuple(item for item in result["overrides"] if not item.startswith(prefix)))
        if len(values) != 1 or len(others) != 1:
            raise ValueError(
                f"Expected results of one sweep over `{setting}` and nothing else but methods and "
                f"seeds, but got one with {result['overrides']}. Sweep into a folder of its own."
            )
        strength = float(values[0].removeprefix(prefix))
        curve = groups.setdefault(result["name"], {})
        curve.setdefault(strength, []).append(100.0 * result["test_accuracy"])
    return {
        name: [
            Point(strength, mean(values), stdev(values) if len(values) > 1 else 0.0, len(values))
            for strength, values in sorted(curve.items())
        ]
        for name, curve in groups.items()
    }


def plot_curves(curves: dict[str, list[Point]], file: Path, *, setting: str = SETTING) -> None:
    """Draw one line per method, with the standard deviation over seeds as bars.

    Args:
        curves: What `collect_curves` returns.
        file: Picture to write; its suffix says which format.
        setting: Name of the horizontal axis.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        figures = import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError(
            "Expected the package `matplotlib` to draw with, but it is not installed. Run "
            "`pip install 'saflex-lightning[plots]'`."
        ) from error
    figure = figures.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        strength, accuracy, spread, _ = zip(*points, strict=True)
        axes.errorbar(strength, accuracy, yerr=spread, marker="o", capsize=3, label=name)
    seeds = sorted({point.seeds for points in curves.values() for point in points})
    axes.set_xlabel(setting.split(".")[-1])
    axes.set_ylabel("test accuracy, %")
    axes.set_title(f"mean ± standard deviation over {' or '.join(map(str, seeds))} seed(s)")
    axes.legend()
    figure.savefig(file)


def main(args: list[str] | None = None) -> None:
    """Read a sweep's folder, print its points and write the picture.

    Args:
        args: Command line; None reads the process's.
    """
    parser = argparse.ArgumentParser(description="Plot accuracy over augmentation strength.")
    parser.add_argument("folder", type=Path, help="hydra.sweep.dir of the sweep")
    parser.add_argument("--setting", default=SETTING, help="the setting that was swept")
    parser.add_argument("--output", type=Path, help="picture; default FOLDER/strength.png")
    given = parser.parse_args(args)
    results = read_results(given.folder)
    if not results:
        parser.error(f"there is no result.json below {given.folder}")
    curves = collect_curves(results, given.setting)
    for name, points in curves.items():
        for point in points:
            print(
                f"{name}  {point.strength:g}  {point.accuracy:.2f} ± {point.spread:.2f} "
                f"({point.seeds})"
            )
    file = given.output or given.folder / "strength.png"
    plot_curves(curves, file, setting=given.setting)
    print(file)


if __name__ == "__main__":
    main()
