"""A positive inner product means "training on this row, labelled so, lowers validation loss"."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import make_problem
from helpers.solving import measure
from torch import Tensor, nn

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.evidence.discriminant import fit_discriminant
from saflex_lightning.functional.reference import inner_products_reference
from saflex_lightning.functional.solve import inner_products

STEP = 1e-7  # float64: the second order is far below the first, rounding too
HEAD = ["2.*"]


def brute_force(problem, params) -> Tensor:
    """Train the head on one row with one label, and see by how much the validation loss falls."""
    before, falls = problem.val_loss().item(), torch.zeros(4, 4, dtype=torch.float64)
    for row in range(4):
        for label in range(4):
            scores = problem.model(problem.inputs[row : row + 1])
            gradients = torch.autograd.grad(F.cross_entropy(scores, torch.tensor([label])), params)
            kept = [parameter.detach().clone() for parameter in params]
            with torch.no_grad():
                for parameter, gradient in zip(params, gradients, strict=True):
                    parameter -= STEP * gradient
                falls[row, label] = (before - problem.val_loss().item()) / STEP
                for parameter, value in zip(params, kept, strict=True):
                    parameter.copy_(value)
    return falls


@pytest.mark.parametrize("seed", range(3))
def test_all_that_computes_inner_products_has_the_sign_of_brute_force(seed):
    problem = make_problem(seed, rows=4)
    model, params = problem.model, list(problem.model[2].parameters())
    expected = brute_force(problem, params)
    assert 0.2 < (expected > 0).double().mean() < 0.8

    def run() -> Tensor:
        return model(problem.inputs)

    gradient = torch.autograd.grad(problem.val_loss(), params)
    probs = run().detach().softmax(-1)
    found = {"reference": inner_products_reference(run(), params, gradient)}
    for name in ("head", "forward_mode", "finite_difference"):
        engine = make_engine(name, model, run, params=None if name == "head" else HEAD)
        own = engine.gradient(
            lambda: model(problem.val_inputs), lambda s: F.cross_entropy(s, problem.val_target)
        )
        torch.testing.assert_close(own, gradient)
        _, jvp = measure(engine, run, descent_direction(own))
        found[name] = inner_products(jvp, probs)
    for name, products in found.items():
        torch.testing.assert_close(
            products, expected, rtol=1e-3, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("seed", range(3))
def test_the_discriminant_has_the_sign_of_brute_force(seed):
    """It trains a linear layer on top of the scores, which leaves them as they are at first."""
    generator = torch.Generator().manual_seed(seed)
    scores, val_scores = torch.randn(2, 40, 4, generator=generator, dtype=torch.float64)
    val_target = torch.randint(4, (40,), generator=generator)
    val_labels, one = F.one_hot(val_target, 4).double(), torch.ones(40).double()
    # Scaled so that the covariance within classes is the identity once its ridge is added.
    center = val_scores.mean(0)
    means = val_labels.T @ (val_scores - center) / (val_labels.sum(0) + 1).unsqueeze(1)
    within = val_scores - center - means[val_target]
    factor = torch.linalg.cholesky(within.T @ within / len(within))
    scores, val_scores = (
        torch.linalg.solve_triangular(factor, (rows - center).T, upper=False).T / 1.1**0.5 + 0.5
        for rows in (scores[:4], val_scores)
    )

    layer, mean = nn.Linear(4, 4).double(), val_scores.mean(0)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4))
        layer.bias.copy_(mean)
    problem = SimpleNamespace(
        model=lambda rows: layer(rows - mean),
        inputs=scores,
        val_loss=lambda: F.cross_entropy(layer(val_scores - mean), val_target),
    )
    expected = brute_force(problem, list(layer.parameters()))
    assert 0.2 < (expected > 0).double().mean() < 0.8
    residuals = val_scores.softmax(-1) - val_labels
    discriminant = fit_discriminant(val_scores, residuals, val_labels, one)
    _, products = discriminant.judge(scores)
    torch.testing.assert_close(products, expected, rtol=1e-3, atol=1e-6)
