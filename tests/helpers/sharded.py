"""Runs that share more than a batch: sharded parameters, batch statistics over processes.

Children import them by name, so they live here.
"""

from functools import partial

import torch
from helpers.parallel import (
    BATCHES,
    PAPER,
    STEPS,
    VAL_BATCH,
    Scenario,
    grouped,
    train_loader,
)
from helpers.training import GRADIENT, Classifier, fit, make_loader, seeded, short_warm_up
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import ModelParallelStrategy

from saflex_lightning import SAflexCallback

HEAD = {**GRADIENT, "engine": "head"}
# Optimizer, and how to train.
RUNS = {
    "gradient, Adam": ("adam", Scenario(HEAD)),
    "gradient, SGD": ("sgd", Scenario(HEAD)),
    "paper, SGD": ("sgd", Scenario({**PAPER, "engine": "head"})),
    "accumulation": ("adam", Scenario(HEAD, trainer={"accumulate_grad_batches": 2})),
    "robust, Adam": ("adam", Scenario()),
    "robust, groups": ("adam", Scenario(batch=partial(grouped, wrong="clean"))),
    "gradient, evidence": (
        "adam",
        Scenario({**HEAD, "row_evidence": True}, batch=partial(grouped, wrong="clean")),
    ),
}
SHARDS_ON_CPU = not torch.__version__.startswith("2.4.")  # whose `fully_shard` makes CUDA streams


class Sharded(Classifier):
    """Shards every layer with parameters, and the whole net around them."""

    def __init__(self, optimizer):
        super().__init__(plain=True, dtype=torch.float64, optimizer=optimizer, lr=0.02)

    def saflex_group_names(self):
        return ("clean", "first", "second")

    def configure_model(self):
        if self.device_mesh is None:
            return  # a single device
        from torch.distributed._composable.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for part in (self.net[0], self.net[2], self.net):
            fully_shard(part, mesh=mesh)


def settings_of(world_size, **strategy):
    if world_size == 1:
        return {}
    sizes = {"data_parallel_size": world_size, "tensor_parallel_size": 1, **strategy}
    return {"strategy": ModelParallelStrategy(**sizes), "devices": world_size}


@short_warm_up(groups=1)
def train(name, world_size, rank=0):
    """Return the whole parameters after some steps."""
    optimizer, scenario = RUNS[name]
    module = seeded(lambda: Sharded(optimizer))
    val = make_loader(96, VAL_BATCH // world_size, seed=7, dtype=torch.float64)
    trainer = fit(
        module,
        SAflexCallback(val, **scenario.settings),
        train=train_loader(scenario, torch.float64, rank, world_size),
        max_epochs=STEPS // BATCHES,
        use_distributed_sampler=False,
        **scenario.trainer,
        **settings_of(world_size),
    )
    assert trainer.world_size == world_size
    found = {}
    for key, parameter in module.named_parameters():
        assert hasattr(parameter, "full_tensor") == (world_size > 1)
        found[key] = (parameter.full_tensor() if world_size > 1 else parameter).detach().clone()
    return found


def refusal(module, engine, **settings):
    """Return the error that a fit ends with."""
    try:
        fit(module, SAflexCallback(make_loader(), preset="gradient", engine=engine), **settings)
    except (MisconfigurationException, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_all(rank, world_size):
    """Return the parameters of every run that this torch can make, and every refusal."""
    found = {name: train(name, world_size, rank) for name in RUNS if SHARDS_ON_CPU}
    refusals = {
        engine: refusal(Sharded("sgd"), engine, **settings_of(world_size))
        for engine in ("finite_difference", "forward_mode")
    }
    mesh = {"data_parallel_size": 1, "tensor_parallel_size": world_size}
    refusals["tensor parallel"] = refusal(Sharded("sgd"), "head", **settings_of(world_size, **mesh))
    refusals["synchronized batch norm"] = refusal(
        Classifier(), "finite_difference", strategy="ddp", devices=world_size, sync_batchnorm=True
    )
    return found, refusals
