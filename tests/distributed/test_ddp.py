"""Two and four processes reach the parameters of one process on the concatenated batch."""

import pytest
import torch
from helpers.parallel import (
    BATCH,
    ENGINES,
    SCENARIOS,
    STEPS,
    differentiate_gathered_rows,
    skip,
    train,
    train_all,
)
from helpers.processes import run_in_processes
from helpers.training import assert_same_state
from torch import Tensor

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns"),
    pytest.mark.filterwarnings("ignore:Expected finite gradients"),  # "NaN on one rank"
]


@pytest.fixture(
    scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids="{} processes".format
)
def ranks(request):
    """What each rank of one process group got from every scenario."""
    return run_in_processes(train_all, request.param, request.param)


def largest_difference(first, second):
    return max((first[name] - second[name]).abs().max().item() for name in first)


def leaves(state):
    """Every tensor of a state, by its path."""
    if isinstance(state, (dict, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {(key, *path): leaf for key, part in items for path, leaf in leaves(part).items()}
    return {(): state} if isinstance(state, Tensor) else {}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in SCENARIOS for dtype in SCENARIOS[name].dtypes],
    ids=str,
)
def test_processes_together_equal_one_process(name, dtype, ranks):
    found = [rank[name, dtype].parameters for rank in ranks]
    assert all(largest_difference(found[0], other) == 0 for other in found), "ranks differ"
    error = largest_difference(found[0], train(name, dtype, 1).parameters)
    if dtype == torch.float64:
        assert error < 1e-8
    elif not name.startswith("finite_difference"):
        assert error < 1e-5
    else:
        print(f"{len(ranks)} processes, {name} in float32: {error:.1e}")


@pytest.mark.parametrize(
    ("edited", "unedited"),
    [
        ("union batch", "union batch, unedited"),
        *((f"statistics, {name}", f"statistics, unedited, {name}") for name in ENGINES),
    ],
)
def test_an_unedited_module_trains_as_the_edited_one(edited, unedited, ranks):
    for rank in ranks:
        one, other = (rank[name, torch.float64].parameters for name in (edited, unedited))
        assert largest_difference(one, other) == 0


def test_scenarios_are_what_their_names_say(ranks):
    def steps(name):
        return list(zip(*(rank[name, torch.float64].refined for rank in ranks), strict=True))

    for first, *_, last in steps("no augmented row on a rank"):
        assert first.rows == 0
        assert last.rows > 0
    dropped = [[rank.weight == 0 for rank in step] for step in steps("all rows dropped")]
    assert any(any(step) and not all(step) for step in dropped)  # on some ranks
    assert any(all(step) for step in dropped)  # on all


def test_what_is_known_of_groups_is_equal_on_all_ranks_and_to_that_of_one_process(ranks):
    states = [rank["groups", torch.float64].state["evidence"] for rank in ranks]
    alone = train("groups", torch.float64, 1).state["evidence"]
    for part, names in (("rule", ("offsets", "likelihoods", "surprises")), ("groups", ("sums",))):
        for name in names:
            expected, found = alone[part][name], states[0][part][name]
            assert found.any()
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for other in states[1:]:
        assert_same_state(leaves(states[0]), leaves(other))


def test_nan_on_one_rank_is_met_by_all_and_kept_by_none(ranks):
    """A row of NaN reaches the loss of one rank alone, and the solve of every one."""
    states = [rank["NaN on one rank, gradient", torch.float64].state for rank in ranks]
    assert [state["skipped_steps"] for state in states] == [1] * len(ranks)
    for state in states:
        for part in state["gradient"]["average"]:
            assert part.isfinite().all()


def test_a_row_of_nan_on_one_rank_is_no_evidence_on_any(ranks):
    states = [rank["NaN on one rank", torch.float64].state for rank in ranks]
    assert sum(state["skipped_steps"] for state in states) == 1  # the row is left out alone
    parts = [leaves(state["evidence"]) for state in states]
    for found in parts:
        assert all(part.isfinite().all() for part in found.values())
        assert_same_state(found, parts[0])
        assert found["seen",].sum() == STEPS * BATCH - 1


def check_skip(endings):
    assert all(ending.startswith("step 1: ") for ending in endings)
    assert "by returning None in distributed training is not supported" in endings[-1]
    # The others lose their peer in the middle of a sum over ranks.
    assert not any("returning None" in ending for ending in endings[:-1])


def test_a_step_that_returns_none_ends_every_rank(ranks):
    check_skip([rank["skip"] for rank in ranks])


@pytest.mark.slow
def test_a_step_that_returns_none_after_the_loss_ends_every_rank():
    check_skip(run_in_processes(skip, 2, 2, False))


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
