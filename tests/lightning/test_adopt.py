"""Modules that nobody edited train as the edited ones do, or are refused in a sentence."""

import copy
import pickle

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.adopted import EditedWeighted, Unedited, UneditedWeighted
from helpers.grouped import NAMES, grouped_loader, steering
from helpers.training import (
    Classifier,
    assert_same_state,
    callback,
    fit,
    make_loader,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy

from saflex_lightning import SAflexCallback, UnsupportedModelError


def loss_of(function):
    class Other(Unedited):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            return function(self(inputs), target)

    return Other


def assert_same_runs(edited, unedited, make_callback, **settings):
    """Train both in the same way; they end in the same state, which plain training does not."""
    ends = []
    for make, callbacks in ((edited, [make_callback()]), (unedited, [make_callback()])):
        module = seeded(make)
        fit(module, *callbacks, **settings)
        ends.append(state_of(module))
    assert_same_state(*ends)
    plain = seeded(unedited)
    fit(plain, **settings)
    assert any(not torch.equal(value, ends[0][name]) for name, value in state_of(plain).items())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "paper"},
        {"every_n_steps": 3, "start_epoch": 1},
        {"preset": "gradient"},
        {"preset": "gradient", "engine": "forward_mode"},
        {"preset": "gradient", "engine": "finite_difference"},
        {"preset": "gradient", "params": ["net.0.*"]},
    ],
    ids=str,
)
def test_an_unedited_module_trains_as_the_edited_one(settings):
    assert_same_runs(
        Classifier, Unedited, lambda: callback(**settings), val_dataloaders=make_loader(seed=9)
    )


@pytest.mark.parametrize("engine", ["head", "forward_mode"])
def test_under_autocast_too(engine):
    assert_same_runs(
        Classifier,
        Unedited,
        lambda: callback(preset="gradient", engine=engine),
        precision="bf16-mixed",
    )


@pytest.mark.parametrize("preset", ["robust", "paper"])
def test_class_weights_and_label_smoothing_are_those_of_the_loss(preset):
    assert_same_runs(EditedWeighted, UneditedWeighted, lambda: callback(preset=preset))


class EditedGrouped(Classifier):
    def saflex_group_names(self):
        return NAMES


class UneditedGrouped(Unedited):
    saflex_group_names = EditedGrouped.saflex_group_names


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "paper"},
        {"preset": "gradient", "row_evidence": True},
        {"preset": "gradient", "engine": "forward_mode"},
    ],
    ids=str,
)
def test_augmented_rows_alone_are_refined_in_a_union_batch(settings):
    assert_same_runs(
        EditedGrouped,
        UneditedGrouped,
        lambda: SAflexCallback(steering(), **settings),
        train=grouped_loader(),
    )


class EditedRepeating(Classifier):
    """Its optimizer computes the loss of a batch several times."""

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), 0.1, max_iter=3)


class UneditedRepeating(Unedited):
    configure_optimizers = EditedRepeating.configure_optimizers


@pytest.mark.parametrize("engine", ["head", "forward_mode"])
def test_an_optimizer_that_computes_the_loss_several_times(engine):
    settings = {"preset": "gradient", "engine": engine, "precondition": False}
    assert_same_runs(EditedRepeating, UneditedRepeating, lambda: callback(**settings))


class EditedScaled(Classifier):
    def forward(self, inputs):
        return self.net(inputs) * 1.5


class UneditedScaled(Unedited):
    forward = EditedScaled.forward


def test_without_a_last_layer_the_default_engine_is_the_same_one():
    assert_same_runs(EditedScaled, UneditedScaled, lambda: callback(preset="gradient"))


