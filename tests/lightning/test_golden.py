"""Numbers of short runs, pinned: one process, two processes, and a run resumed in mid-epoch."""

import json

import pytest
import torch
from helpers.golden import CASES, FILE, NOT_RESUMED, STOP, checksums, run, run_all
from helpers.processes import run_in_processes

pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected more matched parameters than unknowns",
    "ignore:Checkpoint directory .* exists and is not empty",
)
GOLDEN = json.loads(FILE.read_text())


@pytest.fixture(autouse=True)
def _short_warm_up():
    """In place of that of other tests: runs are pinned as they are made, on any number of ranks."""


def check(name, processes, parameters):
    # Rounding differs between machines, and a difference of two points makes more of it.
    tolerance = 1e-6 if "finite_difference" in name or "engine" not in CASES[name] else 1e-9
    assert checksums(parameters) == pytest.approx(GOLDEN[name][processes], rel=tolerance)


@pytest.fixture(scope="module")
def ranks():
    return run_in_processes(run_all, 2, 2)


def test_every_case_is_pinned():
    assert GOLDEN.keys() == CASES.keys()
    sums = [tuple(numbers) for case in GOLDEN.values() for numbers in case.values()]
    assert len(set(sums)) == len(sums), "two cases that differ in nothing"


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    check(name, "1", run(name))


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
def test_two_processes(name, ranks):
    first, second = (rank[name] for rank in ranks)
    assert all(torch.equal(first[key], second[key]) for key in first)
    check(name, "2", first)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_RESUMED])
def test_resumed_in_the_middle_of_an_epoch(name, tmp_path):
    run(name, folder=tmp_path, steps=STOP)
    check(name, "1", run(name, folder=tmp_path, resume=True))
