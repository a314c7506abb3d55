"""How the extra time of a default step grows, each size beside the factor that theory predicts.

    python benchmarks/step_growth.py --json step_growth.json
    python benchmarks/step_growth.py --axes classes parameters --large   # a GPU

The extra time is that of a refined step over a plain one, in the Trainer, as in `step_time.py`; a
perceptron with two hidden layers, 128 rows, half of them augmented. ``theory`` counts the
operations that grow, so it holds where they, and not launches, take the time. ``classes`` times the
discriminant alone, with all the validation rows that are remembered, ``indices`` the table of rows
alone. ``ranks`` counts what the processes send to one another in a step.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from step_models import CASES, CLASSES, Case, Cell, perceptron
from step_time import describe, fit, make_parser, measure_blocks, quiet
from torch.nn.functional import one_hot

from saflex_lightning.evidence import discriminant
from saflex_lightning.evidence.averages import RowAverages
from saflex_lightning.evidence.weights import NOISE
from saflex_lightning.functional.ranks import Ranks

ROWS, FEATURES, WIDTH, REMEMBERED = 128, 64, 256, 2048
LOOK, REFIT = 4, 12  # steps between two looks at validation rows, and two discriminants


def discriminant_operations(classes: int, *, diagonal: bool) -> float:
    """Return what judging a batch and fitting three discriminants cost in a step."""
    squares, cubes = 2 * REMEMBERED * classes**2, classes**3
    fitted = 3 * squares  # class means twice, and the gradient
    if not diagonal:
        fitted += squares + cubes / 3 + 4 * cubes  # the covariance, its factor, solving with it
    halves = 2 * 2 * squares  # to judge the remembered rows by each half of them
    return 4 * ROWS * classes**2 + (3 * fitted + halves) / REFIT


def scoring_operations(features: int, width: int) -> float:
    """Return what scoring the validation rows of a step costs."""
    return features * width + width**2 + width * CLASSES


def width_of(parameters: int) -> int:
    """Return the width of a perceptron of about so many parameters."""
    return round(math.sqrt(parameters + 36**2) - 36)


# Of each axis: the sizes, those for ``--large``, the case, and what theory says.
AXES: dict[str, tuple[list[int], list[int], Callable[[int], Case], Callable[[int], float]]] = {
    "features": (
        [64, 256, 1024, 4096],
        [],
        lambda size: Case(partial(perceptron, size, WIDTH), (size,)),
        lambda size: scoring_operations(size, WIDTH),
    ),
    "parameters": (
        [10**5, 10**6, 10**7],
        [10**8],
        lambda size: Case(partial(perceptron, FEATURES, width_of(size)), (FEATURES,)),
        lambda size: scoring_operations(FEATURES, width_of(size)),
    ),
    "batch": (
        [32, 128, 512, 2048, 4096],
        [],
        lambda size: Case(partial(perceptron, FEATURES, WIDTH), (FEATURES,), rows=size),
        float,
    ),
    "validation": (
        [100, 1000, 10_000, 100_000, 10**6],
        [],
        lambda size: Case(partial(perceptron, FEATURES, WIDTH), (FEATURES,), val_rows=size),
        lambda size: 1,  # a look draws a batch
    ),
}
CLASS_NUMBERS = [10, 100, 300, 1000, 3000]
INDICES = [10**3, 10**4, 10**5, 10**6]
RANKS = [1, 2, 4]


def measure_point(axis: str, size: int, args: argparse.Namespace) -> dict:
    """Return the plain step's seconds and what a refined one adds."""
    name = f"{axis} {size}"
    CASES[name] = AXES[axis][2](size)
    refined, plain = measure_blocks(Cell(name, "union", "robust"), args)
    extra = [one - other for one, other in zip(refined, plain, strict=True)]
    lower, median, upper = statistics.quantiles(extra, n=4, method="inclusive")
    return {
        "plain": statistics.median(plain),
        "extra": median,
        "quartiles": [lower, upper],
        "theory": AXES[axis][3](size),
    }


def measure_classes(size: int, args: argparse.Namespace, *, diagonal: bool) -> dict:
    """Return what judging a batch, and a twelfth of fitting anew, cost in a step."""
    clock, device = getattr(time, args.clock), torch.device(args.device)
    scores = torch.randn(REMEMBERED, size, device=device)
    labels = one_hot(torch.randint(size, (REMEMBERED,), device=device), size).float()
    rows = scores, scores.softmax(1) - labels, labels, torch.ones(REMEMBERED, device=device)

    def seconds(run: Callable) -> float:
        started = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - started

    times = []
    with patch.object(discriminant, "MOST_SCORES", 0 if diagonal else math.inf):
        found = discriminant.fit_discriminant(*rows)
        for _ in range(7 if size < 1000 else 2):
            fitted = seconds(lambda: discriminant.fit_discriminant(*rows))
            fitted += seconds(lambda: discriminant.best_temperature(rows[0], *rows[2:]))
            times.append(fitted / REFIT + seconds(lambda: found.judge(scores[:ROWS])))
    lower, median, upper = statistics.quantiles(times, n=4, method="inclusive")
    theory = discriminant_operations(size, diagonal=diagonal)
    return {"plain": 0, "extra": median, "quartiles": [lower, upper], "theory": theory}


