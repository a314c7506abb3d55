"""What is logged of a solution, by hand."""

import math
from functools import partial

import pytest
import torch
from helpers.solving import solve

from saflex_lightning.fit.report import solution_metrics

# Pi is Z - 1, see the tests of the solve.
JVP = torch.tensor([[4.0, 0.0, -4.0]])
PROBS = torch.tensor([[0.5, 0.25, 0.25]])
plain_solve = partial(solve, normalize=False)


def test_by_hand() -> None:
    # Pi . label = 3, -5, -1, then a clean row whose label would be dropped
    jvp, probs = JVP.repeat(4, 1), PROBS.repeat(4, 1)
    target, augmented = torch.tensor([0, 2, 1, 2]), torch.tensor([True, True, True, False])
    solution = plain_solve(
        jvp,
        probs,
        target,
        augmented,
        label_rule="argmax",
        label_penalty=5.0,
        weight_rule="expected",
    )
    # objective of row 2 is (3, 4, -5): own label, product -1: dropped; row 1 is relabelled
    metrics = {
        name: value.item() for name, value in solution_metrics(solution, target, augmented).items()
    }
    assert metrics == pytest.approx(
        {
            "kept_fraction": 2 / 3,
            "relabelled_fraction": 1 / 3,
            "effective_fraction": 2 / 3,
            "target_entropy": 0.0,
            "inner_product_rms": math.sqrt(35 / 3),
        }
    )


def test_entropy_and_relabelling_of_mixed_targets() -> None:
    target = torch.tensor([[0.0, 0.75, 0.25], [0.5, 0.0, 0.5]])
    solution = plain_solve(JVP.repeat(2, 1), PROBS.repeat(2, 1), target, label_rule="keep")
    metrics = solution_metrics(solution, target)
    assert metrics["relabelled_fraction"].item() == 0
    first = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert metrics["target_entropy"].item() == pytest.approx((first + math.log(2)) / 2)


def test_effective_fraction_of_unequal_weights() -> None:
    jvp, target = torch.randn(6, 2), torch.arange(6) % 2
    solution = solve(jvp, torch.full((6, 2), 0.5), target)
    squares = solution.weights.square().sum().item()
    found = solution_metrics(solution, target)["effective_fraction"].item()
    assert found == pytest.approx(36 / (6 * squares))
    assert found < 0.999


def test_all_dropped_and_none_augmented() -> None:
    jvp = torch.tensor([[-5.0, 1.0, 2.0]]).repeat(2, 1)
    target = torch.tensor([0, 0])
    options = {"label_rule": "keep", "weight_rule": "expected"}
    dropped = plain_solve(jvp, PROBS.repeat(2, 1), target, **options)
    metrics = solution_metrics(dropped, target)
    assert metrics["kept_fraction"] == 0
    assert metrics["effective_fraction"] == 0

    none = torch.zeros(2, dtype=torch.bool)
    clean = plain_solve(jvp, PROBS.repeat(2, 1), target, none, **options)
    metrics = solution_metrics(clean, target, none)
    found = [metrics[f"{name}_fraction"] for name in ("kept", "relabelled", "effective")]
    assert found == [1, 0, 1]
