"""Modules that leave traces or train oddly: with rules that are off a run equals the plain one."""

import copy

import pytest
import torch
from helpers.training import (
    Classifier,
    assert_same_state,
    callback,
    fit,
    seeded,
    state_of,
)
from torch import nn
from torch.nn.utils import parametrizations

from saflex_lightning import UnsupportedModelError

# Every pass of a solve, whose labels are those that were given.
OFF = {
    "preset": "gradient",
    "weight_rule": "ones",
    "label_rule": "argmax",
    "label_penalty": 1e9,
}


class Plain(Classifier):
    def __init__(self):
        super().__init__(plain=True)

    def refined(self, batch):
        return self.saflex_loss(self.saflex_forward(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        return self.refined(batch)


class Appending(Plain):
    """Keeps features for an auxiliary loss, deep in a container."""

    def __init__(self):
        super().__init__()
        self.kept = {"aux": [[]]}

    def forward(self, inputs):
        features = self.net[:-1](inputs)
        self.kept["aux"][0].append(features)
        return self.net[-1](features)

    def training_step(self, batch, batch_idx):
        self.kept["aux"][0].clear()
        loss = self.refined(batch)
        return loss + torch.cat(self.kept["aux"][0]).square().mean()


class Hooked(Plain):
    """A hook that keeps the features of the last forward."""

    def __init__(self):
        super().__init__()
        self.kept = {}
        self.net[0].register_forward_hook(lambda *call: self.kept.update(features=call[2]))

    def training_step(self, batch, batch_idx):
        return self.refined(batch) + self.kept["features"].square().mean()


class Banking(Plain):
    """A bank of features that each training forward moves on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bank", torch.zeros(16, 16))
        self.forwards = 0

    def forward(self, inputs):
        features = self.net[:-1](inputs)
        if self.training:
            self.forwards += 1
            self.bank = torch.cat([features.detach(), self.bank])[:16]
        return self.net[-1](features)

    def training_step(self, batch, batch_idx):
        return self.refined(batch) + 1e-3 * self.net[0].weight.sum() * self.bank.sum()

    def on_train_end(self):
        assert self.forwards == 8


class Tied(Plain):
    def __init__(self):
        super().__init__()
        layers = [nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)]
        self.net = nn.Sequential(*layers)
        self.net[4].weight = self.net[0].weight


class Normed(Plain):
    def __init__(self):
        super().__init__()
        self.net[-1] = parametrizations.weight_norm(self.net[-1])


class Complex(Plain):
    def __init__(self):
        super().__init__()
        self.turn = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))

    def forward(self, inputs):
        return self.net((inputs.to(self.turn) @ self.turn).abs())


class Toggling(Plain):
    """Two optimizers by hand, each for a part of the model."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        for optimizer in self.optimizers():
            self.toggle_optimizer(optimizer)
            loss = self.refined(batch)
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[place].parameters()) for place in (0, 2)]


class Gradients(Plain):
    """Takes a gradient inside its forward."""

    def forward(self, inputs):
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            energy = self.net(inputs).square().sum()
            (slope,) = torch.autograd.grad(energy, inputs, create_graph=True)
        return self.net(inputs) + slope[:, :4]


def run(make, *callbacks, **settings):
    module = seeded(make)
    fit(module, *callbacks, **settings)
    return state_of(module)


@pytest.mark.parametrize("engine", ["auto", "forward_mode", "finite_difference"])
@pytest.mark.parametrize(
    "make",
    [Plain, Appending, Hooked, Banking, Tied, Normed, Complex, Toggling, Gradients],
)
def test_a_run_with_rules_that_are_off_is_the_plain_one(make, engine):
    assert_same_state(run(make), run(make, callback(engine=engine, **OFF)))


@pytest.mark.parametrize("engine", ["auto", "forward_mode", "finite_difference"])
def test_with_accumulated_gradients_too(engine):
    settings = {"accumulate_grad_batches": 3}
    saflex = callback(engine=engine, **OFF)
    assert_same_state(run(Plain, **settings), run(Plain, saflex, **settings))


class Spectral(Plain):
    def __init__(self):
        super().__init__()
        self.net[0] = parametrizations.spectral_norm(self.net[0])


class Teaching(Plain):
    """Moves a teacher after the model, in training forwards alone or in each."""

    always = False

    def __init__(self):
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def forward(self, inputs):
        if self.training or self.always:
            with torch.no_grad():
                for old, new in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
                    old.lerp_(new, 0.1)
        return self.net(inputs)


class TeachingAlways(Teaching):
    always = True


@pytest.mark.parametrize("make", [Spectral, Teaching])
def test_the_default_engine_needs_no_training_forward_of_its_own(make):
    assert_same_state(run(make), run(make, callback(**OFF)))


@pytest.mark.parametrize(
    ("make", "engine", "named"),
    [
        (Spectral, "forward_mode", r"net\.0\.parametrizations\.weight\.0"),
        (Teaching, "forward_mode", r"teacher\.0\.weight"),
        (Teaching, "finite_difference", r"teacher\.0\.weight"),
        (TeachingAlways, "auto", r"teacher\.0\.weight"),
    ],
)
def test_what_an_extra_pass_would_spoil_is_refused_by_name(make, engine, named):
    with pytest.raises(UnsupportedModelError, match=f"`{named}`"):
        run(make, callback(engine=engine, **OFF))
