"""Runs that several processes repeat; children import them by name, so they live here."""

import torch
import torch.autograd.forward_ad as forward_ad
from helpers.pairs import TwoTowers
from helpers.training import Classifier, fit, make_loader, make_rows, seeded, state_of
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback, gather_rows

ENGINES = ("finite_difference", "forward_mode", "head")
BATCH, VAL_BATCH, STEPS = 32, 16, 20
PAPER = {"preset": "paper", "gumbel": False, "temperature": 0.5}


def settings_of(case):
    engine, preset, *_ = case
    return {"engine": engine, **(PAPER if preset == "paper" else {})}


CASES = [(engine, preset) for engine in ENGINES for preset in ("robust", "paper")]
# Features gathered over ranks; steered by pairs (gathered too) or by classification.
PAIR_CASES = [
    (engine, preset, steering)
    for engine in ("finite_difference", "forward_mode")
    for preset, steering in (("robust", "pairs"), ("paper", "classes"))
]


def train_loader(dtype, rank, world_size):
    """Batches of which every process holds its slice of rows."""
    share = BATCH // world_size
    slices = [
        list(range(start + rank * share, start + (rank + 1) * share))
        for start in range(0, 5 * BATCH, BATCH)
    ]
    return DataLoader(TensorDataset(*make_rows(5 * BATCH, dtype=dtype)), batch_sampler=slices)


def train(case, dtype, world_size, rank=0):
    """Train a few steps; every process has its share of each training and validation batch."""
    if case in PAIR_CASES:
        module = seeded(lambda: TwoTowers(dtype=dtype, gather=True, steering=case[2]))
    else:
        module = seeded(lambda: Classifier(plain=True, dtype=dtype, optimizer="sgd", lr=0.1))
    val = make_loader(96, VAL_BATCH // world_size, seed=7, dtype=dtype)
    parallel = {"strategy": "ddp", "devices": world_size} if world_size > 1 else {}
    trainer = fit(
        module,
        SAflexCallback(val, **settings_of(case)),
        train=train_loader(dtype, rank, world_size),
        max_epochs=STEPS // 5,
        use_distributed_sampler=False,
        precision="64-true" if dtype == torch.float64 else "32-true",
        **parallel,
    )
    assert trainer.global_step == STEPS
    assert trainer.world_size == world_size
    return state_of(module)


def train_all(rank, world_size, cases):
    return {
        (case, dtype): train(case, dtype, world_size, rank)
        for case in cases
        for dtype in (torch.float64, torch.float32)
        if dtype == torch.float64 or case not in PAIR_CASES
    }


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
