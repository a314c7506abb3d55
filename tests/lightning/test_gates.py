"""Gates in a fit: which rows are replaced, how they move, and what is refused."""

from dataclasses import astuple, replace

import pytest
import torch
from helpers.gated import CLEAN_ROWS, NAMES, Gated, gated_loader, steering, union_batch
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
from saflex_lightning.batch import replace_rows
from saflex_lightning.data import union_loader

pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected more matched parameters than unknowns"  # the head engine on a tiny net
)
EPOCHS = 20  # of 6 steps; the gates move from step 12 on


def gates_of(trainer):
    metrics = trainer.callback_metrics
    return {name: metrics[f"saflex/gate/{name}"].item() for name in NAMES[1:]}


GATES_ONLY = {"row_evidence": False}


@pytest.mark.parametrize(
    "settings",
    [
        GATES_ONLY,
        {"preset": "gradient", "gates": True},
        {"preset": "gradient", "gates": True, "engine": "head"},
        {"preset": "paper", "gates": True},
    ],
    ids=str,
)
def test_harmful_group_is_gated_and_helpful_one_is_kept(settings):
    module = seeded(Gated)
    callback = SAflexCallback(steering(), **settings)
    trainer = fit(module, callback, train=gated_loader(shuffle=True), max_epochs=EPOCHS)
    gates = gates_of(trainer)
    assert gates["mislabel"] < 0.5 < gates["generate"]
    # Every batch started with 8 rows of each group; the mask tells what was left of them.
    left = [torch.bincount(batch.group, minlength=3)[1:] for batch, _, _ in module.steps]
    assert torch.stack(left[:12]).eq(CLEAN_ROWS // 2).all()
    late = torch.stack(left[-36:]).float().mean(0)
    assert late[0] > 7
    assert late[1] < 4
    batch, _, _ = module.steps[-1]
    kept = batch.augmented.sum().item() / CLEAN_ROWS
    if settings.get("preset") != "paper":  # which drops further rows
        assert trainer.callback_metrics["saflex/kept_fraction"].item() == pytest.approx(kept)


def test_the_default_trains_on_the_helpful_group_alone():
    """Whether by its gate or by its rows' weights."""
    module = seeded(Gated)
    trainer = fit(
        module, SAflexCallback(steering()), train=gated_loader(shuffle=True), max_epochs=EPOCHS
    )
    shares = torch.zeros(3)
    for batch, solution, _ in module.steps[-36:]:
        shares += torch.zeros(3).index_add(0, batch.group, solution.weights)
    assert shares[2] < 0.2 * shares[1]
    metrics = trainer.callback_metrics
    assert metrics["saflex/weight/mislabel"] < 0.3 < metrics["saflex/weight/generate"]


def test_rejected_rows_are_clean_in_the_step_itself():
    module = seeded(lambda: Gated(plain=True))
    callback = SAflexCallback(steering(), **GATES_ONLY)
    fit(module, callback, train=gated_loader(shuffle=True), max_epochs=EPOCHS)
    assert any(batch.augmented.sum() < CLEAN_ROWS for batch, _, _ in module.steps)
    for batch, solution, _ in module.steps:
        clean = ~batch.augmented
        assert batch.group[clean].eq(0).all()
        assert batch.group[~clean].gt(0).all()
        assert solution.weights.eq(1).all()
        swapped = torch.arange(2 * CLEAN_ROWS)[clean][CLEAN_ROWS:]
        sources = swapped - CLEAN_ROWS
        assert batch.inputs[swapped].equal(batch.inputs[sources])
        assert batch.index[swapped].equal(batch.index[sources])
        assert batch.source[swapped].eq(-1).all()


def test_replaced_rows_are_their_source_in_every_input_and_in_new_tensors():
    inputs = torch.arange(24.0).view(12, 2)
    batch = {"x": inputs, "more": (inputs * 2, True, None)}
    places = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 8, 9, 4, 11])
    found = replace_rows(batch, places, 12)
    assert found["x"].equal(inputs[places])
    assert found["more"][0].equal(2 * inputs[places])
    assert found["more"][1:] == (True, None)
    assert inputs.equal(torch.arange(24.0).view(12, 2))
    assert replace_rows(batch, None, 12)["x"] is inputs, "no copy where every gate is open"


