"""The direction that steers: selection of parameters, sign, length and preconditioning."""

import pytest
import torch
import torch.nn.functional as F
from helpers.cases import relative_error
from helpers.models import CLASSES, Aliased, Tied, make_mlp
from helpers.solving import measure
from torch import Tensor, nn

from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.engines.direction import adam_second_moments
from saflex_lightning.engines.parameters import select_parameters

INPUTS = torch.linspace(-1, 1, 30).view(6, 5)
TARGET = torch.arange(6) % CLASSES


def total_norm(parts) -> float:
    return torch.cat([part.reshape(-1) for part in parts]).norm().item()


# Selection


def test_all_trainable_parameters_are_matched_once():
    model = Tied()
    assert [id(p) for p in select_parameters(model)] == [id(p) for p in model.parameters()]
    aliased = Aliased()
    assert len(select_parameters(aliased)) == 4


def test_patterns_choose_by_name():
    model = make_mlp()
    assert [id(p) for p in select_parameters(model, ["2.*"])] == [
        id(model[2].weight),
        id(model[2].bias),
    ]
    assert [id(p) for p in select_parameters(model, ["*.bias"])] == [
        id(model[0].bias),
        id(model[2].bias),
    ]


def test_frozen_parameters_are_not_matched_and_get_no_derivative():
    model = make_mlp()
    model[0].requires_grad_(False)
    assert len(select_parameters(model)) == 2
    for name in ("finite_difference", "forward_mode"):
        engine = make_engine(name, model)
        gradient = engine.gradient(lambda: model(INPUTS), lambda s: F.cross_entropy(s, TARGET))
        _, found = measure(engine, lambda: model(INPUTS), descent_direction(gradient))
        hidden = model[1](model[0](INPUTS)).detach()
        weight, bias = gradient
        torch.testing.assert_close(found, -(hidden @ weight.T + bias), rtol=5e-3, atol=1e-4)


def test_a_pattern_without_a_match_is_refused():
    model = make_mlp()
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match=r"'0\.\*' matches none of \['2.bias', '2.weight'\]"):
        select_parameters(model, ["2.*", "0.*"])


def test_a_model_without_trainable_parameters_is_refused():
    with pytest.raises(ValueError, match="none requires a gradient"):
        select_parameters(make_mlp().requires_grad_(False))


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_parameters_the_loss_does_not_reach_get_zeros(name):
    model = make_mlp()
    model.unused = nn.Linear(2, 2)
    engine = make_engine(name, model)
    gradient = engine.gradient(
        lambda: model[2](model[1](model[0](INPUTS))), lambda s: F.cross_entropy(s, TARGET)
    )
    assert [part.shape for part in gradient] == [p.shape for p in model.parameters()]
    assert total_norm(gradient[-2:]) == 0


def test_parameters_that_no_optimizer_holds_are_left_out():
    model = make_mlp()
    held = [model[2].weight, model[0].bias, nn.Parameter(torch.zeros(1))]
    chosen = select_parameters(model, held=held)
    assert [id(p) for p in chosen] == [id(model[0].bias), id(model[2].weight)]  # the model's order
    # Patterns say what they say, and before the optimizers exist all are taken.
    assert len(select_parameters(model, ["*.weight"], held[1:2])) == 2
    assert len(select_parameters(model, held=[])) == 4
    assert len(select_parameters(model, held=held[2:])) == 4


# Sign and length


def test_the_direction_points_against_the_gradient():
    gradient = (torch.tensor([3.0, 0.0]), torch.tensor([[-4.0]]))
    parts, norm = descent_direction(gradient)
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(parts, (torch.tensor([-0.6, 0.0]), torch.tensor([[0.8]])))
    assert gradient[0].tolist() == [3.0, 0.0]


def test_the_validation_loss_falls_along_the_direction():
    model = make_mlp().double()
    inputs = INPUTS.double()
    engine = make_engine("forward_mode", model)

    def loss(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, TARGET)

    before = loss(model(inputs)).item()
    direction = descent_direction(engine.gradient(lambda: model(inputs), loss))
    with torch.no_grad():
        for parameter, part in zip(engine.params, direction.parts, strict=True):
            parameter += 1e-6 * part
    fallen = (before - loss(model(inputs)).item()) / 1e-6
    assert fallen == pytest.approx(direction.norm.item(), rel=1e-4)


