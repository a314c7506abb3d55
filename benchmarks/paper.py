"""The paper's tables with our own numbers beside its own, from the results of sweeps.

    python benchmarks/paper.py multirun/DATE/TIME ...

An experiment's block ``paper`` says which cells a run stands beside; ``result.json`` keeps it.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from saflex_lightning.cli.sweep import format_spread, make_sweep_table, read_results

__all__ = ["PaperCell", "check_paper", "main", "make_paper_tables", "paper_cell"]

_FILE = Path(__file__).with_name("paper_tables.json")
# A run with another upstream augmentation or model stands beside no row of the paper.
_OTHER_SYSTEM = ("augmentation=", "data.augmentation", "model")


class PaperCell(NamedTuple):
    """Mean and spread that the paper prints, in percent."""

    mean: float
    spread: float


def read_paper_tables() -> dict[str, Any]:
    """Return the paper's result tables: name to title (``"what"``) and ``"rows"``.

    Rows map a column to [mean, spread].
    """
    tables = json.loads(_FILE.read_text())
    del tables["source"]
    return tables


def paper_cell(row: str | None, column: str) -> PaperCell | None:
    """Return a cell of the paper's tables.

    Args:
        row: ``"<table>/<row>"``, as in ``"table1/no_aug"``; None stands for no row.
        column: Column of that table.

    Returns:
        The cell; None where the paper has no such row or column.

    Example:
        >>> paper_cell("table1/saflex_randaugment", "blood")
        PaperCell(mean=96.91, spread=0.15)
    """
    if row is None:
        return None
    table, name = row.split("/")
    found = read_paper_tables()[table]["rows"][name].get(column)
    return None if found is None else PaperCell(*found)


def check_paper(paper: Mapping[str, Any] | None) -> None:
    """Check that an experiment's block ``paper`` names rows that there are.

    Args:
        paper: ``table`` (a name, for the title), ``cells`` (a list of ``column`` and ``metric``,
            the entry of ``result.json`` that stands there), ``rows`` (method to
            ``"<table>/<row>"`` or None) and ``references`` (label to the same); or None.

    Raises:
        ValueError: If a table or row is unknown.
    """
    if paper is None:
        return
    tables = read_paper_tables()
    known = {f"{name}/{row}" for name, table in tables.items() for row in table["rows"]}
    named = [*paper["rows"].values(), *(paper.get("references") or {}).values()]
    unknown = sorted({row for row in named if row is not None} - known)
    if unknown or paper["table"] not in tables:
        raise ValueError(
            f"Expected `paper` to name tables and rows among {sorted(known)}, but got table "
            f"'{paper['table']}' and the unknown rows {unknown}. Correct the experiment."
        )


class _Line(NamedTuple):
    """One line of a table: the paper's row it stands beside, and the results in it."""

    row: str | None
    results: list[dict[str, Any]]


def make_paper_tables(results: Sequence[dict[str, Any]]) -> list[Table]:
    """Return one table for each of the paper's tables that some results belong to.

    Each has a line for every method that its experiment names, measured or not, for every other
    setting that was run, and for every reference that is not run here.

    Args:
        results: What `read_results` returns.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        if result.get("paper"):
            groups.setdefault(result["paper"]["table"], []).append(result)
    return [_make_table(name, group) for name, group in groups.items()]


def _make_table(name: str, results: list[dict[str, Any]]) -> Table:
    common = set.intersection(*(set(result["overrides"]) for result in results))
    columns = list(
        dict.fromkeys(
            cell["column"]
            for result in results
            for cell in result["paper"]["cells"]
            if cell["column"] is not None  # a set of one's own
        )
    )
    heading = f"{name.replace('table', 'Table ')}: {read_paper_tables()[name]['what']}"
    table = Table(
        "method",
        title=f"{heading}; percent, mean ± spread (seeds)",
        caption=Text(" ".join(sorted(common))) if common else None,
    )
    for column in columns:
        table.add_column(f"{column}\npaper")
        table.add_column(f"{column}\nours")
    for label, line in _make_lines(results, common).items():
        cells = []
        for column in columns:
            theirs = paper_cell(line.row, column)
            cells += ["-" if theirs is None else f"{theirs.mean:.2f} ± {theirs.spread:.2f}"]
            cells += [_own_cell(line.results, column)]
        table.add_row(Text(label), *cells)  # a name in brackets is no markup
    for label, row in (results[0]["paper"].get("references") or {}).items():
        cells = []
        for column in columns:
            theirs = paper_cell(row, column)
            cells += ["-" if theirs is None else f"{theirs.mean:.2f} ± {theirs.spread:.2f}"]
            cells += ["not run here"]
        table.add_row(Text(f"{label} (the paper's reference)"), *cells)
    return table


def _make_lines(results: list[dict[str, Any]], common: set[str]) -> dict[str, _Line]:
    other = any(item.startswith(_OTHER_SYSTEM) for item in common)
    lines = {
        method: _Line(None if other else row, [])
        for method, row in results[0]["paper"]["rows"].items()
    }
    for result in results:
        own = [item for item in result["overrides"] if item not in common]
        own = [item for item in own if not item.startswith("data=")]  # a column
        changed = other or any(item.startswith(_OTHER_SYSTEM) for item in own)
        row = None if changed else result["paper"]["rows"].get(result["name"])
        label = " ".join([result["name"], *own])
        lines.setdefault(label, _Line(row, [])).results.append(result)
    return lines


def _own_cell(results: Iterable[dict[str, Any]], column: str) -> str:
    values = [
        100.0 * result[cell["metric"]]
        for result in results
        for cell in result["paper"]["cells"]
        if cell["column"] == column and result.get(cell["metric"]) is not None
    ]
    return f"{format_spread(values, 2)} ({len(values)})" if values else "not measured"


def main(args: list[str] | None = None) -> None:
    """Print the tables of all results below some folders.

    Args:
        args: Command line; None reads the process's.
    """
    parser = argparse.ArgumentParser(description="Print our results beside the paper's tables.")
    parser.add_argument("folders", type=Path, nargs="+", help="hydra.sweep.dir of the sweeps")
    folders = parser.parse_args(args).folders
    results = [result for folder in folders for result in read_results(folder)]
    if not results:
        parser.error(f"there is no result.json below {', '.join(map(str, folders))}")
    Console().print(make_sweep_table(results), *make_paper_tables(results))


if __name__ == "__main__":
    main()
