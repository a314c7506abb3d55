"""Runs that several processes repeat; children import them by name, so they live here."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from helpers.adopted import Unedited
from helpers.pairs import TwoTowers
from helpers.training import (
    GRADIENT,
    NUM_CLASSES,
    Classifier,
    fit,
    make_loader,
    make_net,
    make_rows,
    seeded,
    short_warm_up,
    state_of,
)
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import AugmentedBatch, SAflexCallback, gather_rows

ENGINES = ("finite_difference", "forward_mode", "head")
BATCH, VAL_BATCH, STEPS, BATCHES = 32, 16, 20, 5
PAPER = {"preset": "paper", "gumbel": False, "temperature": 0.5}
HARD = {**PAPER, "label_rule": "keep"}  # keep or drop by the given label


class Refined(NamedTuple):
    """What one step refined on one rank: number of rows and the sum of their weights."""

    rows: int
    weight: float


class Result(NamedTuple):
    """Parameters after the training, what each step refined, and the callback's state."""

    parameters: dict[str, torch.Tensor]
    refined: list[Refined]
    state: dict[str, Any]


class Watched(Classifier):
    """Remembers what each step refined."""

    def __init__(self, *, dtype):
        super().__init__(plain=True, dtype=dtype, optimizer="sgd", lr=0.1)
        self.refined = []

    def saflex_group_names(self):
        return ("clean", "first", "second")

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        weights = self.saflex_solution.weights
        mask = batch.augmented if isinstance(batch, AugmentedBatch) else weights >= 0
        self.refined.append(Refined(int(mask.sum()), float(weights[mask].sum())))
        return loss


class Branching(Watched):
    """Leaves a layer out of every other step."""

    def __init__(self, *, dtype):
        super().__init__(dtype=dtype)
        self.extra = nn.Linear(NUM_CLASSES, NUM_CLASSES, dtype=dtype)

    def forward(self, inputs):
        scores = self.net(inputs)
        return scores + self.extra(scores) if self.global_step % 2 else scores


class Manual(Watched):
    """Steps its optimizer itself."""

    def __init__(self, *, dtype):
        super().__init__(dtype=dtype)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class Normalized(Watched):
    """Has running statistics, and dropout that is drawn on every rank."""

    def __init__(self, *, dtype):
        super().__init__(dtype=dtype)
        self.net = make_net(dtype=dtype)


class Bare(Unedited):
    """What `Watched` and `Normalized` are before anybody edits them."""

    def __init__(self, *, plain, dtype):
        super().__init__(plain=plain, dtype=dtype, optimizer="sgd", lr=0.1)
        if not plain:
            self.net = make_net(dtype=dtype)  # a second one, as there


class Surviving(Watched):
    """Meets one row of NaN, on the last rank, and takes no step on gradients with NaN."""

    POISONED = 7

    def __init__(self, *, dtype):
        super().__init__(dtype=dtype)
        self.number = -1
        self.undone = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.number += 1 if self.trainer.training else 0
        last = self.global_rank == self.trainer.world_size - 1
        if self.trainer.training and self.number == self.POISONED and last:
            batch.inputs[-1] = torch.nan
        return batch

    def on_before_optimizer_step(self, optimizer):
        gradients = [parameter.grad for parameter in self.parameters()]
        if not all(gradient.isfinite().all() for gradient in gradients):
            self.undone.append(self.number)
            optimizer.zero_grad()


def plain(inputs, target, place):
    """Rows as they are; all of them are refined."""
    return inputs, target


def union(inputs, target, place):
    """Clean and augmented rows by turns."""
    return augmented_where(place % 2 == 1, inputs, target, place)


