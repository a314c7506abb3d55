"""One test for each row of the table "Compatibility" in docs/strategies.md."""

import importlib.util

import lightning.pytorch as pl
import pytest
import torch
from helpers.cases import OLD_CHECKPOINT
from helpers.models import Checkpointed
from helpers.training import (
    ENGINES,
    EVERY_WAY,
    GRADIENT,
    NUM_FEATURES,
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    make_trainer,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import LearningRateFinder, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import nn

from saflex_lightning import UnsupportedModelError

LIGHTNING_2_6 = importlib.util.find_spec("lightning.pytorch.callbacks.weight_averaging")
BOTH = pytest.mark.parametrize("way", [{}, GRADIENT], ids=str)


class Manual(Classifier):
    """Manual optimization that does by hand what the Trainer does of its own."""

    def __init__(self, *, accumulate=1, clip=None):
        super().__init__(plain=True)
        self.automatic_optimization = False
        self.accumulate, self.clip = accumulate, clip

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.manual_backward(loss / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer = self.optimizers()
            if self.clip:
                self.clip_gradients(optimizer, self.clip, "norm")
            optimizer.step()
            optimizer.zero_grad()


@BOTH
@pytest.mark.parametrize(
    ("by_hand", "by_trainer"),
    [
        pytest.param({}, {}, id="manual optimization"),
        pytest.param({"accumulate": 2}, {"accumulate_grad_batches": 2}, id="accumulation"),
        pytest.param({"clip": 0.05}, {"gradient_clip_val": 0.05}, id="clipping"),
    ],
)
def test_what_the_trainer_does_to_gradients_equals_the_same_by_hand(by_hand, by_trainer, way):
    automatic = seeded(lambda: Classifier(plain=True))
    fit(automatic, callback(**way), **by_trainer)
    manual = seeded(lambda: Manual(**by_hand))
    fit(manual, callback(**way))
    assert_same_state(state_of(automatic), state_of(manual))


class TwoOptimizers(Manual):
    """A body and a head with an Adam each."""

    def training_step(self, batch, batch_idx):
        self.manual_backward(Classifier.training_step(self, batch, batch_idx))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net[part].parameters(), self.lr) for part in (0, 2)]


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_second_moments_come_from_several_optimizers(way):
    one, two = seeded(lambda: Classifier(plain=True)), seeded(TwoOptimizers)
    fit(one, callback(**way))
    fit(two, callback(**way))
    assert_same_state(state_of(one), state_of(two))


class Watched(Classifier):
    """Notes the learning rate and the whole state after each step."""

    def __init__(self, refine=True):
        super().__init__()
        self.refine, self.rates, self.points = refine, [], []

    def training_step(self, batch, batch_idx):
        logits = (self.saflex_forward if self.refine else self)(batch[0])
        if self.refine:
            self.saflex_loss(logits, batch[1])
        return nn.functional.cross_entropy(logits, batch[1])

    def on_train_batch_end(self, *args):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        self.points.append(state_of(self))


class Scheduled(Watched):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def shadow_pair(kind, way, make_others=list, **settings):
    """Return a run with the callback that discards the refined loss, and one without either."""
    runs = []
    for refine in (True, False):
        module = seeded(lambda refine=refine: kind(refine))
        fit(module, *([callback(**way)] if refine else []), *make_others(), **settings)
        runs.append(module)
    return runs


@BOTH
def test_schedulers_step_as_without_the_callback(way):
    shadow, plain = shadow_pair(Scheduled, way)
    assert shadow.rates == plain.rates
    assert shadow.rates[-1] == pytest.approx(0.1 * 0.8**8)
    assert_same_state(state_of(shadow), state_of(plain))


@BOTH
@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging_ends_as_without_the_callback(way):
    shadow, plain = shadow_pair(
        Watched,
        way,
        lambda: [StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)],
        max_epochs=4,
    )
    *_, trained, _, _, _, averaged = shadow.points  # the last epoch renews the statistics alone
    assert not torch.equal(trained["net.0.weight"], averaged["net.0.weight"])
    assert_same_state(state_of(shadow), state_of(plain))


@BOTH
@pytest.mark.skipif(not LIGHTNING_2_6, reason="`WeightAveraging` is in lightning from 2.6 on")
def test_weight_averaging_averages_what_the_refined_run_went_through(way):
    from lightning.pytorch.callbacks import WeightAveraging

    class Refined(Watched):
        training_step = Classifier.training_step

    alone, averaged = seeded(Refined), seeded(Refined)
    fit(alone, callback(**way), val_dataloaders=make_loader(seed=9))
    fit(averaged, callback(**way), WeightAveraging(), val_dataloaders=make_loader(seed=9))
    for name, value in averaged.net.named_parameters():
        path = torch.stack([point[f"net.{name}"] for point in averaged.points])
        expected = torch.stack([point[f"net.{name}"] for point in alone.points])
        assert torch.equal(path, expected)  # averaging does not change the run
        torch.testing.assert_close(value, path.mean(0))  # and ends with its average


class WithCheckpointing(Classifier):
    def __init__(self, use_reentrant=None):
        super().__init__()
        self.net = Checkpointed(bool(use_reentrant))
        self.project = nn.Linear(NUM_FEATURES, 5)
        self.skip = use_reentrant is None

    def forward(self, inputs):
        hidden = self.project(inputs)
        if self.skip:
            return self.net.head(self.net.block(self.net.embed(hidden)))
        return self.net(hidden)


@pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns")
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_activation_checkpointing_changes_nothing(way):
    runs = []
    if way == ENGINES[1] and OLD_CHECKPOINT:
        pytest.skip("this torch checkpoints through a function without forward mode")
    for use_reentrant in (None, False):
        module = seeded(lambda use_reentrant=use_reentrant: WithCheckpointing(use_reentrant))
        fit(module, callback(**way))
        runs.append(state_of(module))
    assert_same_state(*runs)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@BOTH
def test_reentrant_checkpointing_is_left_alone_where_nothing_runs_in_forward_mode(way):
    runs = []
    for use_reentrant in (None, True):
        module = seeded(lambda use_reentrant=use_reentrant: WithCheckpointing(use_reentrant))
        fit(module, callback(**way))
        runs.append(state_of(module))
    assert_same_state(*runs)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_is_refused_before_the_first_step():
    module = seeded(lambda: WithCheckpointing(True))
    before = state_of(module)
    with pytest.raises(UnsupportedModelError, match=r"checkpoint(.|\n)*Pass engine='head'"):
        fit(module, callback(**ENGINES[1]))
    assert_same_state(before, state_of(module))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about itself
@pytest.mark.parametrize(
    ("what", "way"),
    [
        ("inner network", {}),
        ("inner network", ENGINES[0]),
        ("inner network", ENGINES[1]),
        ("inner network", GRADIENT),  # forward mode over the last layer: the numbers of `head`
        ("body", {}),
        ("body", ENGINES[2]),
        ("module", {}),
        ("module", ENGINES[0]),
    ],
    ids=str,
)
def test_compiled_training_equals_the_uncompiled_one(what, way):
    torch._dynamo.reset()
    plain, compiled = (seeded(lambda: Classifier(plain=True)) for _ in range(2))
    fit(plain, callback(**way))
    expected = state_of(plain)
    target = compiled
    if what == "inner network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
    elif what == "body":
        compiled.net[0] = torch.compile(compiled.net[0], backend="aot_eager")
    else:
        target = torch.compile(compiled, backend="aot_eager")
    fit(target, callback(**way))
    found = {name.replace("_orig_mod.", ""): v for name, v in state_of(compiled).items()}
    assert_same_state(expected, found)


@pytest.mark.parametrize("engine", ["auto", "forward_mode", "head"])
def test_other_engines_are_refused_in_a_module_compiled_as_a_whole(engine):
    module = torch.compile(seeded(Classifier), backend="eager")
    match = f"engine='{engine}', for which compiled code"
    with pytest.raises(MisconfigurationException, match=match):
        fit(module, callback(**GRADIENT, engine=engine))


@BOTH
def test_learning_rate_finder_runs_without_the_solve_and_leaves_the_fit_as_it_was(tmp_path, way):
    module = seeded(lambda: Classifier(plain=True))
    trainer = make_trainer(callback(**way), default_root_dir=tmp_path)
    found = Tuner(trainer).lr_find(module, make_loader(), num_training=4, update_attr=False)
    assert len(found.results["lr"]) == 4
    assert module.saflex_solution is None

    runs = []
    for finders in ([], [LearningRateFinder(num_training_steps=4, update_attr=False)]):
        module = seeded(lambda: Classifier(plain=True))
        train = make_loader()
        fit(module, *finders, callback(**way), train=train, default_root_dir=tmp_path)
        runs.append(state_of(module))
    if LIGHTNING_2_6:  # before, a search changed a fit without the callback as well
        assert_same_state(*runs)


@BOTH
def test_batch_size_finder_runs_without_the_solve(tmp_path, way):
    class Sized(Classifier):
        batch_size = 2

        def train_dataloader(self):
            return make_loader(64, self.batch_size)

        def val_dataloader(self):
            return make_loader(16, seed=9)

    module = seeded(Sized)
    trainer = make_trainer(callback(**way), default_root_dir=tmp_path)
    found = Tuner(trainer).scale_batch_size(module, max_trials=3, steps_per_trial=2)
    assert found == module.batch_size > 2
    assert module.saflex_solution is None
    pl.seed_everything(1, verbose=False)
    trainer.fit(module)
    assert "saflex/solve_seconds" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("settings", "batches"),
    [
        ({"fast_dev_run": True}, 1),
        ({"overfit_batches": 2}, 2),
        ({"limit_train_batches": 3}, 3),
        ({"reload_dataloaders_every_n_epochs": 1}, 4),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_settings_that_choose_batches(settings, batches):
    class Watched(Classifier):
        weights = ()

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.weights += ((self.current_epoch, self.saflex_solution.weights),)
            return loss

    module = seeded(Watched)
    rows = {"train": make_loader(), "val_dataloaders": make_loader(seed=9)}
    fit(module, callback(**GRADIENT), **rows, **settings)
    refined = [weights for epoch, weights in module.weights if epoch == 0]
    assert len(refined) == batches
    assert all(weights.std() > 0 for weights in refined)
    judging = callback()
    trainer = fit(seeded(Classifier), judging, **rows, **settings)
    seen = judging.state_dict()["evidence"]["seen"]
    assert seen.sum() == 16 * batches * trainer.current_epoch
