"""Groups in a fit: what is told of them, which of them is trained on, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers.grouped import CLEAN_ROWS, NAMES, Grouped, grouped_loader, steering, union_batch
from helpers.training import (
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    make_net,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy

from saflex_lightning import SAflexCallback
from saflex_lightning.data import union_loader
from saflex_lightning.insight.summary import verdict

pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected more matched parameters than unknowns"  # the head engine on a tiny net
)
EPOCHS = 20  # of 6 steps


def wrong_labels_of(trainer):
    metrics = trainer.callback_metrics
    return {name: metrics[f"saflex/wrong_labels/{name}"].item() for name in NAMES[1:]}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_wrong_labels_of_each_group_is_estimated(share):
    def batch(inputs, target, index):
        made = union_batch(inputs, target, index)
        wrong = torch.cat([index, index]) % 8 < 8 * share
        right = torch.where(wrong, made.target, torch.cat([target, target]))
        return replace(made, target=torch.where(made.group == 2, right, made.target))

    callback = SAflexCallback(steering())
    train = grouped_loader(384, make_batch=batch)
    trainer = fit(seeded(Grouped), callback, train=train, max_epochs=5)
    found = wrong_labels_of(trainer)
    assert found["generate"] < 0.01
    most = 0.9  # that is told of any group
    assert found["mislabel"] == pytest.approx(min(share, most), abs=0.1 if share else 0.01)
    evidence = callback.read_group_evidence()
    assert evidence.names == NAMES
    assert evidence.wrong_labels[1:].tolist() == list(found.values())


def test_evidence_tells_the_harmful_group_from_the_helpful_one():
    callback = SAflexCallback(steering())
    fit(seeded(Grouped), callback, train=grouped_loader(shuffle=True), max_epochs=EPOCHS)
    evidence = callback.read_group_evidence()
    _, helpful, harmful = evidence.mean.tolist()
    assert harmful < 0 < helpful
    assert verdict(harmful, evidence.error[2].item(), steps=evidence.steps[2].item()) == "harms"


def test_the_default_trains_on_the_helpful_group_alone():
    module = seeded(Grouped)
    trainer = fit(
        module, SAflexCallback(steering()), train=grouped_loader(shuffle=True), max_epochs=EPOCHS
    )
    shares = torch.zeros(3)
    for batch, solution, _ in module.steps[-36:]:
        shares += torch.zeros(3).index_add(0, batch.group, solution.weights)
    assert shares[2] < 0.2 * shares[1]
    metrics = trainer.callback_metrics
    assert metrics["saflex/weight/mislabel"] < 0.3 < metrics["saflex/weight/generate"]


class Discarding(Grouped):
    """Throws the refined loss away."""

    def training_step(self, batch, batch_idx):
        logits = self.saflex_forward(batch.inputs)
        self.saflex_loss(logits, batch.target)
        self.steps.append(torch.rand(2).tolist())
        return cross_entropy(logits, batch.target)

    def on_train_epoch_end(self):
        self.trainer.should_stop = self.current_epoch == 3


def test_evidence_that_only_watches_touches_nothing():
    plain, watched = seeded(Discarding), seeded(Discarding)
    settings = {"max_epochs": 100, "min_epochs": 1}
    fit(plain, train=grouped_loader(shuffle=True), **settings)
    callback = SAflexCallback(steering())
    trainer = fit(watched, callback, train=grouped_loader(shuffle=True), **settings)
    assert trainer.global_step == len(plain.steps) == 24
    assert plain.steps == watched.steps
    assert_same_state(state_of(plain), state_of(watched))


@pytest.mark.parametrize(
    "settings", [{}, {"preset": "gradient", "row_evidence": True, "engine": "head"}], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(settings, tmp_path):
    def run(kind=Grouped, **kwargs):
        module = seeded(lambda: kind(plain=True))
        callback = SAflexCallback(steering(), seed=3, **settings)
        trainer = fit(module, callback, train=grouped_loader(), max_epochs=12, **kwargs)
        return module, trainer, callback.state_dict()

    class Interrupted(Grouped):
        def on_train_epoch_end(self):
            if self.current_epoch == 8:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, trainer, state = run()
    run(Interrupted)
    resumed, resumed_trainer, resumed_state = run(ckpt_path=tmp_path / "middle.ckpt")
    assert wrong_labels_of(trainer) == wrong_labels_of(resumed_trainer)
    assert_same_state(state_of(whole), state_of(resumed))
    assert_equal_trees(state["evidence"], resumed_state["evidence"])


def assert_equal_trees(first, second):
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for name in first:
            assert_equal_trees(first[name], second[name])
    elif isinstance(first, (tuple, list)):
        for one, other in zip(first, second, strict=True):
            assert_equal_trees(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.equal(second)
    else:
        assert first == second


class Mixing(Grouped):
    """Mixes inside the step: groups are told to the loss."""

    def training_step(self, batch, batch_idx):
        made = union_batch(*batch)
        logits = self.saflex_forward(made.inputs)
        loss = self.saflex_loss(logits, made.target, augmented=made.augmented, group=made.group)
        self.steps.append((made, self.saflex_solution, loss.item()))
        return loss


def plain_batches(**kwargs):
    return grouped_loader(make_batch=lambda *columns: columns, shuffle=True, **kwargs)


def test_groups_told_to_the_loss():
    module = seeded(Mixing)
    trainer = fit(module, SAflexCallback(steering()), train=plain_batches(), max_epochs=EPOCHS)
    found = wrong_labels_of(trainer)
    assert found["generate"] < 0.1 < 0.8 < found["mislabel"]
    shares = torch.zeros(3)
    for made, solution, _ in module.steps[-36:]:
        assert solution.weights[~made.augmented].eq(1).all()
        shares += torch.zeros(3).index_add(0, made.group, solution.weights)
    assert shares[2] < 0.2 * shares[1]


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 8), nn.Flatten()),
        lambda: nn.Sequential(make_net(), nn.Tanh()),
    ],
    ids=["convolution", "scaled scores"],
)
def test_no_last_layer_is_needed(net):
    module = seeded(Grouped)
    module.net = net()
    fit(module, SAflexCallback(steering()), train=grouped_loader(), max_epochs=2)
    _, solution, _ = module.steps[-1]
    assert solution.weights.std() > 0


def test_groups_without_names_have_numbers():
    module = seeded(Grouped)
    module.names = None
    trainer = fit(module, SAflexCallback(steering()), train=grouped_loader(), max_epochs=2)
    shown = {name for name in trainer.callback_metrics if "saflex/wrong_labels/" in name}
    assert shown == {"saflex/wrong_labels/group 1", "saflex/wrong_labels/group 2"}


def test_names_come_from_the_training_loader():
    rows = [(torch.rand(8), number % 4) for number in range(64)]
    module = seeded(Classifier)
    train = union_loader(rows, torch.neg, batch_size=16)
    trainer = fit(module, SAflexCallback(steering()), train=train, max_epochs=2)
    assert "saflex/wrong_labels/neg" in trainer.callback_metrics


def test_a_training_of_unknown_length_is_served():
    module = seeded(Grouped)
    fit(
        module,
        SAflexCallback(steering()),
        train=grouped_loader(),
        max_epochs=-1,
        max_time={"seconds": 2},
    )
    assert module.steps


def test_groups_of_rows_that_stand_alone_are_not_judged():
    """There are no clean rows to compare with; the share of wrong labels is estimated."""

    def alone(*columns):
        batch = union_batch(*columns)
        every = torch.ones_like(batch.augmented)
        return replace(batch, augmented=every, group=batch.group.clamp(min=1))

    callback = SAflexCallback(steering())
    train = grouped_loader(make_batch=alone)
    trainer = fit(seeded(Grouped), callback, train=train, max_epochs=EPOCHS)
    assert callback.read_group_evidence().steps.eq(0).all()
    found = wrong_labels_of(trainer)
    assert found["generate"] < 0.1 < 0.8 < found["mislabel"]


class TestRefusals:
    def fit(self, module=None, train=None, **kwargs):
        module = seeded(Grouped) if module is None else module
        callback = SAflexCallback(steering())
        train = grouped_loader() if train is None else train
        return fit(module, callback, train=train, **{"max_epochs": 2, **kwargs})

    def changed(self, **fields):
        def make_batch(*columns):
            batch = union_batch(*columns)
            return replace(batch, **{name: change(batch) for name, change in fields.items()})

        return grouped_loader(make_batch=make_batch)

    @pytest.mark.parametrize("names", [(), "clean", ("clean", "generate", "generate")])
    def test_names_that_name_nothing_or_a_group_twice(self, names):
        module = seeded(Grouped)
        module.names = names
        with pytest.raises(
            MisconfigurationException, match=r"`saflex_group_names\(\)` of the data"
        ):
            self.fit(module)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            (
                {"group": lambda batch: batch.group * 0},
                r"group of every augmented row to be in 1 to 2, .* but got 0 in row 16",
            ),
            ({"group": lambda batch: batch.group * 2}, r"in 1 to 2, .* but got 4 in row 17"),
        ],
        ids=["no group", "unknown group"],
    )
    def test_batches_that_do_not_tell_enough(self, fields, message):
        with pytest.raises(ValueError, match=message):
            self.fit(train=self.changed(**fields))

    def test_a_later_batch_of_a_group_that_is_none(self):
        def batch(*columns):
            made.append(union_batch(*columns))
            if len(made) == 3:
                made[-1].group[20] = -1
            return made[-1]

        made = []
        with pytest.raises(ValueError, match="group` to be at least 0, but got -1 in row 20"):
            self.fit(train=grouped_loader(make_batch=batch))

    def test_a_second_group_beside_that_of_the_batch(self):
        class Second(Grouped):
            def training_step(self, batch, batch_idx):
                logits = self.saflex_forward(batch.inputs)
                return self.saflex_loss(logits, batch.target, group=batch.group)

        with pytest.raises(ValueError, match="`group` to be None beside an `AugmentedBatch`"):
            self.fit(seeded(Second))

    def test_groups_of_another_length(self):
        class Short(Mixing):
            def training_step(self, batch, batch_idx):
                logits = self.saflex_forward(batch[0])
                return self.saflex_loss(logits, batch[1], group=batch[2][:3])

        with pytest.raises(ValueError, match=r"int64 tensor of shape \(16,\), but got .*\(3,\)"):
            self.fit(seeded(Short), train=plain_batches())

    def test_validation_rows_without_labels(self):
        class Unlabelled(Grouped):
            def saflex_val_batch(self, batch):
                return batch[0][:4], None

        with pytest.raises(MisconfigurationException, match="Pass preset='gradient'"):
            self.fit(seeded(Unlabelled))

    def test_a_checkpoint_of_other_groups(self, tmp_path):
        module = seeded(Grouped)
        trainer = self.fit(module, max_epochs=1)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        other = seeded(Grouped)
        other.names = ("clean", "Rotate", "Invert")
        with pytest.raises(MisconfigurationException, match=r"\['clean', 'generate', 'mislabel'\]"):
            self.fit(other, ckpt_path=tmp_path / "end.ckpt")


def test_groups_mean_nothing_without_evidence():
    module = seeded(Mixing)
    callback = SAflexCallback(make_loader(seed=7), preset="gradient")
    fit(module, callback, train=plain_batches())
    assert module.steps[-1][1].weights[:CLEAN_ROWS].eq(1).all()