class Manual:
    """Steps its optimizer itself."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


class EditedManual(Manual, Classifier):
    pass


class UneditedManual(Manual, Unedited):
    pass


@pytest.mark.parametrize("engine", ["head", "forward_mode"])
def test_manual_optimization(engine):
    assert_same_runs(
        EditedManual, UneditedManual, lambda: callback(preset="gradient", engine=engine)
    )


@pytest.mark.parametrize("kind", [Unedited, UneditedScaled])
def test_a_resumed_run_equals_the_uninterrupted_one(kind, tmp_path):
    file = tmp_path / "half.ckpt"
    whole, half, resumed = (seeded(lambda: kind(plain=True)) for _ in range(3))
    fit(whole, callback(), train=make_loader(), max_epochs=4)
    fit(half, callback(), train=make_loader(), max_epochs=2).save_checkpoint(file)
    assert_same_state(state_of(seeded(lambda: kind(plain=True))), state_of(resumed))
    fit(resumed, callback(), train=make_loader(), max_epochs=4, ckpt_path=file)
    assert_same_state(state_of(whole), state_of(resumed))


# What the module's own evaluation leaves behind


class Accumulating(Unedited):
    """Counts, appends and logs before its loss is computed, in both steps."""

    def __init__(self):
        super().__init__(lr=0.0, optimizer="sgd")
        self.train_accuracy = copy.deepcopy(self.accuracy)
        self.calls, self.seen, self.history = 0, [], torch.zeros(2)

    def score(self, batch, name, accuracy):
        inputs, target = batch
        logits = self(inputs)
        accuracy.update(logits, target)
        self.log(f"{name}/accuracy", accuracy, on_epoch=True, on_step=False)
        self.log_dict({f"{name}/mean": logits.mean()}, on_epoch=True, on_step=False)
        self.calls += 1
        self.seen.append(len(target))
        self.history += 1
        return F.cross_entropy(logits, target)

    def training_step(self, batch, batch_idx):
        return self.score(batch, "train", self.train_accuracy)

    def validation_step(self, batch, batch_idx):
        self.score(batch, "val", self.accuracy)


class WithoutValidationStep(Accumulating):
    validation_step = pl.LightningModule.validation_step


class WithoutValidationLoss(Accumulating):
    def validation_step(self, batch, batch_idx):
        self.accuracy.update(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy)
        self.calls += 1


class WithoutValidationGraph(Accumulating):
    """Its validation step switches gradients off, so that the training step is differentiated."""

    def validation_step(self, batch, batch_idx):
        with torch.no_grad():
            super().validation_step(batch, batch_idx)


KINDS = [Accumulating, WithoutValidationStep, WithoutValidationLoss, WithoutValidationGraph]


@pytest.mark.parametrize("engine", ["head", "forward_mode", "finite_difference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no")
def test_evaluation_and_extra_passes_leave_no_trace(kind, engine):
    runs = []
    for callbacks in ([], [callback(preset="gradient", engine=engine)]):
        module = seeded(kind)
        val = None if kind is WithoutValidationStep else make_loader(seed=9)
        trainer = fit(module, *callbacks, val_dataloaders=val)
        metrics = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if not name.startswith("saflex/")
        }
        runs.append((metrics, module.calls, module.seen, module.history.tolist()))
        assert bool(callbacks) == ("saflex/solve_seconds" in trainer.callback_metrics)
    assert runs[0] == runs[1]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_without_a_validation_loss_the_training_step_evaluates(kind):
    class Watching(kind):
        def training_step(self, batch, batch_idx):
            modes.append(self.training)
            return super().training_step(batch, batch_idx)

    modes = []
    fit(seeded(Watching), callback(), max_epochs=1)
    assert modes.count(False) >= 1
    assert modes.count(True) == 4


def test_the_module_is_as_before_after_each_step_and_after_a_failure():
    class Looking(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            assert "training_step" not in vars(pl_module)
            assert "log" not in vars(pl_module)

    class Failing(Unedited):
        def training_step(self, batch, batch_idx):
            if batch_idx == 2:
                raise KeyError("planted")
            return super().training_step(batch, batch_idx)

    module = seeded(Failing)
    with pytest.raises(KeyError, match="planted"):
        fit(module, callback(), Looking())
    assert "training_step" not in vars(module)


class Copied(Unedited):
    """One that pickle finds by its name."""


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
def test_a_copy_within_a_step_is_a_plain_module(hook, make_copy):
    copies = []
    copying = pl.Callback()
    setattr(copying, hook, lambda trainer, module, *args: copies.append(make_copy(module)))
    module = seeded(Copied)
    fit(module, callback(), copying, max_epochs=1)
    first, *_, last = copies
    assert last.training_step.__func__ is Copied.training_step
    assert last.training_step.__self__ is last
    trained = state_of(module)
    fit(last, callback(), max_epochs=1)
    assert_same_state(trained, state_of(module))
    plain = seeded(Copied)
    if hook == "on_train_batch_start":
        fit(first, callback(), max_epochs=1)
        fit(plain, callback(), max_epochs=1)
        assert_same_state(state_of(plain), state_of(first))


def test_a_training_step_that_the_instance_brought_is_given_back():
    module = seeded(Unedited)
    calls = []

    def own(batch, batch_idx):
        calls.append(batch_idx)
        return type(module).training_step(module, batch, batch_idx)

    module.training_step = own
    fit(module, callback(), max_epochs=1)
    assert module.training_step is own
    assert calls == [0, 1, 2, 3]


def test_a_step_without_an_index_and_one_behind_a_decorator():
    class Short(Unedited):
        def training_step(self, batch):
            return super().training_step(batch, 0)

        @torch.no_grad()
        def validation_step(self, batch, batch_idx, dataloader_idx):
            assert (batch_idx, dataloader_idx) == (0, 0)
            return super().validation_step(batch, batch_idx)

    assert_same_runs(Classifier, Short, callback)


@pytest.mark.parametrize(
    "loss",
    [
        cross_entropy,
        lambda z, y: cross_entropy(input=z, target=y),
        lambda z, y: nn.CrossEntropyLoss()(z.view(-1, z.shape[-1]), y.view(-1)),
        lambda z, y: F.cross_entropy(z, F.one_hot(y, z.shape[-1]).float()),
        lambda z, y: F.cross_entropy(z, y, None, None, -1),
    ],
)
def test_spellings_of_the_loss(loss):
    assert_same_runs(Classifier, loss_of(loss), callback)


def test_a_loss_without_a_gradient_is_only_measured():
    class Measuring(Unedited):
        def training_step(self, batch, batch_idx):
            with torch.no_grad():
                features = self.net[0](batch[0])
                losses = F.cross_entropy(features, batch[1], reduction="none")
                torch.testing.assert_close(F.cross_entropy(features, batch[1]), losses.mean())
            return super().training_step(batch, batch_idx)

    assert_same_runs(Classifier, Measuring, callback)


class EditedSkipping(Classifier):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


class UneditedSkipping(Unedited):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) if batch_idx % 2 else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_that_the_module_skips():
    assert_same_runs(EditedSkipping, UneditedSkipping, callback)


# What is refused


def one_logit(logits, target):
    return F.binary_cross_entropy_with_logits(logits[:, 0], (target > 1).float())


REFUSED = {
    "two losses": (
        lambda z, y: F.cross_entropy(z, y) + F.cross_entropy(z * 2, y),
        r"Expected one cross-entropy .*Derive the module from `SAflexMixin`",
    ),
    "a sum": (
        lambda z, y: F.cross_entropy(z, y, reduction="sum"),
        r"got reduction='sum'.*`SAflexMixin`",
    ),
    "per sample": (
        lambda z, y: F.cross_entropy(z, y, reduction="none").mean(),
        r"got reduction='none'.*`SAflexMixin`",
    ),
    "ignored class": (
        lambda z, y: F.cross_entropy(z, y, ignore_index=0),
        r"ignore_index=0\. Use the mean",
    ),
    "binary": (one_logit, r"Expected `training_step` .*give the model two logits"),
    "another loss": (
        lambda z, y: F.nll_loss(torch.log_softmax(z, -1), y),
        r"Expected `training_step` of Other .*none was seen.*Derive the module from `SAflexMixin`",
    ),
    "pixels": (
        lambda z, y: F.cross_entropy(z.unsqueeze(-1), y.unsqueeze(-1)),
        r"to be the scores, but they differ|Expected `logits` of shape",
    ),
}


def assert_refused(module, match, error=MisconfigurationException, make=callback, **settings):
    before = [parameter.clone() for parameter in module.parameters()]
    with pytest.raises(error, match=f"(?s){match}"):
        fit(module, make(), **settings)
    assert all(map(torch.equal, before, module.parameters()))
    assert "training_step" not in vars(module)


@pytest.mark.parametrize("name", REFUSED)
def test_losses_that_cannot_be_told_or_served(name):
    function, match = REFUSED[name]
    errors = (MisconfigurationException, UnsupportedModelError, ValueError)
    assert_refused(seeded(loss_of(function)), match, errors)


@pytest.mark.parametrize("engine", ["auto", "forward_mode"])
def test_a_module_without_any_cross_entropy_names_both_steps(engine):
    class Binary(loss_of(one_logit)):
        def validation_step(self, batch, batch_idx):
            one_logit(self(batch[0]), batch[1])

    match = r"Expected `validation_step` or `training_step` of Binary .*give the model two logits"
    assert_refused(seeded(Binary), match, make=lambda: callback(preset="gradient", engine=engine))


def test_rows_that_the_step_permutes_or_mixes():
    class Permuting(Unedited):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            order = torch.randperm(len(target))
            return F.cross_entropy(self(inputs[order]), target[order])

    match = r"rows of the `AugmentedBatch` in their order.*`SAflexMixin`"
    assert_refused(seeded(Permuting), match, train=grouped_loader())


def test_ignored_labels():
    class Ignoring(Unedited):
        def training_step(self, batch, batch_idx):
            target = torch.where(batch[1] == 0, -100, batch[1])
            return F.cross_entropy(self(batch[0]), target)

    assert_refused(seeded(Ignoring), "`ignore_index` is not supported", ValueError)


def test_a_module_compiled_as_a_whole():
    module = torch.compile(seeded(Unedited), backend="eager")
    with pytest.raises(MisconfigurationException, match="compiled code hides its loss"):
        fit(module, callback())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch, about itself
@pytest.mark.parametrize("how", ["body", "inner network", "in place"])
def test_compiled_parts_train_as_uncompiled_ones(how):
    torch._dynamo.reset()
    plain, compiled = (seeded(lambda: Unedited(plain=True)) for _ in range(2))
    engine = "head" if how == "body" else "forward_mode"
    fit(plain, callback(preset="gradient", engine=engine))
    if how == "body":
        compiled.net[0] = torch.compile(compiled.net[0], backend="aot_eager")
    elif how == "inner network":
        compiled.net = torch.compile(compiled.net, backend="aot_eager")
    else:
        compiled.net.compile(backend="aot_eager")
    fit(compiled, callback(preset="gradient", engine=engine))
    found = {name.replace("_orig_mod.", ""): v for name, v in state_of(compiled).items()}
    assert_same_state(state_of(plain), found)
