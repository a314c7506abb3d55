"""The table that ends a Hydra sweep."""

import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["SweepSummary", "format_spread", "make_sweep_table", "read_results"]


class SweepSummary(Callback):
    """Print the summary of ``saflex-train -m ...`` when the last job has ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Remember when the sweep began."""
        self.started = time.time()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Read the results of this sweep and print their table."""
        results = read_results(Path(config.hydra.sweep.dir), since=self.started)
        if results:
            Console().print(make_sweep_table(results))


def read_results(directory: Path, *, since: float = 0.0) -> list[dict[str, Any]]:
    """Return the results below a sweep's directory, in the order they were written.

    Each gets ``"overrides"``: what its command line changed besides method and seed.

    Args:
        directory: The sweep's directory.
        since: Leave out what was written before, in seconds since the epoch: an earlier sweep may
            have used the same directory.

    Raises:
        ValueError: If a result cannot be read.
    """
    # A file system may round the time of a file down to whole seconds.
    files = [file for file in directory.rglob("result.json") if file.stat().st_mtime >= since - 1]
    results = []
    for file in sorted(files, key=lambda file: file.stat().st_mtime):
        overrides = file.parent / ".hydra" / "overrides.yaml"
        changed = list(OmegaConf.load(overrides)) if overrides.is_file() else []
        kept = [str(item) for item in changed if not str(item).startswith(("method=", "seed="))]
        try:
            result = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(
                f"Expected {file} to hold the result of a job, but it cannot be read ({error}). "
                "Remove it, or run the job again."
            ) from error
        results.append({**result, "overrides": kept})
    return results


def make_sweep_table(
    results: Iterable[dict[str, Any]], title: str = "mean ± std over seeds"
) -> Table:
    """Return one row per method (and per further setting that differs between jobs).

    Args:
        results: What `read_results` returns, at least one.
        title: Of the table.
    """
    results = list(results)
    common = set.intersection(*(set(result["overrides"]) for result in results))
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        own = [item for item in result["overrides"] if item not in common]
        groups.setdefault(" ".join([str(result["name"]), *own]), []).append(result)

    columns = ("method", "test accuracy", "test AUROC", "seeds")
    table = Table(*columns, title=Text(title))
    for label, group in groups.items():
        accuracy = _spread_of(group, "test_accuracy", 2, scale=100.0)
        table.add_row(Text(label), accuracy, _spread_of(group, "test_auroc", 4), str(len(group)))
    return table


def format_spread(values: Sequence[float], digits: int) -> str:
    """Return mean and standard deviation, or the one value there is.

    Example:
        >>> format_spread([80.0, 84.0], 2)
        '82.00 ± 2.83'
    """
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def _spread_of(
    results: list[dict[str, Any]], metric: str, digits: int, *, scale: float = 1.0
) -> str:
    values = [scale * result[metric] for result in results if result.get(metric) is not None]
    return format_spread(values, digits) if values else "-"
