"""Evidence by group against plain loops in double precision, and the rules of the gates."""

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from saflex_lightning.evidence import (
    draw_rejected,
    group_evidence,
    last_layer_products,
    next_log_weights,
    rescale_weights,
)

BATCH, VAL, FEATURES, CLASSES, GROUPS = 12, 9, 5, 4, 3


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    root = draw(FEATURES, FEATURES)
    val_labels = one_hot(torch.arange(VAL) % CLASSES, CLASSES)
    return {
        "features": draw(BATCH, FEATURES) + 1,
        "probs": draw(BATCH, CLASSES).softmax(-1),
        "mean": draw(FEATURES),
        "covariance": root @ root.T,
        "val_features": draw(VAL, FEATURES) + 1,
        "val_residuals": draw(VAL, CLASSES).softmax(-1) - val_labels,
    }


def loop_products(features, probs, mean, covariance, val_features, val_residuals):
    """DESIGN's formula entry by entry, with an explicit inverse."""
    gradient = torch.zeros(FEATURES, CLASSES, dtype=torch.float64)
    bias = torch.zeros(CLASSES, dtype=torch.float64)
    for row in range(VAL):
        for k in range(CLASSES):
            bias[k] += val_residuals[row, k] / VAL
            for d in range(FEATURES):
                gradient[d, k] += (val_features[row, d] - mean[d]) * val_residuals[row, k] / VAL
    mean_diagonal = sum(covariance[d, d] for d in range(FEATURES)) / FEATURES
    damped = covariance + 0.1 * mean_diagonal * torch.eye(FEATURES, dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    products = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    for i in range(BATCH):
        drift = gradient.T @ inverse @ (features[i] - mean) + bias
        for k in range(CLASSES):
            products[i, k] = -(drift[k] - sum(probs[i, j] * drift[j] for j in range(CLASSES)))
    return products


def test_products_equal_the_formula_in_plain_loops(problem):
    torch.testing.assert_close(last_layer_products(**problem), loop_products(**problem))


def test_absent_validation_rows_do_not_count(problem):
    expected = last_layer_products(**problem)
    for name in ("val_features", "val_residuals"):
        problem[name] = torch.cat([problem[name], torch.zeros_like(problem[name][:2])])
    present = (torch.arange(VAL + 2) < VAL).double()
    torch.testing.assert_close(last_layer_products(**problem, present=present), expected)


def test_products_are_those_of_a_small_step_of_the_last_layer(problem):
    """The physical oracle: move a real layer along -G and b, and see the log-probabilities move."""
    covariance = problem["covariance"] = torch.eye(FEATURES, dtype=torch.float64)
    mean, features = problem["mean"], problem["features"]
    layer = nn.Linear(FEATURES, CLASSES).double()
    logits = layer(problem["val_features"] - mean)
    problem["val_residuals"] = logits.softmax(-1) - one_hot(torch.arange(VAL) % CLASSES, CLASSES)
    loss = nn.functional.cross_entropy(logits, torch.arange(VAL) % CLASSES)
    weight, bias = torch.autograd.grad(loss, [layer.weight, layer.bias])
    problem["probs"] = layer(features - mean).softmax(-1)
    step = 1e-6
    damping = 1.1 * covariance[0, 0]
    with torch.no_grad():
        before = layer(features - mean).log_softmax(-1)
        layer.weight -= step * weight / damping
        layer.bias -= step * bias
        moved = (layer(features - mean).log_softmax(-1) - before) / step
    torch.testing.assert_close(last_layer_products(**problem), moved, rtol=1e-4, atol=1e-6)


def test_constant_features_give_finite_products(problem):
    problem["features"] = problem["mean"].expand(BATCH, -1)
    problem["val_features"] = problem["mean"].expand(VAL, -1)
    problem["covariance"] = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    assert last_layer_products(**problem).isfinite().all()


def test_group_evidence_equals_plain_loops(problem):
    products = last_layer_products(**problem)
    labels = problem["probs"].roll(1, 0)
    group = torch.arange(BATCH) % (GROUPS + 1)
    group[group == 2] = 0  # one group is absent
    usable = (torch.arange(BATCH) != 5).double()
    means, counts = group_evidence(products, labels, group, GROUPS, usable=usable)
    rows = [i for i in range(BATCH) if usable[i]]
    squares = [products[i, k] ** 2 for i in rows for k in range(CLASSES)]
    rms = (sum(squares) / len(squares)) ** 0.5
    for g in range(GROUPS + 1):
        members = [i for i in rows if group[i] == g]
        assert counts[g] == len(members)
        total = sum(labels[i, k] * products[i, k] for i in members for k in range(CLASSES))
        expected = total / rms / len(members) if members else torch.tensor(0.0)
        assert means[g].item() == pytest.approx(float(expected), abs=1e-12)


def test_batches_without_signal_give_no_evidence():
    group = torch.tensor([0, 1])
    means, _ = group_evidence(torch.zeros(2, 3), torch.eye(3)[:2], group, 1)
    assert means.tolist() == [0, 0]
    means, counts = group_evidence(torch.zeros(0, 3), torch.zeros(0, 3), group[:0], 1)
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


def test_factors_change_shares_and_keep_the_sum():
    weights = torch.tensor([1.0, 1.0, 0.5, 1.5, 2.0])
    augmented = torch.tensor([False, True, True, True, True])
    factors = torch.tensor([9.0, 2.0, 2.0, 1.0, 0.0])
    found = rescale_weights(weights, factors, augmented)
    # 2, 1, 1.5 and 0, scaled from 4.5 back to 5
    assert found.tolist() == pytest.approx([1, 2 / 0.9, 1 / 0.9, 1.5 / 0.9, 0])
    assert rescale_weights(weights * 0, factors, augmented).eq(0).all()
    assert rescale_weights(weights, factors * 0, augmented)[1:].eq(0).all()