def measure_indices(size: int, args: argparse.Namespace) -> dict:
    """Return what finding the rows of a batch, and taking four batches in, cost in a step."""
    clock, averages = getattr(time, args.clock), RowAverages()
    every, device = Ranks(), torch.device(args.device)
    rows, ones = torch.arange(size, device=device), torch.ones(size, device=device)
    averages.update(7 * rows, ones, ones < 0, every, 1.0)
    averages.take_in()
    times = []
    for _ in range(30):
        batches = [7 * rows[torch.randint(size, (ROWS,), device=device)] for _ in range(LOOK)]
        started = clock()
        for index in batches:
            averages.update(index, ones[:ROWS], ones[:ROWS] < 0, every, 1.0)
        averages.take_in()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((clock() - started) / LOOK)
    lower, median, upper = statistics.quantiles(times, n=4)
    # The sums are copied when batches are taken in.
    return {"plain": 0, "extra": median, "quartiles": [lower, upper], "theory": 2 * size / LOOK}


def count_sent(args: argparse.Namespace) -> None:
    """Train on this rank, and print what the package sent, per step."""
    sent = {"calls": 0, "bytes": 0}
    own = torch.distributed.all_reduce

    def counting(tensor, *rest, **kwargs):
        sent["calls"] += 1
        sent["bytes"] += tensor.numel() * tensor.element_size()
        return own(tensor, *rest, **kwargs)

    torch.distributed.all_reduce = counting
    steps = 8 * REFIT
    CASES["rank"] = Case(partial(perceptron, FEATURES, WIDTH), (FEATURES,))
    fit(Cell("rank", "union", "robust"), args, steps)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps({name: number / steps for name, number in sent.items()}))


def sent_by_theory(ranks: int) -> float:
    """Return bytes per step: sums of groups and weights, indices with two numbers, scores."""
    if ranks == 1:
        return 0
    groups, columns, number = 4, 9 + len(NOISE), 4  # what a step shows of its groups
    validation = ranks * (ROWS // LOOK) * (3 * CLASSES + 1) * number / LOOK
    table = ranks * ROWS * (8 + 2 * number) + ranks * number
    return number * (groups * columns + 1) + table + validation


def measure_ranks(size: int, args: argparse.Namespace) -> dict:
    """Return what is sent in a step of so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={size}", __file__, "--count-sent", "--device", "cpu"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {**found, "theory": sent_by_theory(size)}


def short(number: float, digits: int = 3) -> str:
    """Return a number of few digits, never with an exponent."""
    return f"{number:,.0f}" if number >= 10 ** (digits - 1) else f"{number:.{digits}g}"


def table_lines(rows: list[dict]) -> list[str]:
    """Return the lines of both tables, Markdown."""
    lines = [
        "| what grows | size | plain | extra (quartiles) | factor | theory |",
        "|---|---|---|---|---|---|",
    ]
    before: dict = {}
    for row in rows:
        if row["axis"] == "ranks":
            continue
        cells = [short(1000 * value) for value in (row["extra"], *row["quartiles"])]
        plain = f"{short(1000 * row['plain'])} ms" if row["plain"] else "-"
        line = f"| {row['axis']} | {row['size']:,} | {plain} |"
        line += f" {cells[0]} ms ({cells[1]} to {cells[2]}) |"
        if before.get("axis") == row["axis"]:
            factors = (row[name] / before[name] for name in ("extra", "theory"))
            line += "".join(f" x {short(factor, 2)} |" for factor in factors)
        else:
            line += " | |"
        lines.append(line)
        before = row
    sent = [row for row in rows if row["axis"] == "ranks"]
    if sent:
        lines += ["", "| ranks | calls a step | bytes a step | theory |", "|---|---|---|---|"]
    for row in sent:
        lines.append(
            f"| {row['size']} | {row['calls']:.1f} | {row['bytes']:,.0f} | {row['theory']:,.0f} |"
        )
    return lines


def main() -> None:
    """Measure what the command line asks for, and show it."""
    own = {
        "classes, diagonal": (CLASS_NUMBERS, partial(measure_classes, diagonal=True)),
        "classes, full": (CLASS_NUMBERS, partial(measure_classes, diagonal=False)),
        "indices": (INDICES, measure_indices),
        "ranks": (RANKS, measure_ranks),
    }
    axes = [*AXES, *own]
    parser = make_parser(__doc__)
    parser.add_argument("--axes", nargs="+", choices=axes, default=axes)
    parser.add_argument("--large", action="store_true", help="10,000 classes, 1e8 parameters")
    parser.add_argument("--count-sent", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(args.threads)
    if args.count_sent:
        count_sent(args)
        return
    rows = []
    for axis in args.axes:
        if axis in own:
            sizes, measure = own[axis]
            sizes = sizes + [10_000] * (args.large and axis == "classes, diagonal")
        else:
            sizes, large, *_ = AXES[axis]
            sizes, measure = sizes + args.large * large, partial(measure_point, axis)
        for size in sizes:
            rows.append({"axis": axis, "size": size, **measure(size, args)})
            print(rows[-1], flush=True)
    print("\n" + json.dumps(describe(args)) + "\n\n" + "\n".join(table_lines(rows)))
    if args.json:
        results = {"settings": describe(args), "rows": rows}
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
