"""Evidence by group against plain loops in double precision, and the rules of the gates."""

import pytest
import torch
from helpers.solving import ALONE, in_parts

from saflex_lightning.evidence.gates import draw_rejected, group_evidence, next_log_weights

BATCH, CLASSES, GROUPS = 12, 4, 3


@pytest.fixture
def problem():
    """Inner products and labels of a batch."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(2, BATCH, CLASSES, generator=generator, dtype=torch.float64)
    return draw[0], draw[1].softmax(-1)


def test_group_evidence_equals_plain_loops(problem):
    products, labels = problem
    group = torch.arange(BATCH) % (GROUPS + 1)
    group[group == 2] = 0  # one group is absent
    usable = (torch.arange(BATCH) != 5).double()
    means, counts = group_evidence(products, labels, group, GROUPS, usable, ALONE)
    rows = [i for i in range(BATCH) if usable[i]]
    squares = [products[i, k] ** 2 for i in rows for k in range(CLASSES)]
    rms = (sum(squares) / len(squares)) ** 0.5
    for g in range(GROUPS + 1):
        members = [i for i in rows if group[i] == g]
        assert counts[g] == len(members)
        total = sum(labels[i, k] * products[i, k] for i in members for k in range(CLASSES))
        expected = total / rms / len(members) if members else torch.tensor(0.0)
        assert means[g].item() == pytest.approx(float(expected), abs=1e-12)

    def work(own, ranks):
        return group_evidence(products[own], labels[own], group[own], GROUPS, usable[own], ranks)

    for found in in_parts([5, 7], work):
        torch.testing.assert_close(found, (means, counts))


def test_batches_without_signal_give_no_evidence():
    group = torch.tensor([0, 1])
    means, _ = group_evidence(torch.zeros(2, 3), torch.eye(3)[:2], group, 1, torch.ones(2), ALONE)
    assert means.tolist() == [0, 0]
    means, counts = group_evidence(*torch.zeros(2, 0, 3), group[:0], 1, torch.ones(0), ALONE)
    assert (means.tolist(), counts.tolist()) == ([0, 0], [0, 0])


class TestLogWeights:
    def test_rule_by_hand(self):
        counts = torch.tensor([8.0, 1.0, 6.0, 1.0])  # 8 augmented rows in 3 groups
        means = torch.tensor([0.2, 0.4, -0.3, 0.2])
        found = next_log_weights(torch.zeros(4), means, counts)
        expected = [0, 0.5 * (1 * 3 / 8) * 0.2, 0.5 * 2 * -0.5, 0]  # 6 * 3 / 8 > 2
        torch.testing.assert_close(found, torch.tensor(expected))

    @pytest.mark.parametrize(
        ("counts", "means"),
        [
            ([0.0, 4.0, 4.0], [0.0, 1.0, -1.0]),  # no clean rows
            ([4.0, 0.0, 0.0], [0.5, 0.0, 0.0]),  # no augmented rows
            ([4.0, 4.0, 4.0], [torch.nan, 1.0, -1.0]),
            ([4.0, 4.0, 4.0], [0.0, torch.inf, torch.nan]),
        ],
    )
    def test_nothing_moves_without_something_to_compare(self, counts, means):
        before = torch.tensor([0.0, 0.1, -0.2])
        found = next_log_weights(before, torch.tensor(means), torch.tensor(counts))
        assert found.equal(before)

    def test_absent_groups_stay_and_present_ones_move(self):
        before = torch.tensor([0.0, 0.1, -0.2])
        means, counts = torch.tensor([0.5, 0.0, 0.0]), torch.tensor([4.0, 0.0, 4.0])
        found = next_log_weights(before, means, counts)
        assert found[:2].equal(before[:2])
        assert found[2] < before[2]

    def test_weights_stay_in_their_range(self):
        weights, counts = torch.zeros(3), torch.ones(3)
        for _ in range(200):
            weights = next_log_weights(weights, torch.tensor([0.0, 1.0, -1.0]), counts)
        torch.testing.assert_close(weights, torch.tensor([0.0, 0.7, -6.0]))


def test_rows_are_rejected_as_often_as_their_gate_says():
    log_weights = torch.tensor([0.0, 0.7, -0.5, -6.0])
    group = torch.arange(4).repeat(5000)
    rejected = draw_rejected(log_weights, group, torch.Generator().manual_seed(0))
    shares = rejected.view(-1, 4).float().mean(0).tolist()
    assert shares[:2] == [0, 0]
    assert shares[2:] == pytest.approx([1 - 0.6065, 1 - 0.0025], abs=0.02)
    assert not rejected.view(-1, 4)[:, 3].all()  # a row of the worst group comes through
    assert rejected.equal(draw_rejected(log_weights, group, torch.Generator().manual_seed(0)))
