"""The direction that steers: its average over refreshes, and what survives a bad gradient."""

import pytest
import torch

from saflex_lightning.functional.settings import make_settings
from saflex_lightning.validation.gradient import ValidationGradient

SHAPES = ((4, 3), (4,))


def make_gradient(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator, dtype=dtype) for shape in SHAPES)


def direction(gradient):
    return torch.cat([part.flatten() for part in gradient.direction.parts])


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_average_decays_by_the_number_of_training_batches_between_refreshes(decay):
    gradient = ValidationGradient(make_settings("robust", gradient_decay=decay, precondition=False))
    expected, before = None, 0
    for number in (0, 4, 5, 11):
        new = make_gradient(number)
        gradient.update(number, new)
        flat = torch.cat([part.flatten() for part in new])
        share = decay ** (number - before)
        expected = flat if expected is None else share * expected + (1 - share) * flat
        before = number
    torch.testing.assert_close(direction(gradient), -expected / expected.norm())
    torch.testing.assert_close(gradient.direction.norm, expected.norm())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_leaves_the_average_and_its_direction_bit_for_bit(bad):
    gradient = ValidationGradient(make_settings("robust", precondition=False))
    gradient.update(0, make_gradient(0))
    gradient.update(4, make_gradient(1))
    before = direction(gradient)
    broken = make_gradient(2)
    broken[0][1, 1] = bad
    gradient.update(8, broken)
    assert torch.equal(direction(gradient), before)
    assert gradient.direction_at(8).norm.isnan()
    assert torch.equal(gradient.direction_at(9).norm, gradient.direction.norm)
    assert gradient.direction.norm > 0


def test_the_first_finite_gradient_starts_the_average():
    gradient = ValidationGradient(make_settings("robust", precondition=False))
    gradient.update(0, tuple(torch.full_like(part, torch.nan) for part in make_gradient(0)))
    assert gradient.direction_at(1).norm.isnan()
    new = make_gradient(1)
    gradient.update(4, new)
    flat = torch.cat([part.flatten() for part in new])
    torch.testing.assert_close(direction(gradient), -flat / flat.norm())


def test_gradients_and_loaded_states_are_left_as_they_are():
    first, second = make_gradient(0), make_gradient(1)
    kept = [part.clone() for part in first]
    gradient = ValidationGradient(make_settings("robust", precondition=False))
    gradient.update(0, first)
    gradient.update(4, second)
    assert all(map(torch.equal, first, kept))

    state = gradient.state_dict()
    average = [part.clone() for part in state["average"]]
    other = ValidationGradient(make_settings("robust", precondition=False))
    other.load_state_dict(state)
    other.update(8, first)
    assert all(map(torch.equal, state["average"], average))
