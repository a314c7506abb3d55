"""Read what a run has left in its folder."""

import base64
import csv
import itertools
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from saflex_lightning.data.cells import from_cell
from saflex_lightning.insight.summary import ClassSummary, GroupSummary, RowSummary
from saflex_lightning.insight.write import CLASSES, DOUBTED, GROUPS, HISTORY, ROWS

__all__ = ["Run", "read_results_of", "read_run"]

RESULT, METRICS, SETTINGS = "result.json", "metrics.csv", "hparams.yaml"
MOST_ROWS = 25  # doubted rows that a page shows
TEXTS = {"name", "verdict", "group", "given", "suggested", "paper"}  # all else is a number


@dataclass(frozen=True)
class Run:
    """What is known of a run; what it has not left is empty."""

    path: Path
    result: dict[str, Any]
    groups: list[dict[str, str]]
    classes: list[dict[str, str]]
    rows: list[dict[str, str]]  # the most doubted ones
    history: list[dict[str, str]]
    metrics: list[dict[str, str]]
    settings: dict[str, Any]
    images: str  # the most doubted ones, PNG in base64

    @property
    def name(self) -> str:
        """What the run calls itself, else its folder."""
        return str(self.result.get("name", self.path.resolve().name))


def read_run(path: Path) -> Run:
    """Return what a run has left in its folder, and its logger there or in a folder of it.

    Args:
        path: The run's folder.

    Raises:
        FileNotFoundError: If there is no such folder, or nothing of a run in it.
        ValueError: If a file cannot be read.
    """
    _check_folder(path)
    if not any((path / name).is_file() for name in (RESULT, GROUPS)):
        runs = sorted({file.parent for name in (RESULT, GROUPS) for file in path.rglob(name)})
        advice = (
            f"It holds {len(runs)} runs; give one, {runs[0]} for instance."
            if runs
            else "Train with `saflex-train`, or with `callbacks=[SAflexCallback(), "
            "SAflexInsight()]`, and give the folder that is printed at the end."
        )
        raise FileNotFoundError(
            f"Expected {RESULT} or {GROUPS} of a run in {path}, but found neither. {advice}"
        )
    image = path / DOUBTED
    return Run(
        path=path,
        result=_read_json(path),
        groups=list(_read_csv(path / GROUPS, GroupSummary._fields)),
        classes=list(_read_csv(path / CLASSES, ClassSummary._fields)),
        rows=_doubted(_read_csv(path / ROWS, RowSummary._fields)),
        history=list(_read_csv(path / HISTORY, ("step", "group", "mean_weight"))),
        metrics=list(_read_csv(_find(path, METRICS), ("step",))),
        settings=_read_settings(path),
        images=base64.b64encode(image.read_bytes()).decode() if image.is_file() else "",
    )


def read_results_of(run: Path, others: list[Path]) -> list[dict[str, Any]]:
    """Return the results of a run, of the rivals in its folder and of other runs, one run once.

    Args:
        run: Folder of the run.
        others: Folders of other runs, or of sweeps.

    Raises:
        FileNotFoundError: If there is no such folder, or another one holds no result.
        ValueError: If a result cannot be read.
    """
    files = [run / RESULT, *sorted(run.glob(f"rivals/*/{RESULT}"))]
    files = [file for file in files if file.is_file()]
    for other in others:
        _check_folder(other)
        found = sorted(other.rglob(RESULT))
        if not found:
            raise FileNotFoundError(
                f"Expected {RESULT} of another run in {other}, but found none. Give the folder of "
                "a run, or of a sweep, of `saflex-train`."
            )
        files += found
    once = {file.resolve(): file.parent for file in files}
    return [{**_read_json(folder), "folder": str(folder)} for folder in once.values()]


def _check_folder(path: Path) -> None:
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise FileNotFoundError(
            f"Expected the folder of a run at {path}, but there is {found}. Give the folder that "
            "`saflex-train` printed at its end."
        )


def _find(path: Path, name: str) -> Path:
    """Return where the logger of a run has its file, in the run's folder or in one there."""
    files = [path / name, *sorted(path.glob(f"*/{name}"))]
    return next((file for file in files if file.is_file()), files[0])


def _read_csv(file: Path, columns: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a table, none where it is not there; cells but `TEXTS` are numbers."""
    if not file.is_file():
        return
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            line = ""
            reader = csv.DictReader((line := each for each in stream), strict=True)
            if missing := sorted({*columns} - {*(reader.fieldnames or ())}):
                raise ValueError(f"there is no column {missing}")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(f"line {reader.line_num} is cut short or too long")
                for column, cell in row.items():
                    if cell and column not in TEXTS:
                        float(cell)
                yield {column: from_cell(cell) for column, cell in row.items()}
            if not line.endswith("\n"):
                raise ValueError("its end is cut off")
    except (csv.Error, ValueError) as error:
        raise _unreadable(file, error) from error


def _read_json(path: Path) -> dict[str, Any]:
    file = path / RESULT
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable(file, error) from error
    if not isinstance(found, dict):
        raise _unreadable(file, "it holds no mapping of names")
    for name, value in found.items():
        if name not in TEXTS and not isinstance(value, (int, float, type(None))):
            raise _unreadable(file, f"its `{name}` is no number")
    return found


def _read_settings(path: Path) -> dict[str, Any]:
    """Return SAFLEX's settings where the logger of the run wrote them."""
    file = _find(path, SETTINGS)
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):  # hyperparameters may be any Python object
        return {}
    settings = found.get("saflex") if isinstance(found, dict) else None
    return settings if isinstance(settings, dict) else {}


def _doubted(rows: Iterator[dict[str, str]]) -> list[dict[str, str]]:
    """Return rows that should have another label; they come in the order of doubt."""
    doubted = (row for row in rows if row["suggested"] not in {"", row["given"]} and row["belief"])
    first = list(itertools.islice(doubted, MOST_ROWS))
    deque(doubted, maxlen=0)  # read to the end: the rest may be damaged
    return first


def _unreadable(file: Path, error: object) -> ValueError:
    return ValueError(
        f"Expected {file} as a run writes it, but it cannot be read ({error}). Remove it, or run "
        "again."
    )
