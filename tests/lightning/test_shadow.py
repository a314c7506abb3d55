"""The callback touches nothing but the loss: a run that discards the loss is the plain run."""

import pytest
import torch
from helpers.training import (
    GRADIENT,
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    seeded,
    state_of,
)
from torch.nn.functional import cross_entropy

from saflex_lightning import SAflexCallback


class Shadow(Classifier):
    """Calls both methods, throws the refined loss away, and trains on plain cross-entropy."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        logits = self.saflex_forward(inputs)
        self.saflex_loss(logits, target)
        loss = cross_entropy(logits, target)
        self.log("train/accuracy", self.accuracy(logits, target), on_step=True)
        self.seen.append((loss.item(), torch.rand(2).tolist(), self.accuracy.compute().item()))
        return loss

    def on_before_optimizer_step(self, optimizer):
        self.seen.append([p.grad.clone().sum().item() for p in self.parameters()])


def run(*callbacks):
    module = seeded(Shadow)
    trainer = fit(
        module,
        *callbacks,
        train=make_loader(80, 16, shuffle=True),
        val_dataloaders=make_loader(48, seed=5),
        max_epochs=4,
    )
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if "saflex" not in k}
    return state_of(module), module.seen, metrics, torch.get_rng_state(), trainer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "paper"},
        GRADIENT,
        {**GRADIENT, "engine": "finite_difference"},
        {"preset": "paper", "engine": "head", "every_n_steps": 2},
    ],
    ids=str,
)
def test_shadow_run_is_bit_identical_to_a_run_without_the_callback(settings):
    state, seen, metrics, rng, trainer = run()
    callback = SAflexCallback(make_loader(40, 8, seed=7), **settings)
    shadow_state, shadow_seen, shadow_metrics, shadow_rng, shadow_trainer = run(callback)
    assert_same_state(state, shadow_state)
    assert seen == shadow_seen
    assert metrics == shadow_metrics
    assert torch.equal(rng, shadow_rng)
    assert trainer.global_step == shadow_trainer.global_step == 20
    assert "saflex/solve_seconds" in shadow_trainer.callback_metrics


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_disabled_callback_is_bit_identical_to_none(settings):
    plain, disabled = seeded(Classifier), seeded(Classifier)
    fit(plain)
    trainer = fit(disabled, SAflexCallback(make_loader(seed=7), start_epoch=100, **settings))
    assert_same_state(state_of(plain), state_of(disabled))
    assert not any("saflex" in name for name in trainer.callback_metrics)


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_callback_changes_the_run_when_its_loss_is_used(settings):
    plain, refined = seeded(Classifier), seeded(Classifier)
    fit(plain)
    fit(refined, SAflexCallback(make_loader(seed=7), **settings))
    assert not torch.equal(plain.net[0].weight, refined.net[0].weight)
