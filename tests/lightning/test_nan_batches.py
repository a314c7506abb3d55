"""Training batches with NaN: what they do to the step, and that the callback forgets them."""

from dataclasses import replace

import pytest
import torch
from helpers.grouped import Grouped, grouped_loader, steering
from helpers.training import EVERY_WAY, assert_same_state, fit, seeded, state_of
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from saflex_lightning import SAflexCallback, SAflexWarning

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")
    for said in (
        "Expected more matched parameters than unknowns",  # the head engine on a tiny net
        "`training_step` returned `None`",
    )
]
POISONED = (0, 7)  # of 18 batches: before anything was gathered, and later


class Careful(Grouped):
    """Meets batches with NaN, and takes no optimizer step on a loss that is not finite.

    Args:
        rows: Which rows of those batches hold NaN: "all", "clean" or "augmented".
        asks: Whether it asks for the loss of those batches at all.
    """

    def __init__(self, rows="all", *, asks=True):
        super().__init__(plain=True)
        self.rows, self.asks = rows, asks
        self.number = -1
        self.losses = []

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.training:
            return batch
        self.number += 1
        if self.number not in POISONED:
            return batch
        masks = {"all": batch.augmented >= 0, "clean": ~batch.augmented}
        holds = masks.get(self.rows, batch.augmented).unsqueeze(1)
        return replace(batch, inputs=batch.inputs.masked_fill(holds, torch.nan))

    def training_step(self, batch, batch_idx):
        if self.number in POISONED and not self.asks:
            return None
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.isfinite().item())
        return loss if loss.isfinite() else None


def run(module, **settings):
    callback = SAflexCallback(steering(), **settings)
    fit(module, callback, train=grouped_loader(shuffle=True), max_epochs=3)
    assert module.number == 17
    return callback.state_dict()


def leaves(state):
    """Everything a state holds, by its path."""
    if isinstance(state, (dict, tuple, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {(key, *path): leaf for key, part in items for path, leaf in leaves(part).items()}
    return {(): state}


def check_finite(state):
    for path, leaf in leaves(state).items():
        assert not isinstance(leaf, Tensor) or leaf.isfinite().all(), path


@pytest.mark.parametrize("settings", [{**way, "row_evidence": True} for way in EVERY_WAY], ids=str)
def test_batch_of_nan_leaves_what_a_batch_without_a_loss_leaves(settings):
    met, silent = seeded(Careful), seeded(lambda: Careful(asks=False))
    with pytest.warns(SAflexWarning, match="non-finite number in the solve at or before batch 0"):
        found = run(met, **settings)
    expected = run(silent, **settings)
    assert [number for number, finite in enumerate(met.losses) if not finite] == list(POISONED)
    assert (found.pop("skipped_steps"), expected.pop("skipped_steps")) == (len(POISONED), 0)
    found, expected = leaves(found), leaves(expected)
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        other = expected[path]
        assert leaf.equal(other) if isinstance(leaf, Tensor) else leaf == other, path
    check_finite(found)
    assert_same_state(state_of(met), state_of(silent))


@pytest.mark.parametrize(("rows", "skipped"), [("augmented", len(POISONED)), ("clean", 0)])
def test_rows_of_nan_are_no_evidence(rows, skipped):
    """The solve reads augmented rows alone, and is not skipped where others hold NaN."""
    module = seeded(lambda: Careful(rows))
    if skipped:
        with pytest.warns(SAflexWarning, match="non-finite number in the solve"):
            state = run(module)
    else:
        state = run(module)
    assert state["skipped_steps"] == skipped
    assert module.losses.count(False) == len(POISONED)
    check_finite(state)


def test_loss_scaling_lets_the_model_survive():
    class Scaled(Careful):
        training_step = Grouped.training_step

    module = seeded(Scaled)
    callback = SAflexCallback(steering())
    scaler = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**10))
    with pytest.warns(SAflexWarning, match="non-finite number in the solve"):
        fit(module, callback, train=grouped_loader(shuffle=True), max_epochs=3, plugins=scaler)
    assert callback.state_dict()["skipped_steps"] == len(POISONED)
    check_finite(callback.state_dict())
    assert all(value.isfinite().all() for value in state_of(module).values())
