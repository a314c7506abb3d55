"""Inner products of the last layer against plain loops in double precision."""

import pytest
import torch
from helpers.solving import ALONE, in_parts
from torch import nn
from torch.nn.functional import one_hot

from saflex_lightning.evidence.products import last_layer_products, rescale_weights

BATCH, VAL, FEATURES, CLASSES = 12, 9, 5, 4


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


def test_factors_change_shares_and_keep_the_sum():
    weights = torch.tensor([1.0, 1.0, 0.5, 1.5, 2.0])
    augmented = torch.tensor([False, True, True, True, True])
    factors = torch.tensor([9.0, 2.0, 2.0, 1.0, 0.0])
    found = rescale_weights(weights, factors, augmented, ALONE)
    # 2, 1, 1.5 and 0, scaled from 4.5 back to 5
    assert found.tolist() == pytest.approx([1, 2 / 0.9, 1 / 0.9, 1.5 / 0.9, 0])
    assert rescale_weights(weights * 0, factors, augmented, ALONE).eq(0).all()
    assert rescale_weights(weights, factors * 0, augmented, ALONE)[1:].eq(0).all()
    parts = in_parts(
        [2, 3],
        lambda own, ranks: rescale_weights(weights[own], factors[own], augmented[own], ranks),
    )
    torch.testing.assert_close(torch.cat(parts), found)
