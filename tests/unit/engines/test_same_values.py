"""Whether scores are a layer's output as it is: the graph tells, and without one the values."""

import pytest
import torch
from torch import nn

from saflex_lightning.engines.head import same_values

CHANGES = {
    "itself": (lambda x: x, True),
    "cloned": (lambda x: x.clone(), True),
    "cast": (lambda x: x.to(torch.float64), True),
    "cast there and back": (lambda x: x.double().clone().float(), True),
    "viewed": (lambda x: x.view(-1, 4), True),
    "flat and back": (lambda x: x.reshape(-1).reshape(4, 4), True),
    "squeezed": (lambda x: x.squeeze(1), True),
    "another dimension and back": (
        lambda x: x.unsqueeze(1).squeeze(1).unsqueeze(0).squeeze(),
        True,
    ),
    "viewed as another shape": (lambda x: x.view(2, 8), False),
    "flat transpose": (lambda x: x.T.reshape(-1).reshape(4, 4), False),
    "permuted rows": (lambda x: x[[1, 0, 2, 3]], False),
    "permuted classes": (lambda x: x.flip(1), False),
    "transposed": (lambda x: x.T, False),
    "transposed twice": (lambda x: x.T.clone().T, True),
    "sliced": (lambda x: x[:, :2], False),
    "shifted": (lambda x: x + 1, False),
    "centred": (lambda x: x - x.mean(-1, keepdim=True), False),
    "other": (lambda x: torch.randn_like(x), False),
}


@pytest.fixture
def output():
    torch.manual_seed(0)
    return nn.Linear(4, 4)(torch.randn(4, 4))


@pytest.mark.parametrize("name", [n for n in CHANGES if n != "transposed twice"])
def test_the_graph_tells(name, output):
    change, expected = CHANGES[name]
    assert same_values(change(output), output) is expected


@pytest.mark.parametrize("name", CHANGES)
def test_values_tell_where_there_is_no_graph(name, output):
    change, expected = CHANGES[name]
    output = output.detach()
    assert same_values(change(output), output) is expected


def test_a_factor_of_1_shows_in_the_graph_alone(output):
    assert not same_values(1 * output, output)
    assert not same_values(output + 0, output)
    assert same_values(1 * output.detach(), output.detach())


def test_scores_that_lost_their_graph_are_others(output):
    assert not same_values(output.detach(), output)
    assert not same_values(output, output.detach())


def test_equal_values_of_another_call_are_others():
    layer, inputs = nn.Linear(4, 4), torch.randn(4, 4)
    assert not same_values(layer(inputs), layer(inputs))


def test_numbers_that_are_not_finite_are_compared_too():
    output = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]])
    assert same_values(output.clone(), output)
    assert not same_values(output.flip(0), output)


def test_the_graph_may_be_that_of_an_output_before_it_was_changed(output):
    node = output.grad_fn
    assert same_values(output.clone(), output, node)
    changed = output.clone().mul_(2)
    assert not same_values(changed, output, node)
