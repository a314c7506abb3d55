"""2,000 steps with faults at random steps end where the run without faults ends."""

import pytest
import torch
from helpers.processes import exit_codes, run_in_processes
from helpers.soak import FAULTS, soak
from helpers.training import assert_same_state


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_run_with_faults_ends_with_the_parameters_of_the_run_without(tmp_path, seed):
    ((through, skipped, counted),) = run_in_processes(soak, 1, seed)
    assert skipped == counted > 0  # steps whose own validation batch holds NaN
    starts, end = 0, tmp_path / "end"
    while not end.exists():
        exit_codes(soak, 1, seed, tmp_path)
        starts += 1
        assert starts <= len(FAULTS) + 1
    assert starts == len(FAULTS) + 1
    resumed, skipped_again, _ = torch.load(end, weights_only=False)
    assert_same_state(through, resumed)
    assert skipped_again == skipped
