"""Measure what evidence is worth: three kinds of benches, never averaged together.

    python benchmarks/evidence.py run --data FOLDER --seeds 1 2 3
    python benchmarks/evidence.py run --benches "digits symmetric" --methods union robust
    python benchmarks/evidence.py table --save docs/results/evidence_cpu
    python benchmarks/evidence.py table --known docs/results/evidence_cpu.json

FOLDER holds ``medmnist/bloodmnist.npz``, the tables in ``tabular`` and, in ``fashion``, the four
files of Fashion-MNIST. A finished run is kept under ``outputs/evidence`` and never computed twice;
tables are made of these and of ``--known`` ones, as ``--save`` wrote them. All methods of a bench
and seed see the same rows in the same order; differences are paired by seed. Accuracy is that of
the whole test split, after the last step; loss is in nats.
"""

import argparse
import json
import logging
import platform
import statistics
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from io import StringIO
from operator import add
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from evidence_benches import BENCHES, KINDS, Batches, Pool, make_data
from evidence_rivals import LearningToReweight, MetaWeightNet
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.functional.classification import binary_auroc

from saflex_lightning import SAflexCallback, SAflexInsight, SAflexMixin
from saflex_lightning.data import read_row_weights
from saflex_lightning.insight.write import ROWS

OUTPUTS = Path("outputs/evidence")
METHODS = {
    "no augmentation": None,
    "union": None,
    "label smoothing": None,
    "merged": None,  # trains on the validation rows too
    "merged by rows": None,  # the same after a first run, on the rows that this one believed
    "merged by shuffled rows": None,  # its control: the same weights, of other rows
    "merged by confident learning": None,
    "small loss": None,
    "early-learning regularization": None,
    "gold loss correction": None,
    "learning to reweight": None,
    "meta-weight-net": None,
    "confident learning": None,
    "oracle": None,
    "gradient": {"preset": "gradient"},
    "robust": {},
    "shuffled": {},
}
LOOKING_AHEAD = {"learning to reweight": LearningToReweight, "meta-weight-net": MetaWeightNet}
SMOOTHING = 0.1
CONTROL, PLAIN = "shuffled", "union"
SAVED = ("accuracy", "loss", "auroc")
SECOND_RUNS = ("merged by rows", "merged by shuffled rows")  # and its control


