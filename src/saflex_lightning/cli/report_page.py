"""``saflex-report``: what a run has learned, on one page that opens from disk."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saflex_lightning.cli.charts import Line, draw_evidence, draw_lines
from saflex_lightning.cli.run_files import Run, read_results_of, read_run
from saflex_lightning.cli.sweep import format_spread
from saflex_lightning.evidence.groups import STANDARD_ERRORS

__all__ = ["main", "make_page"]

PAGE = "saflex_report.html"
CURVES = {"loss": "loss", "accuracy": "accuracy", "auroc": "AUROC", "f1": "F1"}
COLUMNS = {  # of the comparison: metric, heading, digits, factor
    "test_accuracy": ("test accuracy, %", 2, 100.0),
    "test_auroc": ("test AUROC", 4, 1.0),
    "test_f1": ("test F1", 4, 1.0),
    "test_loss": ("test loss", 3, 1.0),
    "steps": ("steps", 0, 1.0),
    "train_seconds": ("seconds of training", 0, 1.0),
}
COSTS = {
    "steps": ("optimizer steps", "{:.0f}"),
    "processes": ("processes", "{:.0f}"),
    "step_seconds": ("seconds per step", "{:.4f}"),
    "step_seconds_without_solve": ("of these without SAFLEX", "{:.4f}"),
    "overhead_ratio": ("refined step to plain step, in time", "{:.2f}"),
    "train_seconds": ("seconds of training", "{:.0f}"),
}


def make_page(run: Path, others: Sequence[Path] = ()) -> str:
    """Return the page of a run as HTML that needs nothing else.

    Args:
        run: Folder of the run.
        others: Folders of runs to stand beside it; the rivals in its own folder do anyway.

    Raises:
        FileNotFoundError: If a folder, or a run in it, is missing.
        ImportError: If jinja2 or matplotlib is not installed.
        ValueError: If a file of a run cannot be read.
    """
    found = read_run(run)
    results = _with_labels(read_results_of(run, list(others)))
    jinja2 = _need("jinja2")
    _need("matplotlib")
    markup = importlib.import_module("markupsafe").Markup
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("saflex_lightning.cli", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["share"] = lambda cell: f"{float(cell):.0%}" if cell else "-"
    return environment.get_template("report_page.html.j2").render(
        run=found,
        groups=found.groups,
        evidence_chart=markup(_evidence_chart(found)),
        charts=[(title, markup(svg)) for title, svg in _charts(found)],
        costs=_costs(found),
        table=_comparison(results),
        remarks=_remarks(found, results),
        errors=int(STANDARD_ERRORS),
    )


def main() -> None:
    """Write the page of the run that the process's arguments name."""
    parser = argparse.ArgumentParser(prog="saflex-report", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "others", type=Path, nargs="*", metavar="OTHER", help="folders of runs to compare it with"
    )
    parser.add_argument("-o", "--output", type=Path, help=f"file; RUN_DIR/{PAGE} if none is given")
    given = parser.parse_args()
    try:
        page = make_page(given.run, given.others)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"saflex-report: {error}")
    output = given.output or given.run / PAGE
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        sys.exit(
            f"saflex-report: Expected to write the page to {output}, but got {error!r}. Name "
            "a file that can be written with --output."
        )
    print(output)


# Charts


def _evidence_chart(run: Run) -> str:
    judged = [
        (
            group["name"],
            float(group["evidence"]),
            float(group["standard_error"]),
            group["verdict"],
        )
        for group in run.groups
        if group["evidence"]
    ]
    return draw_evidence(judged, STANDARD_ERRORS) if judged else ""


def _charts(run: Run) -> list[tuple[str, str]]:
    charts: list[tuple[str, str]] = []
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for point in run.history:
        x, y = lines.setdefault(point["group"], ([], []))
        x.append(float(point["step"]))
        y.append(float(point["mean_weight"]))
    if lines:
        title = "mean weight of each group"
        charts.append((title, draw_lines(lines, title)))
    for metric, title in CURVES.items():
        curves = {
            name: line
            for name in (f"{part}/{metric}" for part in ("train", "val"))
            if len((line := _curve(run, name))[0]) > 1
        }
        if curves:
            charts.append((title, draw_lines(curves, title)))
    return charts