class Repeated:
    """A loader that yields the same tensors in every epoch."""

    def __init__(self):
        self.batches = list(gated_loader())

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def test_the_user_s_batch_is_never_written():
    """What the forward and the loss see is replaced; a loader may yield its tensors again."""

    class Watching(Gated):
        def forward(self, inputs):
            if torch.is_grad_enabled():
                self.scored = inputs
            return super().forward(inputs)

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            left = self.steps[-1][0]
            assert self.scored.equal(left.inputs)
            labels = self.saflex_solution.soft_labels.argmax(-1)[~left.augmented]
            assert labels.equal(left.target[~left.augmented])
            return loss

    train, fresh = Repeated(), Repeated()
    module = seeded(lambda: Watching(plain=True))
    callback = SAflexCallback(steering(), **GATES_ONLY)
    trainer = fit(module, callback, train=train, max_epochs=EPOCHS)
    assert gates_of(trainer)["mislabel"] < 0.5
    assert any(left.augmented.sum() < CLEAN_ROWS for left, _, _ in module.steps)
    for ours, theirs in zip(train.batches, fresh.batches, strict=True):
        assert all(map(torch.equal, astuple(ours), astuple(theirs)))


class Discarding(Gated):
    """Throws the refined loss away, and stops before the gates move."""

    def training_step(self, batch, batch_idx):
        logits = self.saflex_forward(batch.inputs)
        self.saflex_loss(logits, batch.target)
        self.steps.append(torch.rand(2).tolist())
        return cross_entropy(logits, batch.target)

    def on_train_epoch_end(self):
        self.trainer.should_stop = self.current_epoch == 3


def test_gates_that_watch_touch_nothing():
    plain, watched = seeded(Discarding), seeded(Discarding)
    settings = {"max_epochs": 100, "min_epochs": 1}
    fit(plain, train=gated_loader(shuffle=True), **settings)
    callback = SAflexCallback(steering())
    trainer = fit(watched, callback, train=gated_loader(shuffle=True), **settings)
    assert trainer.global_step == len(plain.steps) == 24
    assert plain.steps == watched.steps
    assert_same_state(state_of(plain), state_of(watched))


@pytest.mark.parametrize(
    "settings", [{}, GATES_ONLY, {"preset": "gradient", "gates": True, "engine": "head"}], ids=str
)
def test_a_resumed_run_equals_an_uninterrupted_one(settings, tmp_path):
    def run(kind=Gated, **kwargs):
        module = seeded(lambda: kind(plain=True))
        callback = SAflexCallback(steering(), seed=3, **settings)
        trainer = fit(module, callback, train=gated_loader(), max_epochs=12, **kwargs)
        return module, trainer, callback.state_dict()

    class Interrupted(Gated):
        def on_train_epoch_end(self):
            if self.current_epoch == 8:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, trainer, state = run()
    run(Interrupted)
    resumed, resumed_trainer, resumed_state = run(ckpt_path=tmp_path / "middle.ckpt")
    assert gates_of(trainer) == gates_of(resumed_trainer)
    assert settings == {} or gates_of(trainer)["mislabel"] < 1
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


class Mixing(Gated):
    """Mixes inside the step: groups are told to the loss, and there is no source to go back to."""

    def training_step(self, batch, batch_idx):
        made = union_batch(*batch)
        logits = self.saflex_forward(made.inputs)
        loss = self.saflex_loss(logits, made.target, augmented=made.augmented, group=made.group)
        self.steps.append((made, self.saflex_solution, loss.item()))
        return loss


def plain_batches(**kwargs):
    return gated_loader(make_batch=lambda *columns: columns, shuffle=True, **kwargs)


def test_rejected_rows_without_a_source_are_dropped():
    module = seeded(Mixing)
    callback = SAflexCallback(steering(), **GATES_ONLY)
    trainer = fit(module, callback, train=plain_batches(), max_epochs=EPOCHS)
    gates = gates_of(trainer)
    assert gates["mislabel"] < 0.5 < gates["generate"]
    dropped = torch.stack(
        [
            torch.bincount(made.group[solution.weights == 0], minlength=3)
            for made, solution, _ in module.steps
        ]
    )
    assert dropped[:12].eq(0).all()
    assert dropped[:, 0].eq(0).all()
    assert dropped[-36:, 2].float().mean() > 4
    made, solution, _ = module.steps[-1]
    left = (made.augmented & (solution.weights > 0)).sum().item()
    kept = trainer.callback_metrics["saflex/kept_fraction"].item()
    assert kept == pytest.approx(left / CLEAN_ROWS)


@pytest.mark.parametrize(
    "net",
    [
        lambda: nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 8), nn.Flatten()),
        lambda: nn.Sequential(make_net(), nn.Tanh()),
    ],
    ids=["convolution", "scaled scores"],
)
def test_no_last_layer_is_needed(net):
    module = seeded(Gated)
    module.net = net()
    fit(module, SAflexCallback(steering()), train=gated_loader(), max_epochs=2)
    _, solution, _ = module.steps[-1]
    assert solution.weights.std() > 0


