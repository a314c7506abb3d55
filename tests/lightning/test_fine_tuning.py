"""Fine-tuning schedules: what is matched follows what is trainable."""

import lightning.pytorch as pl
import pytest
import torch
from helpers.training import (
    ENGINES,
    EVERY_WAY,
    GRADIENT,
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    make_trainer,
    seeded,
    state_of,
)
from lightning.pytorch.callbacks import BackboneFinetuning

from saflex_lightning import SAflexCallback

HEAD = ("net.2.weight", "net.2.bias")
ALL = ("net.0.weight", "net.0.bias", *HEAD)


class Matched(pl.Callback):
    """Note the parameters of the validation gradient after each training batch."""

    def __init__(self, saflex):
        self.saflex, self.names = saflex, []

    def on_train_batch_end(self, *args):
        self.names.append(self.saflex.state_dict()["matching"]["names"])


class Schedule(pl.Callback):
    """Make parameters trainable, by the first epoch of each phase; others are frozen."""

    def __init__(self, **phases):
        self.phases = {int(name.removeprefix("epoch_")): names for name, names in phases.items()}

    def on_train_epoch_start(self, trainer, module):
        for name, parameter in module.named_parameters():
            if trainer.current_epoch in self.phases:
                parameter.requires_grad_(name in self.phases[trainer.current_epoch])


@pytest.mark.parametrize("settings", ENGINES[:2], ids=str)
@pytest.mark.parametrize(("before", "after"), [(HEAD, ALL), (ALL, HEAD)], ids=["thaw", "freeze"])
def test_other_parameters_are_matched_from_the_next_refresh_on(settings, before, after):
    saflex = callback(**settings, refresh_every_n_steps=3)
    watch = Matched(saflex)
    schedule = Schedule(epoch_0=before, epoch_1=after)
    fit(seeded(lambda: Classifier(plain=True)), schedule, saflex, watch)
    # Four batches an epoch: gradients are due at batches 0, 3 and 6.
    assert watch.names == [before] * 6 + [after] * 2
    direction = saflex.state_dict()["gradient"]["direction"]
    assert [part.shape for part in direction] == [
        parameter.shape
        for name, parameter in Classifier(plain=True).named_parameters()
        if name in after
    ]
    assert all(part.any() for part in direction)


def test_a_frozen_bias_leaves_the_head_engine_its_weight():
    saflex = callback(**ENGINES[2], refresh_every_n_steps=3)
    watch = Matched(saflex)
    schedule = Schedule(epoch_0=ALL, epoch_1=ALL[:3])
    fit(seeded(lambda: Classifier(plain=True)), schedule, saflex, watch)
    assert watch.names == [HEAD] * 6 + [HEAD[:1]] * 2


def test_a_thawed_layer_starts_the_average_anew():
    """From the thaw on, the run is that of a callback which begins there."""

    class Recorded(Classifier):
        weights = ()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            if self.saflex_solution is not None:
                self.weights += (self.saflex_solution.weights,)
            return loss

    def run(*, start_epoch, first_phase):
        # With learning rate 0 both are at the same parameters; the same rows are drawn.
        module = seeded(lambda: Recorded(plain=True, lr=0.0, optimizer="sgd"))
        rows = make_loader(8, 8, seed=7)
        saflex = SAflexCallback(
            rows,
            preset="gradient",
            refresh_every_n_steps=4,
            start_epoch=start_epoch,
            seed=5,
            precondition=False,
        )
        schedule = Schedule(epoch_0=first_phase, epoch_1=ALL)
        fit(module, schedule, saflex, train=make_loader())
        return module.weights[-4:]

    followed = run(start_epoch=0, first_phase=HEAD)
    for weights, fresh in zip(followed, run(start_epoch=1, first_phase=ALL), strict=True):
        torch.testing.assert_close(weights, fresh)


@pytest.mark.parametrize("settings", ENGINES[:2], ids=str)
def test_backbone_fine_tuning_of_lightning(settings):
    class Tuned(Classifier):
        @property
        def backbone(self):
            return self.net[0]

        def configure_optimizers(self):
            return torch.optim.Adam(self.net[2].parameters(), self.lr)

    saflex = callback(**settings, refresh_every_n_steps=1)
    watch = Matched(saflex)
    tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    fit(seeded(lambda: Tuned(plain=True)), tuning, saflex, watch)
    assert watch.names == [HEAD] * 4 + [ALL] * 4


@pytest.mark.parametrize("settings", ENGINES[:2], ids=str)
def test_a_resumed_run_with_other_trainable_parameters_gives_up_the_saved_direction(
    settings, tmp_path
):
    file = tmp_path / "last.ckpt"
    trainer = fit(seeded(lambda: Classifier(plain=True)), callback(**settings), max_steps=2)
    trainer.save_checkpoint(file)
    module, saflex = seeded(lambda: Classifier(plain=True)), callback(**settings)
    module.net[0].requires_grad_(False)
    watch = Matched(saflex)
    fit(module, saflex, watch, ckpt_path=file)
    assert set(watch.names) == {HEAD}


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
def test_a_schedule_that_changes_nothing_changes_no_bit(settings):
    plain, scheduled = (seeded(lambda: Classifier(plain=True)) for _ in range(2))
    fit(plain, callback(**settings))
    fit(scheduled, Schedule(epoch_0=ALL, epoch_1=ALL), callback(**settings))
    assert_same_state(state_of(plain), state_of(scheduled))


def test_a_pattern_whose_parameters_are_frozen_is_an_error():
    saflex = callback(**GRADIENT, params=["net.0.*"])
    trainer = make_trainer(Schedule(epoch_1=HEAD), saflex)
    with pytest.raises(ValueError, match=r"'net\.0\.\*' matches none of"):
        trainer.fit(seeded(lambda: Classifier(plain=True)), make_loader())