def _curve(run: Run, name: str) -> Line:
    points = [
        (float(row["step"]), float(row[name]))
        for row in run.metrics
        if row.get(name) and row["step"]
    ]
    return [x for x, _ in points], [y for _, y in points]


# Tables and words


def _costs(run: Run) -> list[tuple[str, str]]:
    found = [
        (label, form.format(run.result[key]))
        for key, (label, form) in COSTS.items()
        if run.result.get(key) is not None
    ]
    step, plain = (run.result.get(key) for key in ("step_seconds", "step_seconds_without_solve"))
    if step and plain:
        found.append(("SAFLEX's share of a step", f"{1 - plain / step:.0%}"))
    return found


def _with_labels(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give each result a label: its method, and its folder where a method has a seed twice.

    Such runs have other settings, and must not be averaged.
    """
    runs = [(str(result.get("name", result["folder"])), result.get("seed")) for result in results]
    twice = {name for name, seed in runs if runs.count((name, seed)) > 1}
    return [
        {**result, "label": f"{name} ({result['folder']})" if name in twice else name}
        for result, (name, _) in zip(results, runs, strict=True)
    ]


def _comparison(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return headings and one row for each label, its seeds averaged."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        methods.setdefault(result["label"], []).append(result)
    shown = [key for key in COLUMNS if any(result.get(key) is not None for result in results)]
    rows = []
    for method, runs in methods.items():
        cells = []
        for key in shown:
            _, digits, scale = COLUMNS[key]
            values = [scale * run[key] for run in runs if run.get(key) is not None]
            cells.append(format_spread(values, digits) if values else "-")
        rows.append((method, cells, ", ".join(sorted({str(run.get("seed", "-")) for run in runs}))))
    return {"columns": [COLUMNS[key][0] for key in shown], "rows": rows}


def _remarks(run: Run, results: Sequence[dict[str, Any]]) -> list[str]:
    """Say who was best, and what makes the runs hard to compare."""
    accuracy = {
        label: sum(values) / len(values)
        for label in {result["label"] for result in results}
        if (
            values := [
                result["test_accuracy"]
                for result in results
                if result["label"] == label and result.get("test_accuracy") is not None
            ]
        )
    }
    own = results[0]["label"] if run.result else ""  # the first is the run itself
    if own not in accuracy or len(accuracy) < 2:
        return []
    rival = max((label for label in accuracy if label != own), key=lambda label: accuracy[label])
    gain = 100 * (accuracy[own] - accuracy[rival])
    is_single = len({(result["label"], result.get("seed")) for result in results}) == len(accuracy)
    found = (
        f"{own} has {abs(gain):.1f} points {'more' if gain > 0 else 'less'} test accuracy "
        f"than {rival}, the best of the others"
        if round(gain, 1)
        else f"{own} and {rival}, the best of the others, have the same test accuracy"
    )
    remarks = [f"{found}, with one seed each." if is_single else f"{found}."]
    if is_single:
        remarks.append(
            "Another seed may turn it: run several, with `saflex-train -m ... seed=1,2,3`, and "
            "give their folders here."
        )
    if len({result.get("steps") for result in results}) > 1:
        remarks.append("The runs did not take the same number of steps; see the table.")
    return remarks


def _number(cell: Any) -> str:
    if cell in {None, ""}:
        return "-"
    number = float(cell)
    return f"{number:.3f}" if abs(number) >= 0.0005 or not number else f"{number:.0e}"


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"Expected {name}, which makes the page, but it is not installed. Run "
            "pip install 'saflex-lightning[report]'."
        ) from error


if __name__ == "__main__":
    main()
