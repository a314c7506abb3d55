"""Every engine against the dense Jacobian, on every model of the table."""

import functools

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import (
    CASES,
    ENGINES,
    Case,
    argmax_agreement,
    dense_tangent,
    double_copy,
    random_direction,
    relative_error,
    twice_backward_tangent,
)
from helpers.models import CLASSES, Tied
from helpers.solving import build_engine, measure, val_gradient
from torch import Tensor, nn

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.engines.engine import Engine

SEED = 7  # of the random state at the forward, so that all see the same dropout mask


def cases_of(engine: str, *, slow: tuple[str, ...] = ()) -> list:
    """The cases of an engine; those whose names begin in some ways may be slow."""
    return [
        pytest.param(case, id=name, marks=[pytest.mark.slow] if name.startswith(slow) else [])
        for name, case in CASES.items()
        if engine in case.engines
    ]


def measure_along(
    engine: Engine, model: nn.Module, inputs: Tensor, direction: list[Tensor]
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(SEED)
    along = descent_direction([-part for part in direction])
    scores, found = measure(engine, lambda: model(inputs), along)
    assert scores.requires_grad
    assert not found.requires_grad
    return scores, found


def reference(
    case: Case, model: nn.Module, inputs: Tensor, direction: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return scores and Z of a float64 copy, along a direction of all its parameters."""
    copied = double_copy(model)
    torch.manual_seed(SEED)
    scores = copied(inputs.double() if inputs.is_floating_point() else inputs)
    tangent = twice_backward_tangent if case.large else dense_tangent
    return scores.detach(), tangent(scores, list(copied.parameters()), direction)


@functools.cache
def reference_of_all_parameters(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    model, inputs = case.build(dtype=dtype)
    return reference(case, model, inputs, random_direction(list(model.parameters())))


def run(case: Case, name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Return the Z of an engine that matches all parameters, and of the reference."""
    model, inputs = case.build(dtype=dtype)
    direction = random_direction(list(model.parameters()))
    scores, found = measure_along(make_engine(name, model), model, inputs, direction)
    expected_scores, expected = reference_of_all_parameters(case, dtype)
    torch.testing.assert_close(scores.double(), expected_scores, rtol=1e-3, atol=1e-4)
    return found, expected


@pytest.mark.parametrize("case", cases_of("forward_mode"))
def test_forward_mode_is_exact(case, record_property):
    error = relative_error(*run(case, "forward_mode"))
    record_property("relative_error", error)
    assert error <= case.rounding


@pytest.mark.parametrize("case", cases_of("forward_mode"))
def test_forward_mode_is_exact_to_double_precision(case):
    assert relative_error(*run(case, "forward_mode", torch.float64)) <= 1e-13


@pytest.mark.parametrize("case", cases_of("finite_difference"))
def test_finite_difference_is_close(case, record_property):
    found, expected = run(case, "finite_difference")
    error, agreement = relative_error(found, expected), argmax_agreement(found, expected)
    record_property("relative_error", error)
    record_property("argmax_agreement", agreement)
    assert error <= case.error
    assert agreement >= 0.8


@pytest.mark.parametrize("case", cases_of("finite_difference", slow=("resnet18",)))
def test_finite_difference_converges_in_double_precision(case):
    assert relative_error(*run(case, "finite_difference", torch.float64)) <= case.error64


@pytest.mark.parametrize("case", cases_of("head"))
def test_head_is_exact_for_its_own_slice(case):
    model, inputs = case.build()
    engine = build_engine("head", model, lambda: model(inputs))
    slices = dict(zip(engine.params, random_direction(engine.params), strict=True))
    everywhere = [slices.get(p, torch.zeros_like(p)) for p in model.parameters()]
    _, expected = reference(case, model, inputs, everywhere)
    _, found = measure_along(engine, model, inputs, list(slices.values()))
    assert relative_error(found, expected) <= case.rounding


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "name",  # of models without dropout: random numbers differ between devices
    ["mlp", "cnn, batch norm, train", "cnn, batch norm, eval", "resnet18, eval"],
)
@pytest.mark.parametrize("engine", ["finite_difference", "forward_mode"])
def test_engines_on_cuda(engine, name, dtype, monkeypatch):
    """Without TF32 convolutions, which are torch's default and which finite differences refuse."""
    case = CASES[name]
    model, inputs = case.build(dtype=dtype)
    direction = random_direction(list(model.parameters()))
    made = make_engine(engine, model.cuda())
    moved = [part.cuda() for part in direction]
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    _, found = measure_along(made, model, inputs.cuda(), moved)
    _, expected = reference_of_all_parameters(case, dtype)
    error = relative_error(found.cpu(), expected)
    print(f"{engine}, {name}, {dtype}: {error:.1e}")
    if dtype == torch.float64:
        assert error <= (1e-12 if engine == "forward_mode" else case.error64)
    else:
        assert error <= (2e-5 if engine == "forward_mode" else case.error)


def test_head_of_tied_weights_counts_their_use_as_a_head_alone():
    tied, untied = Tied(), Tied(tie=False)
    untied.load_state_dict(tied.state_dict())
    tokens = torch.randint(CLASSES, (6, 3))
    engine = make_engine("head", tied, lambda: tied(tokens))
    (direction,) = random_direction(engine.params)
    _, found = measure_along(engine, tied, tokens, [direction])
    copied = double_copy(untied)
    expected = dense_tangent(copied(tokens), [copied.head.weight], [direction])
    assert relative_error(found, expected) <= 2e-6


@pytest.mark.parametrize("name", ["cnn, batch norm, train", "layer norm, dropout", "aliased head"])
def test_both_references_agree(name):
    model, inputs = CASES[name].build(dtype=torch.float64)
    params = list(model.parameters())
    direction, scores = random_direction(params), model(inputs)
    expected = dense_tangent(scores, params, direction)
    assert relative_error(twice_backward_tangent(scores, params, direction), expected) <= 1e-13


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("case", cases_of("head"))
def test_gradient_is_that_of_the_loss_in_evaluation_mode(case, name):
    model, inputs = case.build()
    target = torch.arange(case.rows) % CLASSES
    engine = build_engine(name, model, lambda: model(inputs))
    found = val_gradient(
        engine, model, lambda: model(inputs), lambda scores: F.cross_entropy(scores, target)
    )
    copied = double_copy(model).eval()
    twins = dict(zip(model.parameters(), copied.parameters(), strict=True))
    loss = F.cross_entropy(
        copied(inputs.double() if inputs.is_floating_point() else inputs), target
    )
    expected = torch.autograd.grad(loss, [twins[parameter] for parameter in engine.params])
    for part, expected_part in zip(found, expected, strict=True):
        torch.testing.assert_close(part.double(), expected_part, rtol=1e-3, atol=1e-6)
        assert part.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "expected"), [("mlp", 0.98), ("cnn, batch norm, train", 0.95), ("lstm", 0.98)]
)
def test_finite_difference_chooses_the_same_classes_in_a_larger_batch(
    name, expected, record_property
):
    model, _ = CASES[name].build()
    inputs = torch.randn(256, *CASES[name].shape)
    direction = random_direction(list(model.parameters()))
    exact = double_copy(model)
    wide = [part.double() for part in direction]
    _, reference_tangent = measure_along(
        make_engine("forward_mode", exact), exact, inputs.double(), wide
    )
    _, found = measure_along(make_engine("finite_difference", model), model, inputs, direction)
    agreement = argmax_agreement(
        found - found.mean(0), reference_tangent - reference_tangent.mean(0)
    )
    record_property("argmax_agreement", agreement)
    assert agreement >= expected
