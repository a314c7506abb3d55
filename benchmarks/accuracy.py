"""Measure accuracy: benches times methods times seeds, with paired differences.

    python benchmarks/accuracy.py run --tier cpu --seeds 1 2 3     # what is missing, then the table
    python benchmarks/accuracy.py run --benches qsar_mlp --methods upstream robust --jobs 2
    python benchmarks/accuracy.py table                            # from the results alone

A run is one job of `saflex-train` in a process of its own; its ``result.json`` is kept under
``outputs/accuracy/BENCH/METHOD/SEED`` and never computed twice, so an interrupted sweep goes on
where it stopped. Runs of one bench and seed see the same rows in the same order, whatever the
method, so differences are paired by seed.

Benches are named here before anything is measured. A setting of the library may be chosen on
`SELECTION` benches; a claim is made on `CONFIRMATION` benches alone, and no bench changes sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from scipy.stats import t as student

DEFAULT = "robust"
RIVALS = ("upstream", "no_aug", "uniform", "train_plus_val")


@dataclass(frozen=True)
class Bench:
    """One data set with its upstream augmentation, model and budget.

    Attributes:
        overrides: Hydra overrides, as for ``saflex-train``.
        metric: Key of ``result.json`` that is compared; a fraction.
        role: Whether settings may be chosen here, or claims confirmed.
        tier: ``"cpu"``: minutes on two cores; ``"gpu"``: the paper's scale.
        minutes: Budget of one run of one method.
        strength: Further overrides, for methods that augment.
    """

    overrides: tuple[str, ...]
    metric: Literal["test_accuracy", "test_auroc"]
    role: Literal["selection", "confirmation"]
    tier: Literal["cpu", "gpu"]
    minutes: float
    strength: tuple[str, ...] = ()


def blood(augmentation: str, role: Literal["selection", "confirmation"]) -> Bench:
    """Return a bench on the shipped BloodMNIST subset: 1,200 training images, 10 epochs.

    Args:
        augmentation: A choice of the Hydra group of this name.
        role: See `Bench`.
    """
    return Bench((f"augmentation={augmentation}",), "test_accuracy", role, "cpu", 5.0)


def tabular(
    model: Literal["mlp", "saint"],
    data: str,
    probability: float,
    metric: Literal["test_accuracy", "test_auroc"],
    role: Literal["selection", "confirmation"],
) -> Bench:
    """Return a tabular bench: the paper's network and epochs under CutMix.

    Args:
        model: Network.
        data: A choice of the Hydra group of this name.
        probability: Of a cell to be replaced.
        metric: See `Bench`.
        role: See `Bench`.
    """
    overrides = (f"experiment=tabular_{model}", f"data={data}")
    strength = (f"data.augmentation_settings.probability={probability}",)
    return Bench(overrides, metric, role, "cpu", 2.0 if model == "mlp" else 10.0, strength)


BENCHES = {
    "blood_randaugment": blood("randaugment", "selection"),
    "blood_trivialaugment": blood("trivialaugment", "confirmation"),
    "blood_mixup": blood("mixup", "confirmation"),
    "blood_crop": blood("crop", "confirmation"),
    "qsar_mlp": tabular("mlp", "qsar", 0.1, "test_auroc", "selection"),
    "qsar_mlp_strong": tabular("mlp", "qsar", 0.3, "test_auroc", "confirmation"),
    "arrhythmia_mlp": tabular("mlp", "arrhythmia", 0.1, "test_auroc", "confirmation"),
    "arrhythmia_mlp_strong": tabular("mlp", "arrhythmia", 0.3, "test_auroc", "confirmation"),
    "qsar_saint": tabular("saint", "qsar", 0.1, "test_auroc", "confirmation"),
    "arrhythmia_saint": tabular("saint", "arrhythmia", 0.1, "test_auroc", "confirmation"),
}
METHODS = {
    "no_aug": ("method=no_aug",),
    "upstream": ("method=upstream",),
    "uniform": ("method=uniform",),
    "train_plus_val": ("method=train_plus_val",),
    "label_smoothing": ("method=uniform", "model.label_smoothing=0.1"),
    "learning_to_reweight": ("method=learning_to_reweight",),
    "paper": ("method=saflex_paper",),
    "paper, replaced": ("method=saflex_paper", "batch=replace"),
    "robust": ("method=saflex_robust",),
    "robust, steered by train": ("method=saflex_robust", "data.steering=train"),
    "robust, labels kept": ("method=saflex_robust", "+callbacks.saflex.label_rule=keep"),
    "gates": ("method=saflex_gates",),
}


@dataclass(frozen=True)
class Job:
    """One method on one bench with one seed, and where its result is kept."""

    bench: str
    method: str
    seed: int
    root: Path

    @property
    def folder(self) -> Path:
        """Folder of the finished run; it does not exist before."""
        return (
            self.root
            / self.bench
            / self.method.replace(", ", "_").replace(" ", "_")
            / str(self.seed)
        )

    @property
    def name(self) -> str:
        """What the progress lines call it."""
        return f"{self.bench} / {self.method} / seed {self.seed}"

    def result(self) -> dict | None:
        """Return what the run wrote, or None before it has run."""
        file = self.folder / "result.json"
        return json.loads(file.read_text()) if file.is_file() else None

    def run(self) -> bool:
        """Run the job in a process of its own, unless its result is there.

        Returns:
            Whether there is a result now.
        """
        if self.result() is not None:
            return True
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "saflex_lightning.train"]
        command += [*BENCHES[self.bench].overrides, *METHODS[self.method], f"seed={self.seed}"]
        command += BENCHES[self.bench].strength if self.method != "no_aug" else ()
        command += [f"hydra.run.dir='{partial}'", "trainer.enable_progress_bar=false"]
        with (partial / "log.txt").open("w") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
        if code or not (partial / "result.json").is_file():
            print(f"failed: {self.name}; see {partial / 'log.txt'}", flush=True)
            return False
        partial.rename(self.folder)  # a folder of this name always holds a finished run
        print(f"done: {self.name}", flush=True)
        return True


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with half of its 95 % interval, in points.

    Attributes:
        mean: In percentage points.
        half_width: None for a single pair.
        pairs: How many.
    """

    mean: float
    half_width: float | None
    pairs: int

    @classmethod
    def of(cls, values: list[float]) -> "Difference":
        """Return the difference of some pairs.

        Args:
            values: One difference per pair, in points; at least one.
        """
        half = None
        if len(values) > 1:
            error = statistics.stdev(values) / len(values) ** 0.5
            half = float(student.ppf(0.975, len(values) - 1)) * error
        return cls(statistics.mean(values), half, len(values))

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


