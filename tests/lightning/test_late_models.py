"""Models that are built, unfrozen or copied at the moments that Lightning leaves to them."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from helpers.training import (
    ENGINES,
    EVERY_WAY,
    GRADIENT,
    NUM_CLASSES,
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_net,
    seeded,
    state_of,
)
from torch import nn


class Late(Classifier):
    def __init__(self):
        super().__init__()
        self.net = None

    def build(self):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = make_net()


class InSetup(Late):
    def setup(self, stage):
        self.build()


class InConfigureModel(Late):
    def configure_model(self):
        self.build()


class Unfrozen(Classifier):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

    def setup(self, stage):
        self.requires_grad_(True)


class Built(Late):
    def __init__(self):
        super().__init__()
        self.build()


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
@pytest.mark.parametrize("late", [InSetup, InConfigureModel, Unfrozen])
def test_a_model_that_is_ready_when_the_fit_starts(late, settings):
    models = [seeded(make) for make in (late, Built)]
    for model in models:
        fit(model, callback(**settings), max_epochs=1)
    assert_same_state(*map(state_of, models))


def test_patterns_name_parameters_of_a_late_layer():
    class LateHead(Classifier):
        def setup(self, stage):
            self.net[-1] = nn.Linear(16, NUM_CLASSES)

    fit(seeded(LateHead), callback(**GRADIENT, params=["net.4.*"]), max_epochs=1)


class Copying(pl.Callback):
    """Copies the module in the middle of a step, as an average that starts late does."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.copied = copy.deepcopy(pl_module)


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
def test_a_module_is_copied_within_a_step(settings):
    copying = Copying()
    fit(seeded(Classifier), callback(**settings), copying, max_epochs=1)
    assert copying.copied._saflex_step is None
    fit(copying.copied, callback(**settings), max_epochs=1)


class Probed(Classifier):
    """Trains its head alone: by what the optimizer holds, or by freezing the rest too."""

    def __init__(self, frozen):
        super().__init__()
        if frozen:
            self.net[:-1].requires_grad_(False)

    def configure_optimizers(self):
        return torch.optim.Adam(self.net[-1].parameters(), 1e-2)


@pytest.mark.parametrize("settings", ENGINES[:2], ids=str)
def test_parameters_that_no_optimizer_holds_are_not_matched(settings):
    models = [seeded(lambda: Probed(frozen)) for frozen in (True, False)]  # noqa: B023
    for model in models:
        fit(model, callback(**settings), max_epochs=1)
    assert_same_state(*map(state_of, models))
