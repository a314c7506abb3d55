"""What the meter measures: blocks of refined and plain steps in turn, in a real fit."""

import logging
import time

import pytest
import torch
from helpers import golden
from helpers.training import (
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    seeded,
    state_of,
)
from torch.nn.functional import cross_entropy

from saflex_lightning import SAflexCallback
from saflex_lightning.fit.meter import Meter
from saflex_lightning.functional import Settings

REFRESH = 10
BATCHES = 8 * (REFRESH + 1)


class Paced(Classifier):
    """Sleeps, longer where a step is refined, and remembers what its steps were."""

    def __init__(self, plain_seconds=0.0, refined_seconds=0.0):
        super().__init__()
        self.seconds = {False: plain_seconds, True: refined_seconds}
        self.refined, self.equal_losses, self.metrics = [], [], []

    def training_step(self, batch, batch_idx):
        is_refined = self._saflex_step is not None
        logits = self.saflex_forward(batch[0])
        loss = self.saflex_loss(logits, batch[1])
        self.refined.append(is_refined)
        self.equal_losses.append(loss.equal(cross_entropy(logits, batch[1])))
        time.sleep(self.seconds[is_refined])
        return loss

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.metrics.append(self.trainer.callbacks[0].read_metrics())


def measure(module, steps=BATCHES + 1, **settings):
    settings = {"refresh_every_n_steps": REFRESH, "measure_overhead": True, **settings}
    saflex = SAflexCallback(make_loader(40, 8, seed=7), **settings)
    return fit(module, saflex, max_epochs=-1, max_steps=steps), saflex


def test_the_ratio_is_that_of_refined_to_plain_steps(caplog):
    module = seeded(lambda: Paced(0.004, 0.016))
    with caplog.at_level(logging.INFO):
        trainer, saflex = measure(module)
    ratio = saflex.read_metrics()["overhead_ratio"].item()
    assert 1.3 < ratio < 8
    assert trainer.callback_metrics["saflex/overhead_ratio"].item() == pytest.approx(ratio)
    told = [text for text in caplog.messages if "A training step takes" in text]
    assert len(told) == 1
    assert f"takes {100 * (ratio - 1):+.0f} % with SAFLEX" in told[0]


def test_blocks_take_turns_and_plain_ones_are_plain():
    module = seeded(Paced)
    measure(module, every_n_steps=1)
    block = [True] * (REFRESH + 1) + [False] * (REFRESH + 1)
    assert module.refined == 4 * block + [True]
    for is_refined, is_equal, metrics in zip(
        module.refined, module.equal_losses, module.metrics, strict=True
    ):
        assert bool(metrics) == is_refined
        assert is_equal or is_refined
    has_ratio = ["overhead_ratio" in metrics for metrics in module.metrics]
    assert has_ratio == [False] * BATCHES + [True]


@pytest.mark.parametrize(
    ("settings", "counted"),
    [
        ({}, 12),
        ({"refresh_every_n_steps": 1}, 10),
        ({"refresh_every_n_steps": 30}, 30),
        ({"every_n_steps": 3}, 12),  # a look at validation rows every sixth batch
    ],
    ids=str,
)
def test_blocks_count_whole_cycles(settings, counted):
    meter = Meter(Settings(**settings))
    assert (meter.counted, meter.batches) == (counted, 8 * (counted + 1))


def test_the_first_step_of_a_block_is_not_counted():
    clock = [0.0]
    meter = Meter(Settings(), lambda: clock[0])
    for number in range(meter.batches + 5):
        meter.begin(number, torch.device("cpu"))
        is_first = number % 13 == 0
        clock[0] += 1000 if is_first else 1 if meter.is_plain(number) else 1.5
        meter.end()
        clock[0] += 50  # between two steps, where data are loaded
    assert meter.refined == [18] * 4
    assert meter.plain == [12] * 4
    assert meter.ratio == 1.5


def test_a_short_fit_says_that_nothing_was_measured(caplog):
    with caplog.at_level(logging.INFO):
        _, saflex = measure(seeded(Paced), steps=4)
    assert "overhead_ratio" not in saflex.read_metrics()
    assert sum(f"the first {BATCHES} training batches" in text for text in caplog.messages) == 1


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_has_the_same_plain_steps(tmp_path, monkeypatch):
    monkeypatch.setitem(golden.CASES, "measured", {"measure_overhead": True})
    whole = golden.run("measured")
    assert any(not value.equal(whole[name]) for name, value in golden.run("robust").items())
    golden.run("measured", folder=tmp_path, steps=golden.STOP)
    assert_same_state(golden.run("measured", folder=tmp_path, resume=True), whole)


def test_the_state_holds_nothing_of_it():
    states = []
    for is_on in (False, True):
        saflex = callback(seed=0, measure_overhead=is_on)
        fit(seeded(Classifier), saflex)
        states.append(saflex.state_dict())
    off, on = states
    assert off.keys() == on.keys()
    assert {name for name in off["settings"] if off["settings"][name] != on["settings"][name]} == {
        "measure_overhead"
    }


def test_refined_steps_after_it_are_as_without():
    """It moves no draw: after its blocks a run goes on as one that was plain in them would."""
    module, other = seeded(Paced), seeded(Paced)
    measure(module, steps=REFRESH + 1)  # one block, refined
    measure(other, steps=REFRESH + 1, measure_overhead=False)
    assert_same_state(state_of(module), state_of(other))