class Classifier(SAflexMixin, pl.LightningModule):
    """A network, Adam at 1e-3, and the loss of a method."""

    def __init__(self, network, method, data):
        super().__init__()
        self.net = network
        self.method = method
        self.is_annealed = False
        self.data = [data]  # not a part of the module
        classes = int(data.clean[1].max()) + 1
        self.register_buffer("memory", torch.zeros(0, classes), persistent=False)
        self.transition = self.kept = None
        self.looks_ahead = (
            LOOKING_AHEAD[method](data.validation) if method in LOOKING_AHEAD else None
        )

    def forward(self, inputs):
        """Return logits."""
        return self.net(inputs)

    def training_step(self, batch, batch_idx):
        """Return the loss."""
        if self.kept is not None:
            kept = ~batch.augmented | self.kept[batch.index]
            return F.cross_entropy(self(batch.inputs[kept]), batch.target[kept])
        if self.looks_ahead is not None:
            weights = self.looks_ahead.weigh(self.net, batch)
            losses = F.cross_entropy(self(batch.inputs), batch.target, reduction="none")
            return (weights * losses).sum() / weights.sum().clamp(min=1e-12)
        logits = self.saflex_forward(batch.inputs)
        if self.method == "small loss":
            return self._small_loss(logits, batch)
        if self.method == "early-learning regularization":
            return self._early_learning(logits, batch)
        if self.method == "gold loss correction" and self.transition is not None:
            given = torch.where(
                batch.augmented.unsqueeze(1), logits.softmax(1) @ self.transition, logits.softmax(1)
            )
            return F.nll_loss(given.clamp(min=1e-7).log(), batch.target)
        smoothing = SMOOTHING if self.method == "label smoothing" else 0.0
        return self.saflex_loss(logits, batch.target, label_smoothing=smoothing)

    def _small_loss(self, logits, batch):
        """Drop the share of augmented rows that is wrong, those of the largest loss."""
        losses = F.cross_entropy(logits, batch.target, reduction="none")
        made = batch.augmented.nonzero().ravel()
        wrong = self.data[0].wrong
        share = 0.1 if wrong is None else float(wrong.float().mean())
        ramp = min(1.0, self.global_step / (0.2 * self.trainer.max_steps))
        dropped = made[
            losses.detach()[made].argsort(descending=True)[: int(ramp * share * len(made))]
        ]
        weights = torch.ones_like(losses)
        weights[dropped] = 0
        return (weights * losses).sum() / weights.sum()

    def _early_learning(self, logits, batch, strength=3.0, decay=0.7):
        """Pull towards what was predicted early (Liu et al. 2020)."""
        probs = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        size = int(batch.index.max()) + 1
        if len(self.memory) < size:
            more = size - len(self.memory)
            self.memory = torch.cat([self.memory, self.memory.new_zeros(more, logits.shape[1])])
        self.memory[batch.index] = decay * self.memory[batch.index] + (1 - decay) * probs.detach()
        pull = (1 - (self.memory[batch.index] * probs).sum(1)).clamp(min=1e-4).log().mean()
        return F.cross_entropy(logits, batch.target) + strength * pull

    def configure_optimizers(self):
        """Return Adam."""
        optimizer = torch.optim.Adam(self.parameters(), 1e-3)
        if not self.is_annealed:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Shuffled(SAflexCallback):
    """The control: what evidence says of an augmented row is said of another one of the batch."""

    def on_train_start(self, trainer, pl_module):
        """Put the permutation in."""
        super().on_train_start(trainer, pl_module)
        evidence, draws = self._fit.evidence, torch.Generator().manual_seed(7)
        weigh, judge, shown = evidence.weigh, evidence.judge, []

        def noted(number, scores, target, augmented, *others):
            shown[:] = [augmented.nonzero().ravel()]
            rows = weigh(number, scores, target, augmented, *others)
            shown.clear()
            return rows

        def shuffled(scores, target, options):
            judgement = judge(scores, target, options)
            if not shown:  # validation rows
                return judgement
            (rows,) = shown
            posteriors, given = judgement.posteriors.clone(), judgement.given.clone()
            order = rows[torch.randperm(len(rows), generator=draws)]
            posteriors[rows], given[rows] = posteriors[order], given[order]
            return judgement._replace(posteriors=posteriors, given=given)

        evidence.weigh, evidence.judge = noted, shuffled


def fit(module, bench, data, seed, method, callbacks=()):
    """Train a module; the steps that steer use the validation rows."""
    module.is_annealed = bench.annealed
    trainer = pl.Trainer(
        max_steps=bench.steps,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Batches(data, bench, seed, method), batch_size=None))


def run(name, method, seed, folder):
    """Return what one run measured."""
    bench = BENCHES[name]
    data = make_data(bench, seed, folder)
    if method.startswith("merged"):
        believed = None
        if method in SECOND_RUNS:
            believed = rows_of_a_first_run(name, seed, folder)
        if method == SECOND_RUNS[1]:
            draws = torch.Generator().manual_seed(seed)
            believed = believed[torch.randperm(len(believed), generator=draws)]
        merge(data, bench, believed)
    pl.seed_everything(seed, verbose=False)
    module = Classifier(data.network(), method, data)
    callbacks = []
    if METHODS[method] is not None:
        callbacks.append(steering(data, method))
        module.saflex_group_names = lambda: data.names
    if method == "gold loss correction" or method.endswith("confident learning"):
        learn_from_a_first_run(module, bench, data, seed)
    start = time.perf_counter()
    fit(module, bench, data, seed, method, callbacks)
    seconds = time.perf_counter() - start
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(part) for part in data.test[0].split(1000)])
    result = {
        "accuracy": 100 * (logits.argmax(1) == data.test[1]).float().mean().item(),
        "loss": F.cross_entropy(logits, data.test[1]).item(),
        "seconds": seconds,
    }
    if callbacks:
        result.update(what_was_learned(callbacks[0], data))
    return result


def steering(data, method="robust"):
    """Return the callback of a method."""
    loader = DataLoader(TensorDataset(*data.validation), 16, shuffle=True)
    return (Shuffled if method == CONTROL else SAflexCallback)(loader, **METHODS[method])


