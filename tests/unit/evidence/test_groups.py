"""Running means and standard errors of a group's evidence, by plain loops."""

import numpy as np
import pytest
import torch

from saflex_lightning.evidence.groups import GroupMeans


def make_means(groups=3):
    means = GroupMeans()
    means.start(groups)
    return means


def update(means, weighed, present=(True, True, True), as_it_is=0.5):
    """Take in what weighed rows tell, and half a unit of rows as they are."""
    both = np.stack([np.full(len(weighed), as_it_is), weighed])
    return means.update(both, np.array(present[: len(weighed)]))


def test_mean_and_error_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    series = (0.3 * torch.randn(120, generator=generator) - 0.3).tolist()
    means = make_means()
    told = []
    for step, value in enumerate(series):
        verdicts = update(means, [-1.0, 1.0, value])
        shares = [0.98 ** (step - earlier) for earlier in range(step + 1)]
        count = sum(shares)
        mean = sum(s * v for s, v in zip(shares, series, strict=False)) / count
        square = sum(s * v * v for s, v in zip(shares, series, strict=False)) / count
        found, error = means.read()
        assert means.steps == pytest.approx([count] * 3)
        assert found[0] == pytest.approx([0.5] * 3)
        assert found[1] == pytest.approx([-1, 1, mean])
        expected = (max(square - mean**2, 0) / count) ** 0.5
        assert error[0] == pytest.approx([0] * 3, abs=1e-7)
        assert error[1] == pytest.approx([0, 0, expected], abs=1e-7)
        harms = count > 10 and mean + 3 * expected < 0
        assert verdicts.tolist() == [0, 1, -1 if harms else mean > 0]
        told.append(verdicts[2])
    assert -1 not in told[:10]
    assert told[-1] == -1


def test_absent_groups_stay_and_evidence_that_is_not_finite_changes_nothing():
    means = make_means()
    for _ in range(50):
        update(means, [-1.0, -1.0, -1.0], (True, True, False))
    mean, _ = means.read()
    assert mean[1] == pytest.approx([-1, -1, 0])
    assert means.steps[2] == 0
    before = means.steps.copy()
    update(means, [np.nan, np.inf, np.nan])
    update(means, [0, 0, 0], as_it_is=np.nan)
    assert np.array_equal(means.steps, before)
    assert np.array_equal(means.read()[0], mean)


@pytest.mark.parametrize("mean", [0.05, 0.3])
def test_a_group_that_does_no_harm_is_never_said_to(mean):
    generator = torch.Generator().manual_seed(0)
    means = make_means(2)
    for value in (torch.randn(1000, generator=generator) + mean).tolist():
        assert update(means, [0.0, value])[1] >= 0
