"""Running mean and standard error of a group's evidence, by plain loops."""

import numpy as np
import pytest
import torch

from saflex_lightning.evidence.groups import GroupMeans


def make_means(groups=3):
    means = GroupMeans()
    means.start(groups)
    return means


def test_mean_and_error_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    series = (0.3 * torch.randn(120, generator=generator) - 0.3).tolist()
    means = make_means()
    told = []
    for step, value in enumerate(series):
        verdicts = means.update(np.array([-1.0, 1.0, value]), np.ones(3, dtype=bool))
        shares = [0.98 ** (step - earlier) for earlier in range(step + 1)]
        count = sum(shares)
        mean = sum(s * v for s, v in zip(shares, series, strict=False)) / count
        square = sum(s * v * v for s, v in zip(shares, series, strict=False)) / count
        found, error = means.read()
        assert means.steps == pytest.approx([count] * 3)
        assert found == pytest.approx([-1, 1, mean])
        expected = (max(square - mean**2, 0) / count) ** 0.5
        assert error == pytest.approx([0, 0, expected], abs=1e-7)
        harms = count > 10 and mean + 3 * expected < 0
        assert verdicts.tolist() == [0, 1, -1 if harms else mean > 0]
        told.append(verdicts[2])
    assert -1 not in told[:10]
    assert told[-1] == -1


def test_absent_groups_stay_and_evidence_that_is_not_finite_changes_nothing():
    means = make_means()
    for _ in range(50):
        means.update(np.array([-1.0, -1.0, -1.0]), np.array([True, True, False]))
    mean, _ = means.read()
    assert mean == pytest.approx([-1, -1, 0])
    assert means.steps[2] == 0
    before = means.steps.copy()
    means.update(np.array([np.nan, np.inf, np.nan]), np.ones(3, dtype=bool))
    assert np.array_equal(means.steps, before)
    assert np.array_equal(means.read()[0], mean)


@pytest.mark.parametrize("mean", [0.05, 0.3])
def test_a_group_that_does_no_harm_is_never_said_to(mean):
    generator = torch.Generator().manual_seed(0)
    means = make_means(2)
    for value in (torch.randn(1000, generator=generator) + mean).tolist():
        assert means.update(np.array([0.0, value]), np.ones(2, dtype=bool))[1] >= 0
