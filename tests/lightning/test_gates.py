"""Gates in a fit: which rows are replaced, how they move, and what is refused."""

from dataclasses import replace

import pytest
import torch
from helpers.gated import CLEAN_ROWS, NAMES, Gated, gated_loader, steering, union_batch
from helpers.training import (
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

from saflex_lightning import SAflexCallback, UnsupportedModelError
from saflex_lightning.batch import replace_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:Expected more matched parameters than unknowns"  # the head engine on a tiny net
)
EPOCHS = 20  # of 6 steps; the gates move from step 12 on


def gates_of(trainer):
    metrics = trainer.callback_metrics
    return {name: metrics[f"saflex/gate/{name}"].item() for name in NAMES[1:]}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"engine": "forward_mode"},
        {"engine": "head"},
        {"preset": "paper"},
        {"engine": "head", "weight_rule": "ones", "label_rule": "keep"},
    ],
    ids=str,
)
def test_harmful_group_is_gated_and_helpful_one_is_kept(settings):
    module = seeded(Gated)
    callback = SAflexCallback(steering(), gates=True, **settings)
    trainer = fit(module, callback, train=gated_loader(shuffle=True), max_epochs=EPOCHS)
    gates = gates_of(trainer)
    assert gates["mislabel"] < 0.5 < gates["generate"]
    # Every batch started with 8 rows of each group; the mask tells what was left of them.
    left = [torch.bincount(batch.group, minlength=3)[1:] for batch, _, _ in module.steps]
    assert torch.stack(left[:12]).eq(CLEAN_ROWS // 2).all()
    late = torch.stack(left[-36:]).float().mean(0)
    assert late[0] > 7
    assert late[1] < 4
    batch, solution, _ = module.steps[-1]
    kept = (solution.weights[batch.augmented] > 0).sum().item() / CLEAN_ROWS
    assert trainer.callback_metrics["saflex/kept_fraction"].item() == pytest.approx(kept)


def test_order_of_what_the_gates_see_and_do():
    """Rejected rows are clean in the step itself, and raised groups weigh more in the loss."""
    module = seeded(lambda: Gated(plain=True))
    callback = SAflexCallback(
        steering(), gates=True, engine="head", weight_rule="ones", label_rule="keep"
    )
    fit(module, callback, train=gated_loader(shuffle=True), max_epochs=EPOCHS)
    for batch, solution, _ in module.steps:
        clean = ~batch.augmented
        assert batch.group[clean].eq(0).all()
        assert batch.group[~clean].gt(0).all()
        assert solution.weights[clean].eq(1).all()
        total = solution.weights[~clean].sum().item()
        assert total == pytest.approx((~clean).sum().item(), rel=1e-5)
        swapped = torch.arange(2 * CLEAN_ROWS)[clean][CLEAN_ROWS:]
        sources = swapped - CLEAN_ROWS
        assert batch.inputs[swapped].equal(batch.inputs[sources])
        assert batch.index[swapped].equal(batch.index[sources])
        assert batch.source[swapped].eq(-1).all()
    both = [
        [solution.weights[batch.group == number].unique().item() for number in (1, 2)]
        for batch, solution, _ in module.steps[-60:]
        if len(batch.group.unique()) == 3
    ]
    assert len(both) > 5
    assert all(helpful > harmful for helpful, harmful in both)


def test_replaced_rows_are_their_source_in_every_input_and_in_new_tensors():
    inputs = torch.arange(24.0).view(12, 2)
    batch = {"x": inputs, "more": (inputs * 2, True, None)}
    places = torch.tensor([0, 1, 2, 3, 4, 5, 6, 1, 8, 9, 4, 11])
    found = replace_rows(batch, places)
    assert found["x"].equal(inputs[places])
    assert found["more"][0].equal(2 * inputs[places])
    assert found["more"][1:] == (True, None)
    assert inputs.equal(torch.arange(24.0).view(12, 2))


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
    callback = SAflexCallback(steering(), gates=True)
    trainer = fit(module, callback, train=train, max_epochs=EPOCHS)
    assert gates_of(trainer)["mislabel"] < 0.5
    assert any(left.augmented.sum() < CLEAN_ROWS for left, _, _ in module.steps)
    for ours, theirs in zip(train.batches, fresh.batches, strict=True):
        assert all(map(torch.equal, ours, theirs))


class Discarding(Gated):
    """Throws the refined loss away, and stops before the gates move."""

    def training_step(self, batch, batch_idx):
        logits = self.saflex_forward(batch.inputs)
        self.saflex_loss(logits, batch.target)
        self.steps.append(torch.rand(2).tolist())
        return cross_entropy(logits, batch.target)

    def on_train_epoch_end(self):
        self.trainer.should_stop = self.current_epoch == 3


@pytest.mark.parametrize("engine", ["finite_difference", "head"])
def test_gates_that_watch_touch_nothing(engine):
    plain, watched = seeded(Discarding), seeded(Discarding)
    settings = {"max_epochs": 100, "min_epochs": 1}
    fit(plain, train=gated_loader(shuffle=True), **settings)
    callback = SAflexCallback(steering(), gates=True, engine=engine)
    trainer = fit(watched, callback, train=gated_loader(shuffle=True), **settings)
    assert trainer.global_step == len(plain.steps) == 24
    assert gates_of(trainer) == {"generate": 1.0, "mislabel": 1.0}
    assert plain.steps == watched.steps
    assert_same_state(state_of(plain), state_of(watched))


@pytest.mark.parametrize("engine", ["finite_difference", "head"])
def test_resumed_gates_equal_uninterrupted_ones(engine, tmp_path):
    settings = {"gates": True, "engine": engine, "seed": 3}

    def run(**kwargs):
        module = seeded(lambda: Gated(plain=True))
        callback = SAflexCallback(steering(), **settings)
        trainer = fit(module, callback, train=gated_loader(), max_epochs=8, **kwargs)
        return module, trainer, callback.state_dict()

    class Interrupted(Gated):
        def on_train_epoch_end(self):
            if self.current_epoch == 4:
                self.trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole, trainer, state = run()
    seen = seeded(lambda: Interrupted(plain=True))
    fit(
        seen,
        SAflexCallback(steering(), **settings),
        train=gated_loader(),
        max_epochs=8,
    )
    resumed, resumed_trainer, resumed_state = run(ckpt_path=tmp_path / "middle.ckpt")
    assert gates_of(trainer) == gates_of(resumed_trainer) != {"generate": 1.0, "mislabel": 1.0}
    assert_same_state(state_of(whole), state_of(resumed))
    assert state["gates"]["log_weights"].equal(resumed_state["gates"]["log_weights"])
    assert state["memory"]["rows"].equal(resumed_state["memory"]["rows"])
    assert state["gates"]["moments"]["covariance"].equal(
        resumed_state["gates"]["moments"]["covariance"]
    )


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
    callback = SAflexCallback(steering(), gates=True, engine="head")
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
    assert solution.weights[made.augmented].sum().item() == pytest.approx(left, rel=1e-5)
    kept = trainer.callback_metrics["saflex/kept_fraction"].item()
    assert kept == pytest.approx(left / CLEAN_ROWS)


class TestRefusals:
    def fit(self, module=None, train=None, **kwargs):
        module = seeded(Gated) if module is None else module
        callback = SAflexCallback(steering(), gates=True, engine="finite_difference")
        train = gated_loader() if train is None else train
        return fit(module, callback, train=train, **{"max_epochs": 2, **kwargs})

    def changed(self, **fields):
        def make_batch(*columns):
            batch = union_batch(*columns)
            return replace(batch, **{name: change(batch) for name, change in fields.items()})

        return gated_loader(make_batch=make_batch)

    def test_a_model_without_a_linear_layer(self):
        module = seeded(Gated)
        module.net = nn.Sequential(nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 4, 8), nn.Flatten())
        message = r"Expected `gates=True` to see an `nn.Linear` called, but the scores used none\. "
        with pytest.raises(UnsupportedModelError, match=message):
            self.fit(module)
        assert not module.steps

    def test_a_model_whose_linear_layer_does_not_make_the_scores(self):
        module = seeded(Gated)
        module.net = nn.Sequential(make_net(), nn.Tanh())
        with pytest.raises(ValueError, match=r"to be the scores.*name the layer with `saflex_h"):
            self.fit(module)

    @pytest.mark.parametrize("names", [None, ("clean",), ("clean", "generate", "generate")])
    def test_groups_without_names(self, names):
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
                r"group of every augmented row to be in 1 to 2 .* but got 0 in row 16",
            ),
            ({"group": lambda batch: batch.group * 2}, r"in 1 to 2 .* but got 4 in row 17"),
            (
                {"source": lambda batch: torch.full_like(batch.source, -1)},
                "position of a clean row",
            ),
            ({"source": lambda batch: batch.source + CLEAN_ROWS}, "or an augmented one"),
            (
                {"augmented": lambda batch: batch.augmented | True},
                "clean rows beside the augmented ones",
            ),
            (
                {"inputs": lambda batch: [batch.inputs, torch.ones(3)]},
                r"tensors with 32 rows .* but got \(3,\)",
            ),
            ({"inputs": lambda batch: [batch.inputs, "text"]}, "but got str"),
        ],
        ids=["no group", "unknown group", "no source", "wrong source", "no clean", "rows", "text"],
    )
    def test_batches_that_do_not_tell_enough(self, fields, message):
        with pytest.raises(MisconfigurationException, match=message):
            self.fit(train=self.changed(**fields))

    def test_a_later_batch_whose_source_is_an_augmented_row(self):
        def batch(*columns):
            made.append(union_batch(*columns))
            if len(made) == 3:
                made[-1].source[20] = 20
            return made[-1]

        made = []
        with pytest.raises(MisconfigurationException, match="or an augmented one"):
            self.fit(train=gated_loader(make_batch=batch))

    def test_plain_batches_without_groups(self):
        with pytest.raises(MisconfigurationException, match="does not tell which group made its"):
            self.fit(train=plain_batches())

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

    def test_training_of_unknown_length(self):
        with pytest.raises(MisconfigurationException, match="length of training to be known"):
            self.fit(max_epochs=-1, max_time={"seconds": 30})

    def test_validation_rows_without_labels(self):
        class Unlabelled(Gated):
            def saflex_val_batch(self, batch):
                return batch[0][:4], None

        with pytest.raises(MisconfigurationException, match="validation batches with class labels"):
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


def test_groups_mean_nothing_without_gates():
    module = seeded(Mixing)
    fit(module, SAflexCallback(make_loader(seed=7)), train=plain_batches())
    assert module.steps[-1][1].weights[:CLEAN_ROWS].eq(1).all()