@cache
def rows_of_a_first_run(name, seed, folder):
    """Return the weight of each row of the pool after a run of the default, from its file."""
    bench = BENCHES[name]
    data = make_data(bench, seed, folder)
    pl.seed_everything(seed, verbose=False)
    module = Classifier(data.network(), "robust", data)
    module.saflex_group_names = lambda: data.names
    with TemporaryDirectory() as run_dir, redirect_stdout(StringIO()):
        insight = SAflexInsight(run_dir, figures=False)
        fit(module, bench, data, seed, "robust", [steering(data), insight])
        first = 0 if bench.alone else len(data.clean[1])
        labels = data.make.labels
        file = Path(run_dir) / ROWS
        return read_row_weights(file, len(labels), first_index=first, labels=labels)


def can_merge(method, bench):
    """Rows that are made anew are not known to a first run, nor do they stand beside others."""
    return bench.rows[2] > 0 or (not bench.alone and method == "merged")


def merge(data, bench, weights=None):
    """Put the validation rows among the clean ones, or in the pool where no row is clean."""
    if bench.alone:
        pool, trusted = data.make, data.validation
        if weights is not None:
            weights = torch.cat([weights, torch.ones(len(trusted[1]))])
            weights = weights / weights.mean()  # no row stands beside them
        data.make = Pool(
            torch.cat([pool.inputs, trusted[0]]),
            torch.cat([pool.labels, trusted[1]]),
            torch.cat([pool.group, torch.ones_like(trusted[1])]),
            weights,
        )
        return
    parts = zip(data.clean, data.validation, strict=True)
    data.clean = tuple(torch.cat(pair) for pair in parts)
    if data.has_source:  # merged rows have no augmented versions: they stand beside them
        own, known = data.make, len(data.clean[1]) - len(data.validation[1])
        data.make = lambda rows, draws: own(rows % known, draws)
    else:
        data.make = replace(data.make, weights=weights)


def learn_from_a_first_run(module, bench, data, seed):
    """Gold loss correction and confident learning begin with a plain run of the same length."""
    first = Classifier(data.network(), "union", data)
    fit(first, bench, data, seed, "union")
    first.eval()
    with torch.no_grad():
        probs = first(data.validation[0]).softmax(1)
        classes = probs.shape[1]
        means = [probs[data.validation[1] == label].mean(0) for label in range(classes)]
        module.transition = torch.stack(means)
        if isinstance(data.make, Pool) and module.method.endswith("confident learning"):
            from cleanlab.filter import find_label_issues

            probs = torch.cat([first(part).softmax(1) for part in data.make.inputs.split(500)])
            labels = data.make.labels.numpy()
            issues = torch.from_numpy(find_label_issues(labels, probs.numpy()))
            module.kept = torch.cat([torch.ones(len(data.clean[1]), dtype=torch.bool), ~issues])
            if bench.alone:
                module.kept = ~issues


def what_was_learned(callback, data):
    """Return weights and, where wrong rows are known, how well they are told."""
    learned = {key: float(value) for key, value in callback.read_metrics().items()}
    rows = callback.read_row_evidence()
    if rows is not None and data.wrong is not None and len(rows.index):
        size = 0 if rows.index.max() < len(data.wrong) else len(data.clean[1])
        right = ~data.wrong[rows.index - size]
        learned["auroc"] = binary_auroc(rows.evidence, right.long()).item()
    return learned


def load(known=None):
    """Return the results that are there, by bench, method and seed."""
    found = {}
    for line in [] if known is None else json.loads(known.read_text()):
        found[line.pop("bench"), line.pop("method"), line.pop("seed")] = line
    for file in sorted(OUTPUTS.glob("*/*/*.json")):
        key = file.parts[-3].replace("_", " "), file.parts[-2].replace("_", " "), int(file.stem)
        found[key] = json.loads(file.read_text())
    return found


