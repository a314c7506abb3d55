"""Runs of `SAflexInsight` and its sums by plain loops."""

import csv
from collections import defaultdict
from pathlib import Path

import lightning.pytorch as pl
import torch
from helpers.grouped import Grouped, grouped_loader, steering
from helpers.training import fit, seeded

from saflex_lightning import SAflexCallback, SAflexInsight
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.insight.collect import Collector
from saflex_lightning.step import StepRows

STEPS, ROWS, GROUPS, CLASSES = 9, 8, 3, 4


class Recorder(pl.Callback):
    """Keeps what each step told of its rows, with its epoch; it stands behind `SAflexCallback`."""

    def __init__(self, callback):
        self.callback = callback
        self.steps = []

    def on_train_batch_end(self, trainer, *args):
        rows = self.callback.read_step_rows()
        if rows is not None:
            self.steps.append((trainer.current_epoch, rows))


def grouped_run(folder, *, max_epochs=12, module=None, **settings):
    """Fit on union batches; return the callback, the recorder and the Trainer."""
    callback = SAflexCallback(steering(), **settings)
    recorder = Recorder(callback)
    trainer = fit(
        seeded(Grouped) if module is None else module,
        callback,
        recorder,
        SAflexInsight(folder),
        train=grouped_loader(shuffle=True),
        max_epochs=max_epochs,
    )
    return callback, recorder, trainer


def visits(steps):
    """Yield every augmented row of every step: epoch, index, group, label, what was made of it."""
    for epoch, rows in steps:
        for row in range(len(rows.shown)):
            if rows.shown[row]:
                told = (rows.index, rows.group, rows.target, rows.suggested, rows.beliefs)
                index, group, label, suggested, belief = (
                    -1 if part is None else part[row].item() for part in told
                )
                yield epoch, index, group, label, suggested, belief, rows.weights[row].item()


def sums_by_loops(steps, key):
    """Rows, mean weight, mean belief and share doubted, by what ``key`` returns."""
    sums = defaultdict(lambda: [0.0] * 6)
    last = max(epoch for epoch, _ in steps)
    for epoch, _, group, label, suggested, belief, weight in visits(steps):
        entry, fading = sums[key(group, label)], 0.5 ** (last - epoch)
        entry[0] += 1
        entry[1] += fading
        entry[2] += fading * weight
        if suggested >= 0:
            entry[3] += fading
            entry[4] += fading * belief
            entry[5] += fading * (suggested != label)
    return {
        name: [rows, weight / shown, belief / judged, doubted / judged]
        for name, (rows, shown, weight, judged, belief, doubted) in sums.items()
    }


def read_csv(folder, name):
    with (Path(folder) / f"saflex_{name}.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def drawn_steps(seed=0):
    """Steps of rows that know everything; indices come back, in several steps."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high):
        return torch.randint(high, (ROWS,), generator=generator)

    for _ in range(STEPS):
        shown = draw(4) > 0
        yield StepRows(
            index=draw(12) * 2**55,
            group=torch.where(shown, draw(GROUPS - 1) + 1, 0),
            target=draw(CLASSES),
            suggested=draw(CLASSES + 1) - 1,
            beliefs=torch.rand(ROWS, generator=generator),
            weights=2.5 * torch.rand(ROWS, generator=generator),
            shown=shown,
        )


def collect(rank, size):
    """Return the state of a collector after this rank's part of every step."""
    collector, ranks = Collector(max_rows=10), Ranks(rank, size)
    part = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    for number, rows in enumerate(drawn_steps()):
        collector.add(StepRows(*(field[part] for field in rows)))
        if number % 4 == 3:
            collector.flush(ranks, number)
            collector.counts.fade()
    collector.flush(ranks, STEPS)
    return collector.state_dict()


def collect_and_fit(rank, size, folder):
    """Do so in a process group, and take a fit of several processes, into one folder."""
    callback = SAflexCallback(steering())
    fit(
        seeded(Grouped),
        callback,
        SAflexInsight(folder),
        train=grouped_loader(),
        max_epochs=3,
        devices=size,
        strategy="ddp",
    )
    return collect(rank, size)
