"""The judge of rows: Gaussians, brute-force likelihood, and derivatives by autograd, in float64."""

import logging

import pytest
import torch
from helpers.training import NUM_CLASSES, Classifier, callback, fit, seeded
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from torch.nn.functional import cross_entropy, one_hot

from saflex_lightning.evidence import discriminant, evidence
from saflex_lightning.evidence.discriminant import (
    TEMPERATURES,
    best_temperature,
    fit_discriminant,
)

ROWS, CLASSES = 60, 4


@pytest.fixture
def rows():
    """Scores that tell classes apart, with residuals, labels and presence."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % 3  # the last class has no row
    scores = torch.randn(ROWS, CLASSES, generator=generator, dtype=torch.float64)
    scores[:, :3] += 2 * one_hot(labels, 3)
    onehot = one_hot(labels, CLASSES).double()
    return scores, scores.softmax(1) - onehot, onehot, torch.ones(ROWS, dtype=torch.float64)


def gaussians(scores, labels, new):
    """Log-posteriors by densities: one pseudo-row at the common mean for each class."""
    center, counts = scores.mean(0), labels.sum(0) + 1
    means = [(scores[labels[:, k] > 0].sum(0) + center) / counts[k] for k in range(labels.shape[1])]
    centred = [row - means[label] for row, label in zip(scores, labels.argmax(1), strict=True)]
    covariance = sum(torch.outer(row, row) for row in centred) / len(scores)
    covariance = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(scores.shape[1])
    densities = [
        torch.distributions.MultivariateNormal(mean, covariance).log_prob(new) for mean in means
    ]
    return torch.stack(densities, 1) + counts.log()


def test_posteriors_equal_gaussians_with_a_shared_covariance(rows):
    scores, _, labels, _ = rows
    found = fit_discriminant(*rows).judge(scores)[0]
    expected = gaussians(scores, labels, scores)
    torch.testing.assert_close(found.softmax(1), expected.softmax(1))


def test_a_diagonal_covariance_equals_loops(rows, monkeypatch):
    scores, residuals, labels, _ = rows
    full = fit_discriminant(*rows).judge(scores)
    monkeypatch.setattr(discriminant, "MOST_SCORES", CLASSES - 1)
    logits, products = fit_discriminant(*rows).judge(scores)
    classes, center = labels.argmax(1), scores.mean(0)
    means, counts = [], []
    for k in range(CLASSES):
        own = [row for row, label in zip(scores, classes, strict=True) if label == k]
        means.append((sum(own, center)) / (len(own) + 1))
        counts.append(len(own) + 1)
    squares = [(row - means[label]) ** 2 for row, label in zip(scores, classes, strict=True)]
    variances = sum(squares) / ROWS
    variances = variances + 0.1 * variances.mean()
    gradient = sum(torch.outer(r, h - center) for r, h in zip(residuals, scores, strict=True))
    for i, row in enumerate(scores):
        expected = [
            torch.tensor(float(count)).double().log() - ((row - mean) ** 2 / variances).sum() / 2
            for mean, count in zip(means, counts, strict=True)
        ]
        torch.testing.assert_close(logits[i].softmax(0), torch.stack(expected).softmax(0))
        move = -(gradient / ROWS) @ ((row - center) / variances) - residuals.mean(0)
        probs = row.softmax(0)
        torch.testing.assert_close(products[i], move - (probs * move).sum())
    assert not torch.allclose(logits.softmax(1), full[0].softmax(1), atol=1e-3)
    assert not torch.allclose(products, full[1], atol=1e-3)


@pytest.mark.parametrize("most", [NUM_CLASSES, NUM_CLASSES - 1])
def test_a_diagonal_covariance_is_said_once(most, monkeypatch, caplog):
    for module in (discriminant, evidence):
        monkeypatch.setattr(module, "MOST_SCORES", most)
    with caplog.at_level(logging.INFO):
        fit(seeded(Classifier), callback(), max_epochs=8)
    told = [text for text in caplog.messages if "scores to be diagonal" in text]
    assert len(told) == (most < NUM_CLASSES)


@pytest.mark.parametrize("number", [ROWS, ROWS - 1])
def test_temperature_equals_brute_force_over_two_folds(rows, number):
    rows = [part[:number] for part in rows]
    scores, _, labels, _ = rows
    even = torch.arange(number) % 2 == 0
    totals, frequencies = [], 0.0
    for fold in (even, ~even):
        counts = labels[fold].sum(0) + 1
        frequencies += ((counts / counts.sum()).log() * labels[~fold]).sum().item()
    for tau in TEMPERATURES:
        total = 0.0
        for fold in (even, ~even):
            # Densities of the rest, of which the absent rows are no part.
            logits = fit_discriminant(*(part[fold] for part in rows)).judge(scores[~fold])[0]
            total += (torch.log_softmax(tau * logits, 1) * labels[~fold]).sum().item()
        totals.append(total)
    best = TEMPERATURES[max(range(len(totals)), key=totals.__getitem__)]
    found, information = best_temperature(scores, labels, rows[3])
    assert found.item() == best > 0.03
    assert information.item() == pytest.approx((max(totals) - frequencies) / number)
    assert information > 0.3


def test_confident_labels_by_chance_are_tempered():
    """Scores that say nothing of the label ask for the flattest posterior."""
    generator = torch.Generator().manual_seed(1)
    scores = 5 * torch.randn(40, CLASSES, generator=generator)
    labels = one_hot(torch.randint(0, CLASSES, (40,), generator=generator), CLASSES).float()
    tau, information = best_temperature(scores, labels, torch.ones(40))
    assert tau.item() == pytest.approx(0.03)
    assert information.item() == pytest.approx(0, abs=0.05)


def test_products_are_derivatives_along_a_second_order_step(rows):
    """A linear layer A (h - mu) + c on top of the scores, at A = identity and c = mu."""
    scores, _, labels, _ = rows
    found = fit_discriminant(*rows).judge(scores)[1]
    center = scores.mean(0)
    centred = scores - center
    weight = torch.eye(CLASSES, dtype=torch.float64, requires_grad=True)
    bias = center.clone().requires_grad_()
    loss = cross_entropy(centred @ weight.T + bias, labels)
    gradient, offset = torch.autograd.grad(loss, (weight, bias))
    counts = labels.sum(0) + 1
    means = (labels.T @ centred) / counts.unsqueeze(1)
    within = centred - labels @ means
    covariance = within.T @ within / ROWS
    covariance = covariance + 0.1 * covariance.diagonal().mean() * torch.eye(CLASSES)
    step = -gradient @ torch.linalg.inv(covariance), -offset

    def log_probs(weight, bias):
        return torch.log_softmax(centred @ weight.T + bias, 1)

    _, expected = torch.func.jvp(log_probs, (weight.detach(), bias.detach()), step)
    torch.testing.assert_close(found, expected)


def test_teaching_rows_of_positive_product_lowers_the_validation_loss(rows):
    """The sign, by really taking the step."""
    scores, _, labels, _ = rows
    products = fit_discriminant(*rows).judge(scores)[1]
    given = (products * labels).sum(1)

    def loss_after(chosen):
        weight = torch.eye(CLASSES, dtype=torch.float64, requires_grad=True)
        cross_entropy(scores[chosen] @ weight.T, labels[chosen]).backward()
        return cross_entropy(scores @ (weight - 1e-3 * weight.grad).T, labels)

    before = cross_entropy(scores, labels)
    order = given.argsort()
    assert loss_after(order[-20:]) < before
    assert loss_after(order[-20:]) < loss_after(order[:20])


def test_absent_rows_do_not_count(rows):
    kept = fit_discriminant(*(part[:40] for part in rows))
    padded = [torch.cat([part[:40], torch.zeros_like(part[40:])]) for part in rows]
    for found, expected in zip(fit_discriminant(*padded), kept, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "labels",
    [torch.zeros(6, dtype=torch.long), torch.arange(6) % 2, torch.tensor([0, 1, 2, 3, 4, 5])],
    ids=["one class", "two of many", "one row each"],
)
def test_fewer_rows_than_scores_and_classes_without_a_row(labels):
    scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    onehot = one_hot(labels, 9).float()
    judge = fit_discriminant(scores, scores.softmax(1) - onehot, onehot, torch.ones(6))
    assert all(part.isfinite().all() for part in judge.judge(scores))
    assert all(found.isfinite() for found in best_temperature(scores, onehot, torch.ones(6)))


def test_constant_scores():
    same = torch.ones(4, 3)
    judge = fit_discriminant(same, same, torch.eye(4)[:, :3], torch.ones(4))
    assert judge.judge(same)[0].isfinite().all()


def test_decisions_agree_with_scikit_learn():
    inputs, target = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    labels = one_hot(target, 64).double()  # as many scores as classes
    none = torch.zeros(900, 64, dtype=torch.float64)
    judge = fit_discriminant(inputs[:900], none, labels[:900], torch.ones(900).double())
    found = judge.judge(inputs[900:])[0][:, :10].argmax(1)
    other = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1)
    expected = torch.as_tensor(other.fit(inputs[:900], target[:900]).predict(inputs[900:]))
    assert (found == expected).float().mean() > 0.98