def as_lines(found):
    """Return results as JSON, a line for each run."""
    lines = [
        json.dumps(
            {"bench": bench, "method": method, "seed": seed}
            | {name: round(result[name], 4) for name in SAVED if name in result}
        )
        for (bench, method, seed), result in sorted(found.items())
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def difference(found, bench, method, rival, key="accuracy"):
    """Return the mean paired difference of two methods, its standard error and how many seeds."""
    seeds = sorted({seed for b, m, seed in found if (b, m) == (bench, method)})
    pairs = [seed for seed in seeds if (bench, rival, seed) in found]
    if not pairs:
        return None
    values = [found[bench, method, s][key] - found[bench, rival, s][key] for s in pairs]
    spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return statistics.mean(values), spread, len(values)


def of_kind(kind):
    """Return the names of the benches of a kind."""
    return [name for name, bench in BENCHES.items() if bench.kind == kind]


def mean_table(found, methods, kind, key, digits):
    """Yield the lines of a table of means over seeds; how many, where they are fewer."""
    yield "| bench (seeds) | " + " | ".join(methods) + " |"
    yield "|" + "---|" * (len(methods) + 1)
    for bench in of_kind(kind):
        seeds = {seed for b, _, seed in found if b == bench}
        runs = [[found[bench, m, s][key] for s in seeds if (bench, m, s) in found] for m in methods]
        cells = [f"{statistics.mean(some):.{digits}f}" if some else "-" for some in runs]
        few = [f" ({len(some)})" if 0 < len(some) < len(seeds) else "" for some in runs]
        if seeds:
            yield f"| {bench} ({len(seeds)}) | " + " | ".join(map(add, cells, few)) + " |"


def pair_table(found, method, rivals, kind):
    """Yield the lines of a table of paired differences."""
    rows = []
    for bench in of_kind(kind):
        pairs = [difference(found, bench, method, rival) for rival in rivals]
        cells = [
            "-" if p is None else f"{p[0]:+.1f} ± {p[1]:.1f}" if p[2] > 1 else f"{p[0]:+.1f} (1)"
            for p in pairs
        ]
        rows += [f"| {bench} | " + " | ".join(cells) + " |"] if any(pairs) else []
    if rows:
        yield (
            f"\nPaired differences of `{method}`, points of accuracy, with standard error, over "
            "the seeds of both.\n"
        )
        yield "| bench | " + " | ".join(rivals) + " |"
        yield "|" + "---|" * (len(rivals) + 1)
        yield from rows


def tables(found):
    """Yield the lines of the report."""
    methods = [method for method in METHODS if any(key[1] == method for key in found)]
    for kind in KINDS:
        yield f"\n## {kind.capitalize()}\n\nTest accuracy, percent, mean over seeds.\n"
        yield from mean_table(found, methods, kind, "accuracy", 1)
        yield "\nTest loss, nats, mean over seeds.\n"
        yield from mean_table(found, methods, kind, "loss", 3)
        for method in ("robust", SECOND_RUNS[0]):
            yield from pair_table(found, method, [m for m in methods if m != method], kind)
    aurocs: dict[str, list[float]] = {}
    for (bench, method, _), result in found.items():
        if method == "robust" and "auroc" in result:
            aurocs.setdefault(bench, []).append(result["auroc"])
    yield "\n## Wrong rows told from right ones by `read_row_evidence`\n"
    yield "| bench | AUROC |\n|---|---|"
    for bench, values in aurocs.items():
        yield f"| {bench} | {statistics.mean(values):.3f} |"


def main():
    """Run what is missing, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--data", type=Path, default=Path("outputs/accuracy_data"))
    parser.add_argument("--benches", nargs="+", default=list(BENCHES), choices=list(BENCHES))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--save", type=Path)
    parser.add_argument("--known", type=Path)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for name in options.benches if options.what == "run" else ():
        for seed in options.seeds:
            for method in options.methods:
                if method.startswith("merged") and not can_merge(method, BENCHES[name]):
                    continue
                folder = OUTPUTS / name.replace(" ", "_") / method.replace(" ", "_")
                file = folder / f"{seed}.json"
                if not file.exists():
                    result = run(name, method, seed, options.data)
                    folder.mkdir(parents=True, exist_ok=True)
                    file.write_text(json.dumps(result))
                    line = f"{result['accuracy']:.2f} % {result['loss']:.3f} nats"
                    print(f"{name}, {method}, seed {seed}: {line}", flush=True)
    found = load(options.known)
    text = "\n".join(tables(found))
    print(text)
    if options.save:
        options.save.with_suffix(".md").write_text(
            "# What evidence is worth\n\nMade by `python benchmarks/evidence.py`; see its first "
            "lines, and `evidence_benches.py` for the benches. Python "
            f"{platform.python_version()}, torch {torch.__version__}, lightning {pl.__version__}, "
            f"one CPU core.\n{text}\n"
        )
        options.save.with_suffix(".json").write_text(as_lines(found))


if __name__ == "__main__":
    main()
