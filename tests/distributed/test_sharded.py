"""Sharded runs with evidence or the head engine equal unsharded ones; what else is refused."""

import pytest
import torch
from helpers.processes import run_in_processes
from helpers.sharded import RUNS, SHARDS_ON_CPU, train, train_all
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from saflex_lightning.fit.checks import _strategy_problems
from saflex_lightning.functional.settings import make_settings

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns"),
]


@pytest.fixture(scope="module")
def ranks():
    return run_in_processes(train_all, 2, 2)


@pytest.mark.skipif(not SHARDS_ON_CPU, reason="torch 2.4 shards on CUDA devices alone")
@pytest.mark.parametrize("name", RUNS)
def test_sharded_run_equals_the_unsharded_one(name, ranks):
    expected = train(name, 1)
    for found, _ in ranks:
        for key, value in expected.items():
            torch.testing.assert_close(found[name][key], value, rtol=0, atol=1e-8)


def test_engines_that_need_whole_parameters_are_refused(ranks):
    for _, refusals in ranks:
        for engine in ("finite_difference", "forward_mode"):
            assert "Expected engine='head' under `ModelParallelStrategy`" in refusals[engine]
            assert f"engine='{engine}'" in refusals[engine]


def test_tensor_parallel_groups_are_refused(ranks):
    for _, refusals in ranks:
        assert "a tensor-parallel group of 2. Pass" in refusals["tensor parallel"]
        assert "engine='head' under" not in refusals["tensor parallel"]


def test_synchronized_batch_norm_on_a_cpu_shows_torch_s_own_error(ranks):
    for _, refusals in ranks:
        assert (
            "ValueError: SyncBatchNorm layers only work with GPU modules"
            in refusals["synchronized batch norm"]
        )


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy])
def test_other_sharded_strategies_are_refused_in_one_sentence(kind):
    # Neither starts on a CPU, so no Trainer can hold one here.
    for settings in (make_settings(), make_settings("gradient", engine="head")):
        (problem,) = _strategy_problems(object.__new__(kind), settings)
        assert f"but got `{kind.__name__}`. Choose `ddp`, or shard the model" in problem
        assert ("engine='head'" in problem) == settings.solves
