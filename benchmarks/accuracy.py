"""Measure accuracy: benches times methods times seeds, with paired differences.

    python benchmarks/accuracy.py run --tier cpu --seeds 1 2 3     # what is missing, then the table
    python benchmarks/accuracy.py run --benches qsar_mlp --methods upstream robust --jobs 2
    python benchmarks/accuracy.py table                            # from the results alone
    python benchmarks/accuracy.py run --tier gpu --save docs/results/accuracy_gpu

`registry.py` names the benches, the methods and which benches may decide what. A run is one job of
`saflex-train`; its ``result.json`` is kept under ``outputs/accuracy/BENCH/METHOD/SEED`` and never
computed twice, so an interrupted sweep goes on where it stopped; with ``--save`` it adds to the
results that were saved before, also those of other machines. Runs of one bench and seed see the
same rows in the same order, whatever the method, so differences are paired by seed. A bench whose
data are not there is named, with the way to get them, and left out.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from multiprocessing import active_children, get_context
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from registry import BENCHES, DEFAULT, METHODS
from scipy.stats import t as student

from saflex_lightning.cli.train import train

BEST = "max(no_aug, upstream)"  # the better one on validation rows, per seed
PAIRS = (  # what is compared, and with which rival
    (DEFAULT, "upstream"),
    (DEFAULT, "no_aug"),
    (DEFAULT, BEST),
    (DEFAULT, "uniform"),
    (DEFAULT, "paper"),
    (DEFAULT, "paper, replaced"),
    (DEFAULT, "label smoothing"),
    (DEFAULT, "small loss"),
    (DEFAULT, "learning to reweight"),
    (DEFAULT, "soft augmentation"),
    (DEFAULT, "gradient"),
    *((method, DEFAULT) for method, settings in METHODS.items() if settings.is_ablation),
    (f"{DEFAULT}, nothing held out", "uniform, train + val"),
    (f"{DEFAULT}, nothing held out", "upstream, train + val"),
    (f"{DEFAULT}, nothing held out", "no_aug, train + val"),
)


@dataclass(frozen=True)
class Job:
    """One method on one bench with one seed, where its result is kept and where its data lie."""

    bench: str
    method: str
    seed: int
    root: Path
    data: Path = Path("outputs/accuracy_data")

    @property
    def folder(self) -> Path:
        """Folder of the finished run; it does not exist before."""
        method = self.method.replace(",", "").replace("+", "and").replace(" ", "_")
        return self.root / self.bench / method / str(self.seed)

    @property
    def name(self) -> str:
        """What the progress lines call it."""
        return f"{self.bench} / {self.method} / seed {self.seed}"

    def fill(self, text: str) -> str:
        """Return a text of the registry for this job's data and seed."""
        known = {"data": self.data, "seed": self.seed, "val_rows": BENCHES[self.bench].val_rows}
        for name, value in known.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text

    def overrides(self) -> list[str]:
        """Return what is added to the main job of `saflex-train`."""
        bench, method = BENCHES[self.bench], METHODS[self.method]
        strength = bench.strength if method.augments else ()
        return [
            *(self.fill(item) for item in (*bench.overrides, *strength, *method.overrides)),
            f"seed={self.seed}",
            "trainer.enable_progress_bar=false",
        ]

    def missing(self) -> str | None:
        """Return what the bench needs and lacks, and how to get it; None if all is there."""
        bench = BENCHES[self.bench]
        if bench.needs is None or Path(self.fill(bench.needs)).exists():
            return None
        return f"{self.bench} needs {self.fill(bench.needs)}: {self.fill(bench.recipe)}"

    def result(self) -> dict | None:
        """Return what the run wrote, or None before it has run."""
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def run(self) -> bool:
        """Run the job, unless its result is there.

        Returns:
            Whether there is a result now.
        """
        if self.result() is not None:
            return True
        partial_folder = self.folder.with_name(f"{self.folder.name}.partial")
        partial_folder.mkdir(parents=True, exist_ok=True)
        log = partial_folder / "log.txt"
        with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            done = self._train(partial_folder)
        if not done:
            print(f"failed: {self.name}; see {log}", flush=True)
            return False
        partial_folder.rename(self.folder)  # a folder of this name always holds a finished run
        print(f"done: {self.name}", flush=True)
        return True

    def _train(self, output_dir: Path) -> bool:
        """Train in this process; an error goes to the log and ends this job alone."""
        try:
            with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
                cfg = compose("train", [*self.overrides(), f"output_dir='{output_dir}'"])
            train(cfg)
        except Exception:
            traceback.print_exc()
            return False
        return True


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with half of its 95 % interval, in points.

    Attributes:
        mean: In percentage points.
        half_width: None for a single pair.
        standard_error: Of the mean; None for a single pair.
        pairs: How many.
    """

    mean: float
    half_width: float | None
    standard_error: float | None
    pairs: int

    @classmethod
    def of(cls, values: list[float]) -> "Difference":
        """Return the difference of some pairs.

        Args:
            values: One difference per pair, in points; at least one.
        """
        half = error = None
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
            half = float(student.ppf(0.975, len(values) - 1)) * error
        return cls(statistics.mean(values), half, error, len(values))

    def is_below(self) -> bool:
        """Return whether the mean is below zero by more than its standard error.

        A single pair has none, so it cannot tell.
        """
        return self.standard_error is not None and self.mean < -self.standard_error

    def __str__(self) -> str:
        width = "" if self.half_width is None else f" ± {self.half_width:.2f}"
        return f"{self.mean:+.2f}{width} ({self.pairs})"


Scores = dict[str, dict[str, dict[int, dict]]]  # by bench, method and seed: result.json


def read_scores(root: Path) -> Scores:
    """Return every result below a folder.

    Args:
        root: Where runs are kept.
    """
    scores: Scores = {}
    for bench in BENCHES:
        for method in METHODS:
            for folder in sorted(Job(bench, method, 0, root).folder.parent.glob("[0-9]*")):
                job = Job(bench, method, int(folder.name), root) if folder.name.isdigit() else None
                if job and (result := job.result()):
                    scores.setdefault(bench, {}).setdefault(method, {})[job.seed] = result
    return scores


def read_saved(file: Path) -> Scores:
    """Return the results that `format_json` wrote.

    Args:
        file: The file; without it there are none.
    """
    scores: Scores = {}
    for line in json.loads(file.read_text()) if file.exists() else []:
        seeds = {int(seed): result for seed, result in line["seeds"].items()}
        scores.setdefault(line["bench"], {})[line["method"]] = seeds
    return scores


def merge(saved: Scores, found: Scores) -> Scores:
    """Return the results of both, in the order of the registry; what was found counts first.

    Args:
        saved: From `read_saved`.
        found: From `read_scores`.
    """
    both: Scores = {}
    for name in BENCHES:
        for method in METHODS:
            seeds = [scores.get(name, {}).get(method, {}) for scores in (saved, found)]
            if any(seeds):
                both.setdefault(name, {})[method] = dict(sorted((seeds[0] | seeds[1]).items()))
    return both


def points(results: dict[int, dict], metric: str) -> dict[int, float]:
    """Return a metric in percentage points by seed.

    Args:
        results: By seed.
        metric: Key of ``result.json``.
    """
    return {seed: 100 * result[metric] for seed, result in results.items()}


def compare(first: dict[int, float], second: dict[int, float]) -> Difference | None:
    """Return the paired difference over the seeds that both have; None without any.

    Args:
        first: Points by seed.
        second: Points by seed.
    """
    seeds = sorted(first.keys() & second.keys())
    return Difference.of([first[seed] - second[seed] for seed in seeds]) if seeds else None


def chosen_by_validation(methods: dict[str, dict[int, dict]], metric: str) -> dict[int, float]:
    """Return the better of no augmentation and upstream, chosen per seed on validation data.

    Args:
        methods: Results by method and seed.
        metric: Key of ``result.json``.
    """
    first, second = methods.get("no_aug", {}), methods.get("upstream", {})
    val_metric = metric.replace("test", "val")
    return {
        seed: 100 * max((first[seed], second[seed]), key=lambda run: run[val_metric])[metric]
        for seed in first.keys() & second.keys()
    }


def read_points(methods: dict[str, dict[int, dict]], name: str, metric: str) -> dict[int, float]:
    """Return the points of a method, or of the rival that is chosen by validation.

    Args:
        methods: Results of one bench by method and seed.
        name: A method or `BEST`.
        metric: Key of ``result.json``.
    """
    if name == BEST:
        return chosen_by_validation(methods, metric)
    return points(methods.get(name, {}), metric)


def format_methods(scores: Scores) -> list[str]:
    """Return a Markdown table: every method on every bench that has a result.

    Args:
        scores: What `read_scores` returns.
    """
    lines = ["| bench | role | metric | method | mean ± std (seeds) | against upstream |"]
    lines.append("|" + "---|" * 6)
    for bench, methods in scores.items():
        metric = BENCHES[bench].metric
        upstream = read_points(methods, "upstream", metric)
        for method, settings in METHODS.items():
            if not settings.serves(BENCHES[bench]):
                continue
            row = f"| {bench} | {BENCHES[bench].role} | {metric} | {method} |"
            values = read_points(methods, method, metric)
            if not values:
                lines.append(f"{row} not measured | |")
                continue
            spread = f" ± {statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
            mean = statistics.mean(values.values())
            difference = compare(values, upstream) if method != "upstream" else None
            lines.append(f"{row} {mean:.2f}{spread} ({len(values)}) | {difference or ''} |")
    return lines


def format_pairs(scores: Scores) -> list[str]:
    """Return Markdown tables of paired differences over benches, one for each role.

    Args:
        scores: What `read_scores` returns.
    """
    lines = []
    for role in ("selection", "confirmation"):
        benches = [bench for bench in scores if BENCHES[bench].role == role]
        if not benches:
            continue
        lines += ["", f"Over {role} benches:", ""]
        lines += ["| method | rival | mean ± 95 % (benches) | worst bench | below by > 1 s.e. |"]
        lines += ["|" + "---|" * 5]
        for method, rival in PAIRS:
            found = {
                bench: difference
                for bench in benches
                if (difference := compare_on(bench, scores[bench], method, rival))
            }
            if not found:
                lines.append(f"| {method} | {rival} | not measured | | |")
                continue
            mean = Difference.of([difference.mean for difference in found.values()])
            worst = min(found, key=lambda bench: found[bench].mean)
            below = [bench for bench, difference in found.items() if difference.is_below()]
            lines.append(
                f"| {method} | {rival} | {mean} | {worst} {found[worst]} "
                f"| {', '.join(below) or 'none'} |"
            )
    return lines


def compare_on(
    bench: str, methods: dict[str, dict[int, dict]], method: str, rival: str
) -> Difference | None:
    """Return the paired difference of two methods on one bench; None without a common seed.

    Args:
        bench: Name of the bench.
        methods: Its results by method and seed.
        method: Name of the first.
        rival: Name of the second, or `BEST`.
    """
    metric = BENCHES[bench].metric
    first, second = (read_points(methods, name, metric) for name in (method, rival))
    return compare(first, second)


def format_tables(scores: Scores) -> str:
    """Return Markdown: differences over benches, then each bench's methods.

    Args:
        scores: What `read_scores` returns.
    """
    return "\n".join([*format_pairs(scores), "", *format_methods(scores)]).strip()


def format_json(scores: Scores) -> str:
    """Return the metrics of every run, a line for each method of a bench.

    Args:
        scores: What `read_scores` returns.
    """
    kept = ("test_", "val_", "steps", "step_seconds", "wrong_label_auroc")
    lines = []
    for bench, methods in scores.items():
        for method, results in methods.items():
            seeds = {
                seed: {
                    key: round(value, 5)
                    for key, value in result.items()
                    if key.startswith(kept) and value is not None
                }
                for seed, result in results.items()
            }
            lines.append(json.dumps({"bench": bench, "method": method, "seeds": seeds}))
    return "[\n" + ",\n".join(lines) + "\n]\n"


def end_with_workers(number: int, frame: object) -> None:
    """End this process and its workers; a pool would wait for the runs in progress.

    Args:
        number: The signal.
        frame: Where it came.
    """
    for worker in active_children():
        worker.kill()
    sys.exit(128 + number)


def run_missing(args: argparse.Namespace, saved: Scores) -> bool:
    """Run every job that has no result yet, several at a time.

    Args:
        args: The command line.
        saved: Results that are known without a run.

    Returns:
        Whether every job has a result now.
    """
    jobs = [
        Job(bench, method, seed, args.root, args.data)
        for seed in args.seeds  # complete one seed everywhere before the next
        for bench in args.benches
        for method in args.methods
        if METHODS[method].serves(BENCHES[bench])
        and seed not in saved.get(bench, {}).get(method, {})
    ]
    missing = sorted({text for job in jobs if (text := job.missing())})
    for text in missing:
        print(f"left out: {text}", flush=True)
    jobs = [job for job in jobs if not job.missing() and job.result() is None]
    minutes = sum(BENCHES[job.bench].minutes for job in jobs)
    print(f"{len(jobs)} jobs, at most {minutes:.0f} minutes of one core", flush=True)
    threads = int(os.environ.get("OMP_NUM_THREADS", max(1, (os.cpu_count() or 1) // args.jobs)))
    limit = partial(torch.set_num_threads, threads)
    with ProcessPoolExecutor(args.jobs, get_context("spawn"), limit) as pool:
        done = list(pool.map(Job.run, jobs))
    return all(done) and not missing


def main() -> None:
    """Run what the command line asks for and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--tier", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--benches", nargs="+", choices=list(BENCHES), help="default: the tier's")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--root", type=Path, default=Path("outputs/accuracy"), help="of all runs")
    parser.add_argument(
        "--data", type=Path, default=Path("outputs/accuracy_data"), help="folder of data files"
    )
    parser.add_argument(
        "--save", type=Path, help="add to these results (.json) and write their tables (.md)"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, end_with_workers)
    args.root, args.data = args.root.resolve(), args.data.resolve()
    args.benches = args.benches or [n for n, bench in BENCHES.items() if bench.tier == args.tier]
    saved = read_saved(args.save.with_suffix(".json")) if args.save else {}
    complete = run_missing(args, saved) if args.what == "run" else True
    tiers = {BENCHES[name].tier for name in args.benches}
    found = {n: runs for n, runs in read_scores(args.root).items() if BENCHES[n].tier in tiers}
    scores = merge(saved, found)
    if args.save:
        args.save.with_suffix(".json").write_text(format_json(scores))
        scores = read_saved(args.save.with_suffix(".json"))  # tables of what others can read
    tables = format_tables(scores)
    print(tables)
    if args.save:
        args.save.with_suffix(".md").write_text(f"{tables}\n")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