def test_groups_without_names_have_numbers():
    module = seeded(Gated)
    module.names = None
    trainer = fit(module, SAflexCallback(steering()), train=gated_loader(), max_epochs=2)
    shown = {name for name in trainer.callback_metrics if name.startswith("saflex/gate/")}
    assert shown == {"saflex/gate/group 1", "saflex/gate/group 2"}


def test_names_come_from_the_training_loader():
    rows = [(torch.rand(8), number % 4) for number in range(64)]
    module = seeded(Classifier)
    train = union_loader(rows, torch.neg, batch_size=16)
    trainer = fit(module, SAflexCallback(steering()), train=train, max_epochs=2)
    assert "saflex/gate/neg" in trainer.callback_metrics


def test_a_training_of_unknown_length_is_served():
    module = seeded(Gated)
    fit(
        module,
        SAflexCallback(steering()),
        train=gated_loader(),
        max_epochs=-1,
        max_time={"seconds": 2},
    )
    assert module.steps


def test_rows_alone_have_no_gates():
    """There is nothing to turn them down for."""

    def alone(*columns):
        batch = union_batch(*columns)
        every = torch.ones_like(batch.augmented)
        group = batch.group.clamp(min=1)
        return replace(batch, augmented=every, group=group, source=batch.source * 0 - 1)

    module = seeded(Gated)
    trainer = fit(
        module,
        SAflexCallback(steering(), **GATES_ONLY),
        train=gated_loader(make_batch=alone, shuffle=True),
        max_epochs=EPOCHS,
    )
    assert gates_of(trainer) == {"generate": 1.0, "mislabel": 1.0}


class TestRefusals:
    def fit(self, module=None, train=None, **kwargs):
        module = seeded(Gated) if module is None else module
        callback = SAflexCallback(steering())
        train = gated_loader() if train is None else train
        return fit(module, callback, train=train, **{"max_epochs": 2, **kwargs})

    def changed(self, **fields):
        def make_batch(*columns):
            batch = union_batch(*columns)
            return replace(batch, **{name: change(batch) for name, change in fields.items()})

        return gated_loader(make_batch=make_batch)

    @pytest.mark.parametrize("names", [(), "clean", ("clean", "generate", "generate")])
    def test_names_that_name_nothing_or_a_group_twice(self, names):
        module = seeded(Gated)
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
            (
                {"source": lambda batch: batch.source.clamp(min=0) + CLEAN_ROWS},
                "source` to be a clean row of the batch, or -1, but got 16 in row 0",
            ),
            (
                {"inputs": lambda batch: [batch.inputs, torch.ones(3)]},
                r"tensors with 32 rows .* but got \(3,\)",
            ),
            ({"inputs": lambda batch: [batch.inputs, "text"]}, "but got str"),
        ],
        ids=["no group", "unknown group", "wrong source", "rows", "text"],
    )
    def test_batches_that_do_not_tell_enough(self, fields, message):
        with pytest.raises((MisconfigurationException, ValueError), match=message):
            self.fit(train=self.changed(**fields))

    def test_a_later_batch_whose_source_is_an_augmented_row(self):
        def batch(*columns):
            made.append(union_batch(*columns))
            if len(made) == 3:
                made[-1].source[20] = 20
            return made[-1]

        made = []
        with pytest.raises(
            ValueError, match="to be a clean row of the batch, or -1, but got 20 in"
        ):
            self.fit(train=gated_loader(make_batch=batch))

    def test_a_second_group_beside_that_of_the_batch(self):
        class Second(Gated):
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
        class Unlabelled(Gated):
            def saflex_val_batch(self, batch):
                return batch[0][:4], None

        with pytest.raises(MisconfigurationException, match="Pass preset='gradient'"):
            self.fit(seeded(Unlabelled))

    def test_a_checkpoint_of_other_groups(self, tmp_path):
        module = seeded(Gated)
        trainer = self.fit(module, max_epochs=1)
        trainer.save_checkpoint(tmp_path / "end.ckpt")
        other = seeded(Gated)
        other.names = ("clean", "Rotate", "Invert")
        with pytest.raises(MisconfigurationException, match=r"\['clean', 'generate', 'mislabel'\]"):
            self.fit(other, ckpt_path=tmp_path / "end.ckpt")

    def test_a_setting_that_is_not_a_choice(self):
        with pytest.raises(ValueError, match="`gates` to be True or False, but got 'maybe'"):
            SAflexCallback(gates="maybe")


def test_groups_mean_nothing_without_evidence():
    module = seeded(Mixing)
    callback = SAflexCallback(make_loader(seed=7), preset="gradient")
    fit(module, callback, train=plain_batches())
    assert module.steps[-1][1].weights[:CLEAN_ROWS].eq(1).all()
