"""When gates move, by plain loops, and how often they turn rows down."""

import numpy as np
import pytest
import torch

from saflex_lightning.evidence.gates import Gates


def make_gates(groups=3):
    gates = Gates()
    gates.start(groups)
    return gates


def feed(gates, series):
    """Let the last group show these means, one per step, and return its log weights."""
    groups = len(gates.log_weights)
    history = []
    for value in series:
        means = np.zeros(groups)
        means[-1] = value
        gates.update(means, np.ones(groups, dtype=bool))
        history.append(gates.log_weights[-1].item())
    return history


def test_moves_equal_plain_loops():
    generator = torch.Generator().manual_seed(0)
    series = (0.3 * torch.randn(120, generator=generator) - 0.3).tolist()
    series += (0.3 * torch.randn(60, generator=generator) + 0.4).tolist()
    found = feed(make_gates(), series)
    log_weight, expected = 0.0, []
    for step in range(len(series)):
        shares = [0.98 ** (step - earlier) for earlier in range(step + 1)]
        count = sum(shares)
        mean = sum(s * v for s, v in zip(shares, series, strict=False)) / count
        square = sum(s * v * v for s, v in zip(shares, series, strict=False)) / count
        error = (max(square - mean**2, 0) / count) ** 0.5
        if count > 10 and mean + 3 * error < 0:
            log_weight -= 0.2
        elif mean > 0:
            log_weight += 0.2
        log_weight = min(max(log_weight, -6.0), 0.0)
        expected.append(log_weight)
    assert found == pytest.approx(expected, abs=1e-5)
    assert min(found) < -3
    assert found[-1] > min(found) + 1  # and it came back


@pytest.mark.parametrize("mean", [0.0, 0.05, 0.3])
def test_a_group_that_does_no_harm_is_never_touched(mean):
    generator = torch.Generator().manual_seed(0)
    series = (torch.randn(1000, generator=generator) + mean).tolist()
    assert min(feed(make_gates(), series)) >= (0 if mean else -1)


def test_a_group_that_harms_by_little_is_touched_once_that_is_certain():
    generator = torch.Generator().manual_seed(0)
    series = (torch.randn(400, generator=generator) - 0.8).tolist()
    history = feed(make_gates(), series)
    assert history[:10] == [0] * 10
    assert history[-1] == -6


def test_absent_groups_and_clean_rows_stay_and_non_finite_evidence_changes_nothing():
    gates = make_gates()
    for _ in range(50):
        gates.update(np.array([-1.0, -1.0, -1.0]), np.array([True, True, False]))
    assert gates.log_weights[0] == 0
    assert gates.log_weights[1] < -5
    assert gates.log_weights[2] == 0
    before = gates.log_weights.copy(), gates.read()[0].copy()
    gates.update(np.array([np.nan, np.inf, np.nan]), np.ones(3, dtype=bool))
    assert np.array_equal(gates.log_weights, before[0])
    assert np.array_equal(gates.read()[0], before[1])


def test_rows_are_rejected_as_often_as_their_gate_says():
    gates = make_gates(4)
    gates.log_weights = np.array([0.0, 0.0, -0.5, -6.0])
    group = torch.arange(4).repeat(5000)
    rejected = gates.draw(group, torch.Generator().manual_seed(0))
    shares = rejected.view(-1, 4).float().mean(0).tolist()
    assert shares[:2] == [0, 0]
    assert shares[2:] == pytest.approx([1 - 0.6065, 1 - 0.0025], abs=0.02)
    assert not rejected.view(-1, 4)[:, 3].all()  # a row of the worst group comes through
    assert rejected.equal(gates.draw(group, torch.Generator().manual_seed(0)))