def make_rivals(methods: dict[str, dict[int, dict]], metric: str) -> dict[str, dict[int, float]]:
    """Return the points of everything the default is compared with.

    Args:
        methods: Results of one bench by method and seed.
        metric: Key of ``result.json``.
    """
    rivals = {name: points(methods.get(name, {}), metric) for name in RIVALS}
    return rivals | {"max(no_aug, upstream)": chosen_by_validation(methods, metric)}


def format_tables(scores: Scores) -> str:
    """Return Markdown: each bench's methods, then the default's differences over benches.

    Args:
        scores: What `read_scores` returns.
    """
    lines = ["| bench | role | metric | method | mean ± std (seeds) | against upstream |"]
    lines.append("|" + "---|" * 6)
    for bench, methods in scores.items():
        metric = BENCHES[bench].metric
        upstream = points(methods.get("upstream", {}), metric)
        for method in METHODS:
            row = f"| {bench} | {BENCHES[bench].role} | {metric} | {method} |"
            values = points(methods.get(method, {}), metric)
            if not values:
                lines.append(f"{row} not measured | |")
                continue
            spread = f" ± {statistics.stdev(values.values()):.2f}" if len(values) > 1 else ""
            mean = statistics.mean(values.values())
            difference = compare(values, upstream) if method != "upstream" else None
            lines.append(f"{row} {mean:.2f}{spread} ({len(values)}) | {difference or ''} |")
    lines += ["", f"`{DEFAULT}` against its rivals, paired by seed:", ""]
    names = [*RIVALS, "max(no_aug, upstream)"]
    lines += ["| bench | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for role in ("selection", "confirmation"):
        means: dict[str, list[float]] = {name: [] for name in names}
        for bench, methods in scores.items():
            metric = BENCHES[bench].metric
            values = points(methods.get(DEFAULT, {}), metric)
            if BENCHES[bench].role != role or not values:
                continue
            found = {
                name: compare(values, rival) for name, rival in make_rivals(methods, metric).items()
            }
            for name, difference in found.items():
                if difference:
                    means[name].append(difference.mean)
            cells = [str(found[name] or "not measured") for name in names]
            lines.append(f"| {bench} ({role}) | " + " | ".join(cells) + " |")
        cells = [str(Difference.of(means[name])) if means[name] else "" for name in names]
        lines.append(f"| **mean over {role} benches** | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def run_missing(args: argparse.Namespace) -> bool:
    """Run every job that has no result yet, several at a time.

    Args:
        args: The command line.

    Returns:
        Whether every job has a result now.
    """
    benches = args.benches or [n for n, bench in BENCHES.items() if bench.tier == args.tier]
    jobs = [
        Job(bench, method, seed, args.root)
        for seed in args.seeds  # complete one seed everywhere before the next
        for bench in benches
        for method in args.methods
    ]
    minutes = sum(BENCHES[job.bench].minutes for job in jobs if job.result() is None)
    print(f"{len(jobs)} jobs, at most {minutes:.0f} minutes of one process", flush=True)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // args.jobs))
    with ThreadPoolExecutor(args.jobs) as pool:
        return all(list(pool.map(Job.run, jobs)))


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
    parser.add_argument("--save", type=Path, help="write the tables (.md) and all results (.json)")
    args = parser.parse_args()
    args.root = args.root.resolve()
    complete = run_missing(args) if args.what == "run" else True
    scores = read_scores(args.root)
    tables = format_tables(scores)
    print(tables)
    if args.save:
        args.save.with_suffix(".md").write_text(f"{tables}\n")
        args.save.with_suffix(".json").write_text(json.dumps(scores, indent=1) + "\n")
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
