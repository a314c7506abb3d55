"""Models in half precision: what is computed in float32, and what float16 alone would lose."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import (
    CASES,
    dense_tangent,
    double_copy,
    random_direction,
    relative_error,
)
from helpers.models import CLASSES
from helpers.solving import measure, val_gradient
from torch import Tensor, nn

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.engines.direction import adam_second_moments

# A few roundings of the dtype; the oracle takes the rounded parameters in float64.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 3e-3}
TARGET = torch.arange(6) % CLASSES


def gradient(engine, model: nn.Module, inputs: Tensor) -> Tensor:
    parts = val_gradient(
        engine, model, lambda: model(inputs), lambda scores: F.cross_entropy(scores, TARGET)
    )
    assert {part.dtype for part in parts} == {torch.float32}
    return torch.cat([part.reshape(-1) for part in parts])


def reference(model: nn.Module, inputs: Tensor) -> Tensor:
    copied = double_copy(model).eval()
    loss = F.cross_entropy(copied(inputs.double()), TARGET)
    parts = torch.autograd.grad(loss, list(copied.parameters()))
    return torch.cat([part.reshape(-1) for part in parts])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", ["mlp", "cnn, batch norm, train", "multi-head attention"])
def test_gradient_and_jvp_of_half_models_come_in_float32(case, dtype):
    model, inputs = CASES[case].build()
    model, inputs = model.to(dtype), inputs.to(dtype)
    engine = make_engine("forward_mode", model)
    error = relative_error(gradient(engine, model, inputs), reference(model, inputs))
    assert error <= TOLERANCE[dtype]

    model.eval()  # batch statistics would add their own rounding, dropout its own draws
    direction = [part.float() for part in random_direction(engine.params)]
    along = descent_direction([-part for part in direction])
    _, found = measure(engine, lambda: model(inputs), along)
    copied = double_copy(model)
    expected = dense_tangent(copied(inputs.double()), list(copied.parameters()), direction)
    assert found.dtype == torch.float32
    assert relative_error(found, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_head_of_a_half_model_is_computed_in_float32(dtype):
    model, inputs = CASES["mlp"].build()
    model, inputs = model.to(dtype), inputs.to(dtype)
    engine = make_engine("head", model, lambda: model(inputs))
    found = gradient(engine, model, inputs)
    assert relative_error(found, reference(model, inputs)[-found.numel() :]) <= TOLERANCE[dtype]
    along = descent_direction([found[:32].view(4, 8), found[32:]])
    _, jvp = measure(engine, lambda: model(inputs), along)
    assert jvp.dtype == torch.float32
    copied = double_copy(model)
    expected = dense_tangent(
        copied(inputs.double()),
        list(copied[-1].parameters()),
        [along.norm * part for part in along.parts],
    )
    assert relative_error(jvp, expected) <= TOLERANCE[dtype]


def make_extreme(size: float, inputs_size: float) -> tuple[nn.Module, Tensor]:
    """Return a float16 model whose first layer has gradients of about the product of the sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CLASSES, bias=False))
    with torch.no_grad():
        model[0].weight.div_(max(1.0, inputs_size))
        model[2].weight.copy_(size * torch.randn(CLASSES, 8))
    return model.half(), (inputs_size * torch.randn(6, 5)).half()


@pytest.mark.parametrize(
    ("sizes", "lost"), [((1e-4, 2e-4), "underflow"), ((2e3, 2e3), "overflow")], ids=str
)
def test_float16_gradients_keep_what_float16_alone_loses(sizes, lost):
    model, inputs = make_extreme(*sizes)
    alone = torch.autograd.grad(F.cross_entropy(model(inputs).float(), TARGET), model[0].weight)[0]
    assert bool((alone == 0).all()) if lost == "underflow" else bool(alone.isinf().any())
    found = gradient(make_engine("forward_mode", model), model, inputs)
    expected = reference(model, inputs)
    first = model[0].weight.numel()
    assert relative_error(found[:first], expected[:first]) <= 1e-2
    assert relative_error(found[first:], expected[first:]) <= 1e-2


def test_a_float16_loss_that_is_not_finite_gives_a_gradient_that_is_not():
    model, inputs = make_extreme(1.0, 1.0)
    found = gradient(make_engine("forward_mode", model), model, inputs * torch.nan)
    assert found.isnan().any()


def test_second_moments_of_half_parameters_are_summed_in_float32():
    parameter = nn.Parameter(torch.zeros(4096, dtype=torch.float16))
    optimizer = torch.optim.Adam([parameter], eps=1e-4)
    parameter.grad = torch.full_like(parameter, 8.0)
    optimizer.step()
    moments = adam_second_moments([parameter], [optimizer])
    assert moments is not None
    assert moments[0].dtype == torch.float32
    direction = descent_direction([torch.ones(4096)], moments)  # sum v = 262,144 overflows float16
    torch.testing.assert_close(direction.parts[0], torch.full((4096,), -1 / 64))
