"""Optimizers and schedules by name."""

import pytest
import torch
from torch import nn

from saflex_lightning.recipes.optimizer import learning_rate_factor, make_optimizer


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
        ("cosine", [1.0, 0.9045, 0.6545, 0.3455, 0.0955]),
        ("steps", [1.0, 1.0, 1.0, 0.1, 0.01]),
    ],
)
def test_schedule(schedule, expected):
    factors = [learning_rate_factor(schedule, epoch, 5) for epoch in range(5)]
    assert factors == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "expected"),
    # Two steps by hand, from 1, along a gradient of 1: sgd adds half of the weight to the gradient
    # and remembers 0.9 of the first step; Adam's second step is 0.999 of its first because the
    # gradient fell from 1.5 to 1.45; adamw shrinks the weight by a factor of its own.
    [("sgd", 0.5725), ("adam", 0.8001027), ("adamw", 0.7075)],
)
def test_optimizer_by_name(name, expected):
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = make_optimizer(name, [weight], lr=0.1, weight_decay=0.5, momentum=0.9)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.item() == pytest.approx(expected, abs=1e-6)