def clean_first_half(inputs, target, place):
    """Augmented rows in the second half of the batch alone: the first ranks have none."""
    return augmented_where(place >= BATCH // 2, inputs, target, place)


def wrong(inputs, target, place):
    """Wrong labels everywhere: few rows lower the validation loss."""
    return inputs, (target + 1) % NUM_CLASSES


def mixed(inputs, target, place):
    """Soft labels, as Mixup makes them."""
    labels = nn.functional.one_hot(target, NUM_CLASSES).to(inputs.dtype)
    return inputs, 0.7 * labels + 0.3 * labels.roll(1, -1)


def grouped(inputs, target, place, *, wrong):
    """Clean and augmented rows by turns; two groups; the clean or the augmented labels wrong."""
    augmented = place % 2 == 1
    moved = augmented == (wrong == "augmented")
    target = torch.where(moved, target + 1, target) % NUM_CLASSES
    batch = augmented_where(augmented, inputs, target, place)
    return replace(batch, group=torch.where(augmented, 1 + (place % 4 == 3).long(), 0))


def augmented_where(mask, inputs, target, place):
    """A batch whose rows are told apart by their place in the whole one."""
    return AugmentedBatch(inputs, target, mask, mask.long(), place)


@dataclass(frozen=True)
class Scenario:
    """One way to train; the same for every number of processes.

    Attributes:
        settings: Keywords of the callback.
        module: Makes the module of a dtype.
        batch: Makes a batch from inputs, target and each row's place in the whole batch.
        batch_size: Rows of the whole batch.
        ddp: Keywords of the strategy.
        trainer: Further keywords of the Trainer.
        dtypes: Precisions to train in.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    module: Callable = Watched
    batch: Callable = plain
    batch_size: int = BATCH
    ddp: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = (torch.float64,)


SCENARIOS = {
    **{
        f"{engine}, {name}": Scenario(
            {"engine": engine, **preset}, dtypes=(torch.float64, torch.float32)
        )
        for engine in ENGINES
        for name, preset in {"gradient": GRADIENT, "paper": PAPER}.items()
    },
    "robust": Scenario(dtypes=(torch.float64, torch.float32)),
    "unused parameters": Scenario(
        {**GRADIENT, "engine": "forward_mode"},
        module=Branching,
        ddp={"find_unused_parameters": True},
    ),
    "robust, unused parameters": Scenario(module=Branching, ddp={"find_unused_parameters": True}),
    **{
        f"{name}{what}": Scenario(way, **settings)
        for name, way in {"": GRADIENT, "robust, ": {}}.items()
        for what, settings in {
            "static graph": {"ddp": {"static_graph": True}},
            "accumulation": {"trainer": {"accumulate_grad_batches": 2}},
            "manual optimization": {"module": Manual},
            "union batch": {"batch": union},
            "union batch, unedited": {"module": partial(Bare, plain=True), "batch": union},
            "no augmented row on a rank": {"batch": clean_first_half},
            "soft labels": {"batch": mixed},
        }.items()
    },
    "union batch, finite_difference": Scenario(
        {**GRADIENT, "engine": "finite_difference"}, batch=union
    ),
    "all rows dropped": Scenario(HARD, batch=wrong, batch_size=4),
    "groups": Scenario(batch=partial(grouped, wrong="augmented")),
    "NaN on one rank": Scenario(module=Surviving, batch=partial(grouped, wrong="clean")),
    "NaN on one rank, gradient": Scenario(
        GRADIENT, module=Surviving, batch=partial(grouped, wrong="clean")
    ),
    "everything": Scenario({**GRADIENT, "row_evidence": True}, batch=union),
    # Features gathered over ranks; steered by pairs (gathered too) or by classification.
    **{
        f"{engine}, {steering}": Scenario(
            {"engine": engine, **preset},
            module=partial(TwoTowers, gather=True, steering=steering),
        )
        for engine in ("finite_difference", "forward_mode")
        for preset, steering in ((GRADIENT, "pairs"), (PAPER, "classes"))
    },
}


# Draws of its own on every rank: several processes do not equal one.
OWN_DRAWS = {
    **{
        f"{name}, {engine}": Scenario({**GRADIENT, "engine": engine}, module=module, batch=union)
        for engine in ENGINES
        for name, module in (
            ("statistics", Normalized),
            ("statistics, unedited", partial(Bare, plain=False)),
        )
    },
}


def train_loader(scenario, dtype, rank, world_size):
    """Batches of which every process holds its slice of rows."""
    size, share = scenario.batch_size, scenario.batch_size // world_size
    rows = TensorDataset(*make_rows(BATCHES * size, dtype=dtype))
    place = torch.arange(rank * share, (rank + 1) * share)
    slices = [(first + place).tolist() for first in range(0, BATCHES * size, size)]
    collate = DataLoader(rows).collate_fn
    return DataLoader(
        rows, batch_sampler=slices, collate_fn=lambda part: scenario.batch(*collate(part), place)
    )


@short_warm_up(groups=1)
def train(name, dtype, world_size, rank=0):
    """Train a few steps; every process has its share of each training and validation batch."""
    scenario = {**SCENARIOS, **OWN_DRAWS}[name]
    module = seeded(lambda: scenario.module(dtype=dtype))
    val = make_loader(96, VAL_BATCH // world_size, seed=7, dtype=dtype)
    parallel = {}
    if world_size > 1:
        parallel = {"strategy": DDPStrategy(**scenario.ddp), "devices": world_size}
    callback = SAflexCallback(val, **scenario.settings)
    trainer = fit(
        module,
        callback,
        train=train_loader(scenario, dtype, rank, world_size),
        max_epochs=STEPS // BATCHES,
        use_distributed_sampler=False,
        precision="64-true" if dtype == torch.float64 else "32-true",
        **scenario.trainer,
        **parallel,
    )
    assert trainer.fit_loop.epoch_loop.total_batch_idx + 1 == STEPS
    assert trainer.world_size == world_size
    assert getattr(module, "undone", [Surviving.POISONED]) == [Surviving.POISONED]
    return Result(state_of(module), getattr(module, "refined", []), callback.state_dict())


class Skipping(Classifier):
    """Returns None from the last rank's second step, before or after asking for the loss."""

    def __init__(self, *, before, **kwargs):
        super().__init__(**kwargs)
        self.before = before

    def training_step(self, batch, batch_idx):
        skips = batch_idx == 1 and self.global_rank == self.trainer.world_size - 1
        if skips and self.before:
            return None
        loss = super().training_step(batch, batch_idx)
        return None if skips else loss


def skip(rank, world_size, before):
    """Return how a training ends in which one rank skips a step."""
    module = seeded(lambda: Skipping(before=before, plain=True))
    try:
        fit(
            module,
            SAflexCallback(make_loader(96, 8, seed=7)),
            train=make_loader(32 * world_size, 16),
            strategy="ddp",
            devices=world_size,
        )
    except RuntimeError as error:
        return f"step {module.global_step}: {error}"
    return "no error"


def train_all(rank, world_size):
    """Return the result of every scenario, and how one ends that cannot go on."""
    results = {
        (name, dtype): train(name, dtype, world_size, rank)
        for name, scenario in {**SCENARIOS, **OWN_DRAWS}.items()
        for dtype in scenario.dtypes
    }
    return {**results, "skip": skip(rank, world_size, before=True)}  # breaks the process group


def differentiate_gathered_rows(rank):
    """Return the gathered rows, a gradient and a tangent of `gather_rows` on this rank."""
    torch.distributed.init_process_group("gloo")
    rows = torch.tensor([[1.0], [2.0]], dtype=torch.float64) + 10 * rank
    rows.requires_grad_()
    gathered = gather_rows(rows)
    # Each rank weighs the rows by other numbers, so that a lost contribution would show.
    weights = torch.arange(1.0, 5.0, dtype=torch.float64) * (rank + 1)
    (gradient,) = torch.autograd.grad((weights @ gathered).sum(), rows)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(rows.detach(), 100.0 * rows.detach())
        tangent = forward_ad.unpack_dual(gather_rows(dual)).tangent
    return gathered.detach(), gradient, tangent