@pytest.mark.parametrize("second_moments", [None, (torch.ones(2), torch.zeros(1))])
def test_a_zero_gradient_gives_a_zero_direction(second_moments):
    parts, norm = descent_direction((torch.zeros(2), torch.zeros(1)), second_moments)
    assert norm.item() == 0
    assert total_norm(parts) == 0


def test_one_parameter_of_double_precision_does_not_shorten_the_step_of_the_others():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
            self.network = make_mlp()

        def forward(self, inputs: Tensor) -> Tensor:
            return self.network(inputs) * self.scale

    torch.manual_seed(0)
    model, inputs = Scaled(), torch.randn(64, 5)
    direction = descent_direction([torch.randn_like(parameter) for parameter in model.parameters()])
    found, exact = (
        measure(make_engine(name, model), lambda: model(inputs), direction)[1]
        for name in ("finite_difference", "forward_mode")
    )
    assert relative_error(found, exact) < 5e-3


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_rows_of_a_sparse_embedding_have_a_gradient(name):
    gradients = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(7, 5, sparse=sparse), nn.Linear(5, CLASSES))
        codes = torch.tensor([[0, 1], [2, 2], [3, 0], [1, 1], [0, 0], [4, 2]])
        engine = make_engine(name, model)
        gradients.append(
            engine.gradient(lambda: model(codes), lambda s: F.cross_entropy(s, TARGET))  # noqa: B023
        )
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", ["finite_difference", "forward_mode"])
def test_a_zero_direction_moves_no_score(name):
    model = make_mlp()
    engine = make_engine(name, model)
    direction = descent_direction([torch.zeros_like(p) for p in engine.params])
    assert not measure(engine, lambda: model(INPUTS), direction)[1].any()


def test_z_does_not_depend_on_how_the_direction_is_split():
    """The step has a fixed length, so Z is linear in the gradient up to rounding."""
    model = make_mlp()
    engine = make_engine("finite_difference", model)
    gradient = engine.gradient(lambda: model(INPUTS), lambda s: F.cross_entropy(s, TARGET))
    results = [
        measure(engine, lambda: model(INPUTS), descent_direction([scale * g for g in gradient]))[1]
        / scale
        for scale in (1e-4, 1.0, 1e4)
    ]
    torch.testing.assert_close(results[0], results[1], rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(results[2], results[1], rtol=2e-3, atol=1e-4)


# Preconditioning


def test_preconditioning_divides_by_the_damped_root_of_the_second_moment():
    gradient = (torch.tensor([1.0, 2.0]), torch.tensor([4.0]))
    moments = (torch.tensor([4.0, 0.0]), torch.tensor([8.0]))
    damping = 0.1 * 2.0  # a tenth of the root of (4 + 0 + 8) / 3
    expected = torch.tensor(
        [
            -1.0 / (2.0 + damping),
            -2.0 / damping,
            -4.0 / (8.0**0.5 + damping),
        ]
    )
    parts, norm = descent_direction(gradient, moments)
    torch.testing.assert_close(norm, expected.norm())
    torch.testing.assert_close(torch.cat(parts), expected / expected.norm())
    assert total_norm(parts) == pytest.approx(1.0)
    assert moments[0].tolist() == [4.0, 0.0]


def test_without_any_second_moment_the_direction_is_the_plain_one():
    gradient = (torch.tensor([3.0, -4.0]),)
    parts, norm = descent_direction(gradient, (torch.zeros(2),))
    assert norm.item() == pytest.approx(5.0)
    torch.testing.assert_close(parts[0], torch.tensor([-0.6, 0.8]))


def test_dead_units_do_not_dominate_the_direction():
    """Parameters that training does not move have v = 0, and a validation gradient near 0."""
    torch.manual_seed(0)
    model = make_mlp(hidden=32)
    with torch.no_grad():
        model[0].bias[:16] -= 100
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), TARGET).backward()
        optimizer.step()
    engine = make_engine("finite_difference", model)
    gradient = engine.gradient(lambda: model(INPUTS), lambda s: F.cross_entropy(s, TARGET))
    noisy = [part + 1e-9 * torch.randn_like(part) for part in gradient]
    parts, _ = descent_direction(noisy, adam_second_moments(engine.params, [optimizer]))
    assert total_norm([parts[0][:16], parts[1][:16]]) < 1e-5
    assert total_norm([parts[0][16:], parts[1][16:]]) > 0.1


