"""Two and four processes reach the parameters of one process on the concatenated batch."""

import pytest
import torch
from helpers.parallel import CASES, PAIR_CASES, differentiate_gathered_rows, train_all
from helpers.processes import run_in_processes

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns"),
]


@pytest.fixture(scope="module")
def one_process():
    return train_all(0, 1, [*CASES, *PAIR_CASES])


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        pytest.param(2, [*CASES, *PAIR_CASES], id="2"),
        pytest.param(4, [*CASES, *PAIR_CASES], id="4", marks=pytest.mark.slow),
    ],
)
def test_processes_together_equal_one_process(world_size, cases, one_process):
    ranks = run_in_processes(train_all, world_size, world_size, cases)
    for key, found in ranks[0].items():
        (engine, *_), dtype = key
        expected = one_process[key]
        for rank in range(1, world_size):
            assert largest_difference(ranks[0][key], ranks[rank][key]) == 0, "ranks differ"
        error = largest_difference(found, expected)
        if dtype == torch.float64:
            assert error < 1e-8, key
        elif engine != "finite_difference":
            assert error < 1e-5, key
        else:
            print(f"{world_size} processes, finite differences in float32: {error:.1e}")


@pytest.mark.slow
def test_gathered_rows_carry_gradients_and_tangents():
    everything = torch.tensor([[1.0], [2.0], [11.0], [12.0]], dtype=torch.float64)
    for rank, found in enumerate(run_in_processes(differentiate_gathered_rows, 2)):
        gathered, gradient, tangent = found
        assert torch.equal(gathered, everything)
        assert torch.equal(tangent, 100 * everything)
        # Rank 0 weighs row i by i, rank 1 by 2 i: their sum is 3 i.
        own = torch.tensor([[1.0], [2.0]], dtype=torch.float64) + 2 * rank
        assert torch.equal(gradient, 3 * own)
