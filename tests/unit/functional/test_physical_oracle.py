"""The solve against what really happens: take the step, and measure the validation loss.

The chain under test is the one of a training step: `engine.gradient`, `descent_direction`,
`engine.jvp`, `solve`. Nothing in the expected values knows about inner products, so a wrong
sign anywhere fails here.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import Problem, make_problem
from helpers.solving import measure, solve, val_gradient
from scipy.optimize import linprog, minimize
from torch import Tensor

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.functional import Settings, weighted_cross_entropy
from saflex_lightning.functional.solve import SAflexSolution, learned_labels

LEARNING_RATE = 1e-7  # float64: the second order is far below the first, rounding too
OPTIONS = [{}, {"weight": torch.tensor([0.5, 3.0, 1.0, 2.0]).double(), "label_smoothing": 0.1}]


def solve_problem(problem: Problem, engine_name: str, loss_options=None, **options):
    """Run the chain of a training step; return the solution."""
    loss_options = loss_options or {}

    def run() -> Tensor:
        return problem.model(problem.inputs)

    engine = make_engine(engine_name, problem.model, run)
    gradient = val_gradient(
        engine,
        problem.model,
        lambda: problem.model(problem.val_inputs),
        lambda scores: F.cross_entropy(scores, problem.val_target, **loss_options),
    )
    scores, jvp = measure(engine, run, descent_direction(gradient))
    return solve(
        jvp,
        scores.detach().softmax(-1),
        problem.target,
        class_weight=loss_options.get("weight"),
        label_smoothing=loss_options.get("label_smoothing", 0.0),
        **options,
    )


@contextmanager
def descended(problem: Problem, loss: Tensor, params: list[Tensor] | None = None) -> Iterator[None]:
    """Take one plain descent step on a loss, and take it back."""
    params = problem.params if params is None else params
    gradients = torch.autograd.grad(loss, params)
    saved = [parameter.detach().clone() for parameter in params]
    with torch.no_grad():
        for parameter, gradient in zip(params, gradients, strict=True):
            parameter -= LEARNING_RATE * gradient
    yield
    with torch.no_grad():
        for parameter, value in zip(params, saved, strict=True):
            parameter.copy_(value)


def fall_per_label(problem: Problem, row: int, params=None, **options) -> Tensor:
    """Return by how much a step on one row lowers the validation loss, for each label of it."""
    before = problem.val_loss(**options).item()
    falls = []
    for label in range(4):
        scores = problem.model(problem.inputs[row : row + 1])
        loss = F.cross_entropy(scores, torch.tensor([label]), reduction="sum", **options)
        with descended(problem, loss, params):
            falls.append(before - problem.val_loss(**options).item())
    return torch.tensor(falls, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weighted and smoothed"])
@pytest.mark.parametrize("engine", ["forward_mode", "finite_difference", "head"])
def test_the_step_lowers_validation_loss_most_for_the_chosen_label(engine, options) -> None:
    chosen = []
    for seed in range(120):
        problem = make_problem(seed, rows=3)
        solution = solve_problem(
            problem,
            engine,
            options,
            normalize=False,
            label_rule="argmax",
            label_penalty=0.0,
        )
        params = list(problem.model[-1].parameters()) if engine == "head" else None
        falls = fall_per_label(problem, 0, params, **options)
        label = solution.soft_labels[0].argmax()
        assert label == falls.argmax()
        torch.testing.assert_close(
            falls,
            LEARNING_RATE * solution.inner_products[0],
            rtol=1e-3,
            atol=1e-5 * falls.abs().max().item(),
        )
        chosen.append(label.item())
    assert set(chosen) == {0, 1, 2, 3}


@pytest.mark.parametrize("preset", ["robust", "soft and dropped"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weighted and smoothed"])
def test_the_fall_of_a_weighted_batch_is_predicted(preset, options) -> None:
    settings = {
        "robust": {},
        "soft and dropped": {
            "normalize": False,
            "label_penalty": 0.3,
            "temperature": 0.5,
            "weight_rule": "expected",
        },
    }[preset]
    shares = []
    for seed in range(30):
        problem = make_problem(seed, rows=6)
        solution = solve_problem(problem, "forward_mode", options, **settings)
        plain = solve_problem(problem, "forward_mode", options, normalize=False)
        terms = solution.weights.unsqueeze(-1) * solution.soft_labels * plain.inner_products
        loss = weighted_cross_entropy(
            problem.model(problem.inputs),
            solution.soft_labels,
            solution.weights,
            class_weight=options.get("weight"),
            label_smoothing=options.get("label_smoothing", 0.0),
            total=torch.tensor(1.0),
        )
        before = problem.val_loss(**options).item()
        with descended(problem, loss):
            fall = before - problem.val_loss(**options).item()
        scale = terms.abs().sum().item()
        predicted = LEARNING_RATE * terms.sum().item()
        assert fall == pytest.approx(predicted, rel=1e-3, abs=1e-5 * LEARNING_RATE * scale)
        shares.append((solution.weights > 0).double().mean().item())
    assert min(shares) == 1 if preset == "robust" else 0 < min(shares) < 1


@pytest.mark.parametrize(
    "labels",
    [
        {"label_rule": "keep"},
        {"label_rule": "softmax", "label_penalty": 3.0, "temperature": 1.0},
        {"label_rule": "argmax", "label_penalty": 2.0},
    ],
    ids=["own labels", "soft labels", "hard labels"],
)
def test_dropping_what_algorithm_1_drops_lowers_validation_loss(labels) -> None:
    dropped = kept = 0
    for seed in range(100):
        problem = make_problem(seed, rows=5)
        solution = solve_problem(
            problem, "forward_mode", normalize=False, weight_rule="expected", **labels
        )

        def loss_after(rows: Tensor, problem=problem, solution=solution) -> float:
            loss = weighted_cross_entropy(
                problem.model(problem.inputs),
                solution.soft_labels,
                rows.double(),
                total=torch.tensor(1.0),
            )
            with descended(problem, loss):
                return problem.val_loss().item()

        every = torch.ones(5, dtype=torch.bool)
        with_all = loss_after(every)
        for row in range(5):
            without = loss_after(every & (torch.arange(5) != row))
            if solution.weights[row] == 0:
                assert without < with_all
                dropped += 1
            else:
                assert without >= with_all
                kept += 1
        if (solution.weights == 0).any():
            assert loss_after(solution.weights > 0) < with_all
    assert dropped > 50
    assert kept > 50


# The linear programmes that the rules solve


def random_products(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(6, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("score_space", ["log_probs", "probs", "logits"])
def test_weights_and_labels_solve_the_joint_linear_programme(score_space) -> None:
    """Maximise sum_i w_i y_i . Pi_i over w in [0, 1] and y on the simplex.

    With v = w y it is linear: v >= 0, the entries of a row sum to at most 1. The solution is the
    argmax label, kept where its product is positive.
    """
    dropped = 0
    for seed in range(25):
        jvp, target = random_products(seed), torch.arange(6) % 4
        probs = (2 * random_products(1000 + seed)).softmax(-1)
        solution = solve(
            jvp,
            probs,
            target,
            score_space=score_space,
            normalize=False,
            label_rule="argmax",
            label_penalty=0.0,
            weight_rule="expected",
        )
        products = solution.inner_products.numpy()
        row_sums = np.kron(np.eye(6), np.ones((1, 4)))
        result = linprog(-products.reshape(-1), A_ub=row_sums, b_ub=np.ones(6), bounds=(0, None))
        assert result.success
        mass = result.x.reshape(6, 4)
        kept = solution.weights.numpy() > 0
        np.testing.assert_allclose(mass.sum(-1), kept, atol=1e-9)
        np.testing.assert_allclose(mass[kept], solution.soft_labels.numpy()[kept], atol=1e-9)
        dropped += int((~kept).sum())
    if score_space == "logits":
        assert dropped > 0
    else:  # there the best label never has a negative product
        assert dropped == 0


def test_weights_solve_the_linear_programme_of_given_labels() -> None:
    """Maximise sum_i w_i y_i . Pi_i over w in [0, 1] alone, the labels being what they are."""
    dropped = 0
    for seed in range(25):
        jvp, target = random_products(seed), torch.arange(6) % 4
        probs = (2 * random_products(1000 + seed)).softmax(-1)
        solution = solve(
            jvp, probs, target, normalize=False, label_rule="keep", weight_rule="expected"
        )
        value = (solution.inner_products * solution.soft_labels).sum(-1)
        result = linprog(-value.numpy(), bounds=(0, 1))
        kept = solution.weights.numpy() > 0
        np.testing.assert_allclose(result.x, kept, atol=1e-9)
        dropped += int((~kept).sum())
    assert 25 < dropped < 125


def test_penalised_labels_solve_their_linear_programme() -> None:
    """Maximise y . (Pi + beta e) over the simplex, row by row."""
    for seed in range(25):
        products, labels = random_products(seed), torch.eye(4).double()[torch.arange(6) % 4]
        found = learned_labels(products, labels, Settings(label_rule="argmax", label_penalty=0.7))
        for row in range(6):
            reward = products[row] + 0.7 * labels[row]
            result = linprog(-reward.numpy(), A_eq=np.ones((1, 4)), b_eq=[1], bounds=(0, None))
            np.testing.assert_allclose(result.x, found[row].numpy(), atol=1e-9)


@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_softmax_labels_solve_the_programme_with_entropy(penalty, temperature) -> None:
    """Maximise y . (Pi + beta e) + tau H(y) over the simplex, by a general solver."""
    for seed in range(3):
        products, labels = random_products(seed), torch.eye(4).double()[torch.arange(6) % 4]
        settings = Settings(label_rule="softmax", label_penalty=penalty, temperature=temperature)
        found = learned_labels(products, labels, settings)
        for row in range(6):
            reward = (products[row] + penalty * labels[row]).numpy()
            result = minimize(
                lambda y, r=reward: -(y @ r) + temperature * (y * np.log(y)).sum(),
                np.full(4, 0.25),
                jac=lambda y, r=reward: -r + temperature * (np.log(y) + 1),
                method="SLSQP",
                bounds=[(1e-12, 1)] * 4,
                constraints={
                    "type": "eq",
                    "fun": lambda y: y.sum() - 1,
                    "jac": lambda y: np.ones(4),
                },
                options={"ftol": 1e-15, "maxiter": 500},
            )
            np.testing.assert_allclose(result.x, found[row].numpy(), atol=1e-5)


def test_the_sign_of_the_paper_as_printed_picks_the_worst_label() -> None:
    """Without the minus of `descent_direction` the argmax would be the label that hurts most."""
    for seed in range(20):
        problem = make_problem(seed, rows=1)
        solution: SAflexSolution = solve_problem(problem, "forward_mode", normalize=False)
        assert (-solution.inner_products[0]).argmax() == fall_per_label(problem, 0).argmin()