def take_steps(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(INPUTS), TARGET).backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam])
def test_second_moments_are_corrected_for_their_bias(kind):
    model = make_mlp()
    params = list(model.parameters())
    optimizer = kind(params, lr=0.0, betas=(0.9, 0.5))  # so that the gradient stays the same
    assert adam_second_moments(params, [optimizer]) is None
    take_steps(optimizer, model, 3)
    found = adam_second_moments(params, [optimizer])
    for parameter, moment in zip(params, found, strict=True):
        torch.testing.assert_close(moment, parameter.grad.square())


def test_second_moments_follow_the_parameters_over_several_optimizers():
    model = make_mlp()
    first = torch.optim.Adam(model[0].parameters(), lr=0.0)
    second = torch.optim.Adam(model[2].parameters(), lr=0.0)
    take_steps(first, model, 1)
    params = [model[2].weight, model[0].weight]
    untouched, touched = adam_second_moments(params, [first, second])
    assert untouched.shape == model[2].weight.shape
    assert not untouched.any()
    torch.testing.assert_close(touched, model[0].weight.grad.square())


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop])
def test_other_optimizers_have_no_second_moments_of_this_kind(kind):
    model = make_mlp()
    optimizer = kind(model.parameters(), lr=1e-3)
    take_steps(optimizer, model, 1)
    assert adam_second_moments(list(model.parameters()), [optimizer]) is None


class GroupStep(torch.optim.Adam):
    """Counts its steps in the group, as LAMB does, or not at all."""

    counts = True

    def step(self, closure=None):
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                step = self.state[parameter].pop("step")
                if self.counts:
                    group["step"] = int(step)
        return result


def stepped(make, model=None):
    model = make_mlp() if model is None else model
    optimizer = make(model.parameters())
    F.cross_entropy(model(INPUTS), TARGET).backward()
    optimizer.step()
    return list(model.parameters()), optimizer


def test_steps_counted_by_the_group_correct_the_bias():
    torch.manual_seed(0)
    params, optimizer = stepped(GroupStep)
    expected = [parameter.grad**2 for parameter in params]
    torch.testing.assert_close(adam_second_moments(params, [optimizer]), expected)


def test_moments_of_another_kind_are_left_alone(monkeypatch):
    monkeypatch.setattr(GroupStep, "counts", False)
    params, optimizer = stepped(GroupStep)
    assert adam_second_moments(params, [optimizer]) is None
    params, optimizer = stepped(torch.optim.Adam)
    for parameter in params:
        optimizer.state[parameter]["exp_avg_sq"] = torch.tensor(1.0)  # one per layer
    assert adam_second_moments(params, [optimizer]) is None
    optimizer.param_groups[0]["betas"] = (0.9, 0.9, 0.99)
    assert adam_second_moments(params, [optimizer]) is None


def test_parameters_of_another_kind_of_optimizer_leave_no_common_scale():
    model = make_mlp()
    head, body = model[2].parameters(), model[0].parameters()
    F.cross_entropy(model(INPUTS), TARGET).backward()
    optimizers = [torch.optim.SGD(body, 0.1), torch.optim.Adam(head)]
    for optimizer in optimizers:
        optimizer.step()
    assert adam_second_moments(list(model.parameters()), optimizers) is None
    moments = adam_second_moments(list(model[2].parameters()), optimizers)
    torch.testing.assert_close(moments, [p.grad**2 for p in model[2].parameters()])


def test_a_fused_step_that_overflowed_leaves_zeros():
    params, optimizer = stepped(torch.optim.Adam)
    for parameter in params:
        state = optimizer.state[parameter]
        state["step"].zero_()
        state["exp_avg_sq"].zero_()
    moments = adam_second_moments(params, [optimizer])
    assert all(not moment.any() for moment in moments)
    assert descent_direction([p.grad for p in params], moments).norm.isfinite()


def test_a_head_may_be_called_by_keyword():
    model = make_mlp()
    hidden = model[1](model[0](INPUTS)).detach()

    def forward() -> Tensor:
        return model[2](input=model[1](model[0](INPUTS)))

    engine = make_engine("head", model, forward)
    gradient = engine.gradient(forward, lambda scores: F.cross_entropy(scores, TARGET))
    _, found = measure(engine, forward, descent_direction(gradient))
    torch.testing.assert_close(found, -(hidden @ gradient[0].T + gradient[1]))
