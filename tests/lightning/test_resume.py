"""A killed and resumed run equals the uninterrupted one, bit for bit; other states are refused."""

import copy
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers.folders import make_image_folders, make_pool
from helpers.grouped import Grouped, grouped_loader
from helpers.interrupted import train, train_as
from helpers.processes import exit_codes, run_in_processes
from helpers.training import (
    GRADIENT,
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    make_trainer,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from saflex_lightning import SAflexCallback, SAflexMixin, SAflexWarning
from saflex_lightning.recipes import GeneratedDataModule, MedMNISTDataModule
from saflex_lightning.recipes.medmnist import read_medmnist

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")


class Planted(Exception):
    pass


class Failing(pl.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Planted


class Linear(SAflexMixin, pl.LightningModule):
    def __init__(self, size, num_classes):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * size**2, num_classes))

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        return self.saflex_loss(self.saflex_forward(batch.inputs), batch.target)

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def write_images(path):
    """Write a MedMNIST file of 96 training images."""
    arrays = {}
    for split, (images, target) in read_medmnist().items():
        arrays[f"{split}_images"] = images[:96].permute(0, 2, 3, 1).numpy()
        arrays[f"{split}_labels"] = target[:96, None].numpy()
    np.savez(path, **arrays)
    return str(path)


def fit_images(module, data, *callbacks, ckpt_path=None):
    """Take eight steps; an epoch has three."""
    pl.seed_everything(1, verbose=False)
    trainer = make_trainer(
        SAflexCallback(),
        *callbacks,
        max_epochs=-1,
        max_steps=8,
        enable_checkpointing=bool(callbacks),
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)


def check_that_a_stopped_run_goes_on(folder, make_module, make_data):
    """Stop in the last step, resume from the middle of the second epoch, compare."""
    through, stopped, resumed = (seeded(make_module) for _ in range(3))
    fit_images(through, make_data())
    keeper = ModelCheckpoint(folder, "latest", every_n_train_steps=5)
    with pytest.raises(Planted):
        fit_images(stopped, make_data(), keeper, Failing(7))
    fit_images(resumed, make_data(), keeper, ckpt_path=folder / "latest.ckpt")
    assert_same_state(state_of(through), state_of(resumed))


def messages(caught):
    return [str(w.message) for w in caught if w.category is SAflexWarning]


@pytest.mark.parametrize(
    "settings",
    [
        {},  # a checkpoint between two refreshes of the gradient
        {"preset": "paper"},
        {"every": 6},  # at the end of an epoch
        GRADIENT,
        {**GRADIENT, "engine": "finite_difference"},
        {**GRADIENT, "engine": "forward_mode", "every": 6},
        {"every_n_steps": 3},
        {"accumulate": 2, "every": 3},
        {"val": "workers"},
        pytest.param({"num_workers": 2}, marks=pytest.mark.slow),
        {"val": "weighted"},
        {"val": "iterable"},
    ],
    ids=str,
)
def test_run_killed_in_the_solve_and_resumed_equals_the_uninterrupted_one(tmp_path, settings):
    codes = exit_codes(train_as, 1, 1, tmp_path, {"every": 5, "signal_at": 14, **settings})
    assert codes == [-signal.SIGKILL]
    resumed = train(tmp_path, resume=True, **{"every": 5, **settings})
    assert_same_state(train(**settings), resumed)


@pytest.mark.xfail(
    raises=AssertionError,
    reason="lightning 2.6.6 resumes from the last batch of an epoch without counting the next "
    "one as begun, and starts that epoch again when a later checkpoint in it is resumed",
)
def test_run_resumed_at_the_end_of_an_epoch_and_once_more_in_the_next_one(tmp_path):
    for interruption in ({"signal_at": 7}, {"signal_at": 10, "resume": True}):
        assert exit_codes(train_as, 1, 1, tmp_path, {"every": 3, **interruption}) == [
            -signal.SIGKILL
        ]
    assert_same_state(train(), train(tmp_path, resume=True, every=3))


def test_run_ended_by_sigterm_saves_between_two_steps_and_resumes_exactly(tmp_path):
    settings = {"sign": signal.SIGTERM, "preset": "paper"}
    codes = exit_codes(train_as, 1, 1, tmp_path, {"signal_at": 9, **settings})
    assert codes == [0]  # Lightning's SIGTERMException is a SystemExit
    assert_same_state(train(preset="paper"), train(tmp_path, resume=True, **settings))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_medmnist_run_goes_on_in_the_middle_of_an_epoch(tmp_path, num_workers):
    path = write_images(tmp_path / "images.npz")
    check_that_a_stopped_run_goes_on(
        tmp_path,
        lambda: Linear(28, 8),
        lambda: MedMNISTDataModule(path=path, batch_size=32, num_workers=num_workers),
    )


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_run_on_a_generated_pool_goes_on_in_the_middle_of_an_epoch(tmp_path, num_workers):
    make_image_folders(tmp_path / "real")
    make_pool(tmp_path / "pool")
    check_that_a_stopped_run_goes_on(
        tmp_path,
        lambda: Linear(8, 3),
        lambda: GeneratedDataModule(
            *(str(tmp_path / "real"), str(tmp_path / "pool")),
            image_size=None,
            batch_size=4,
            per_class="real",
            generated_per_real=0.5,
            redraw=True,
            num_workers=num_workers,
        ),
    )


@pytest.mark.distributed
def test_two_processes_killed_and_resumed_equal_the_uninterrupted_ones(tmp_path):
    settings = {"every": 5, "preset": "paper", "engine": "finite_difference"}
    through = run_in_processes(train_as, 2, 2, None, settings)
    codes = exit_codes(train_as, 2, 2, tmp_path, {"signal_at": 14, **settings})
    assert codes == [1, -signal.SIGKILL]  # the other rank says that its peer is gone
    resumed = run_in_processes(train_as, 2, 2, tmp_path, {"resume": True, **settings})
    for rank in range(2):
        assert_same_state(through[0], resumed[rank])
        assert_same_state(through[0], through[rank])


def saved_state(**settings):
    """The state of a callback after three batches."""
    callback = SAflexCallback(make_loader(40, 8, seed=7), **settings)
    fit(seeded(Classifier), callback, max_epochs=1, limit_train_batches=3)
    return callback.state_dict()


@pytest.mark.parametrize(
    ("settings", "draws"), [({"preset": "paper", "params": ["net.*"]}, 3), ({}, 1), (GRADIENT, 1)]
)
def test_state_holds_what_torch_loads_without_running_code(tmp_path, settings, draws):
    state = saved_state(**settings)
    torch.save(state, tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)
    assert (loaded["batches"], loaded["draws"]) == (3, draws)
    SAflexCallback(make_loader(40, 8), **settings).load_state_dict(loaded)


def test_other_settings_warn_by_name():
    state = saved_state(**GRADIENT, temperature=1.5, seed=5)
    callback = SAflexCallback(make_loader(40, 16), **GRADIENT, temperature=3.0, params=["net.3.*"])
    with pytest.warns(SAflexWarning) as caught:
        callback.load_state_dict(state)
    assert messages(caught) == [
        "Expected the settings that the checkpoint was written with, but `params` was None and is "
        "now ['net.3.*'], `seed` was 5 and is now None, `temperature` was 1.5 and is now 3.0, "
        "`val_batch_size` was 8 and is now 16. The run goes on with those of now and will not "
        "equal an uninterrupted one."
    ]
    resumed = callback.state_dict()
    assert (resumed["seed"], resumed["batch_size"], resumed["batches"]) == (None, None, 3)
    assert resumed["gradient"]["average"] is None  # it was that of other parameters
    assert resumed["matching"]["engine"] == ""


@pytest.mark.parametrize("way", [{}, GRADIENT], ids=str)
def test_equal_settings_do_not_warn(way):
    SAflexCallback(make_loader(40, 8), **way, seed=5).load_state_dict(saved_state(**way, seed=5))


@pytest.mark.parametrize(
    ("before", "now", "said", "engine", "seen"),
    [
        ("robust", "paper", "`engine` was 'auto' and is now 'forward_mode'", "forward_mode", 0),
        ("gradient", "robust", "`row_evidence` was False and is now True", "head", 4 * 16),
        ("robust", "gradient", "`label_rule` was 'keep' and is now 'auto'", "head", 0),
    ],
)
def test_run_with_another_preset_goes_on_and_says_what_differs(
    tmp_path, before, now, said, engine, seen
):
    first = SAflexCallback(make_loader(40, 8), before)
    trainer = fit(seeded(Classifier), first, max_epochs=1, limit_train_batches=3)
    trainer.save_checkpoint(tmp_path / "before.ckpt")
    callback = SAflexCallback(make_loader(40, 8), now)
    with pytest.warns(SAflexWarning, match=said):
        fit(seeded(Classifier), callback, ckpt_path=tmp_path / "before.ckpt", max_epochs=2)
    state = callback.state_dict()
    assert state["batches"] == 3 + 4
    assert state["matching"]["engine"] == engine
    assert seen == (0 if state["evidence"] is None else state["evidence"]["seen"].sum())


def test_checkpoint_without_a_state_starts_afresh(tmp_path):
    trainer = fit(seeded(Classifier), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    callback = SAflexCallback(make_loader(40, 8))
    fit(seeded(Classifier), callback, ckpt_path=tmp_path / "plain.ckpt", max_epochs=2)
    assert callback.state_dict()["batches"] == 4


@pytest.mark.parametrize(
    ("engine", "found", "matched"),
    [
        ("auto", "head", ("net.4.weight", "net.4.bias")),
        ("forward_mode", "forward_mode", tuple(n for n, _ in Classifier().named_parameters())),
    ],
)
def test_the_engine_that_was_chosen_is_in_the_checkpoint(engine, found, matched):
    state = saved_state(**GRADIENT, engine=engine)
    assert (state["matching"]["engine"], state["matching"]["names"]) == (found, matched)
    assert state["settings"]["engine"] == engine


def without(key):
    return lambda state: state.pop(key)


def with_value(value, *keys):
    def change(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: state.clear(), "version 8, but the checkpoint holds version None"),
        (with_value(99, "version"), "version 8, but the checkpoint holds version 99"),
        (without("draws"), "`draws` is missing"),
        (without("looked"), "`looked` is missing"),
        (with_value("4", "batches"), "`batches` is a str, not a number"),
        (with_value([], "gradient"), "`gradient` is a sequence, not a dict"),
        (with_value(None, "gradient", "norm"), r"of `gradient` only \['norm'\] are None"),
        (with_value((1, 2), "gradient", "average"), "`gradient.average` holds something else"),
        (lambda state: state["gradient"].pop("started"), "`gradient.started` is missing"),
    ],
)
def test_damaged_state_is_refused_by_name(damage, message):
    state = saved_state(**GRADIENT)
    damage(state)
    with pytest.raises(MisconfigurationException, match=message):
        SAflexCallback(make_loader(40, 8), **GRADIENT).load_state_dict(state)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("evidence"), "`evidence` is missing"),
        (with_value([], "evidence"), "`evidence` is a sequence, not a dict"),
        (lambda state: state["evidence"].pop("is_alone"), "`evidence.is_alone` is missing"),
        (with_value((), "evidence", "seen"), "`evidence.seen` is a sequence, not a float tensor"),
        (with_value("4", "evidence", "memory", "added"), "`evidence.memory.added` is a str, not"),
        (lambda state: state["evidence"]["rule"].pop("offsets"), "`evidence.rule.offsets` is miss"),
        (with_value(1, "evidence", "groups"), "`evidence.groups` is a number, not a dict"),
    ],
)
def test_damaged_evidence_is_refused_by_name(damage, message):
    state = saved_state()
    damage(state)
    with pytest.raises(MisconfigurationException, match=message):
        SAflexCallback(make_loader(40, 8)).load_state_dict(state)


def paths_of(state, prefix=()):
    """Every place of a nested dictionary, inner ones too."""
    for key, value in state.items():
        yield (*prefix, key)
        if isinstance(value, dict) and key != "settings":
            yield from paths_of(value, (*prefix, key))


def test_damage_anywhere_is_refused_and_leaves_the_callback_as_it_was():
    callback = SAflexCallback(make_loader(40, 8, seed=7))
    fit(seeded(lambda: Grouped(plain=True)), callback, train=grouped_loader(), max_epochs=1)
    state = callback.state_dict()
    places = list(paths_of(state))
    assert len(places) > 25
    for place in places:
        for damage in ("gone", object(), [object()]):
            damaged = copy.deepcopy(state)
            part = damaged
            for key in place[:-1]:
                part = part[key]
            part.pop(place[-1])
            if damage != "gone":
                part[place[-1]] = damage
            fresh = SAflexCallback(make_loader(40, 8, seed=7))
            before = repr(fresh.state_dict())
            with pytest.raises(MisconfigurationException, match=r"Expected .*checkpoint"):
                fresh.load_state_dict(damaged)
            assert repr(fresh.state_dict()) == before, (place, damage)


def test_gradient_of_other_shapes_is_refused_by_name_before_a_step(tmp_path):
    callback = SAflexCallback(make_loader(40, 8), preset="gradient", engine="forward_mode")
    trainer = fit(seeded(Classifier), callback, max_epochs=1, limit_train_batches=3)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    checkpoint = torch.load(tmp_path / "whole.ckpt", weights_only=False)
    gradient = checkpoint["callbacks"][callback.state_key]["gradient"]
    gradient["average"] = (torch.zeros(3, 3), *gradient["average"][1:])
    gradient["direction"] = gradient["direction"][:2]
    torch.save(checkpoint, tmp_path / "damaged.ckpt")
    module = seeded(Classifier)
    with pytest.raises(MisconfigurationException) as caught:
        fit(module, callback, ckpt_path=tmp_path / "damaged.ckpt")
    assert str(caught.value) == (
        "Expected the saved validation gradient to fit the parameters of the module, but `average` "
        "has shape (3, 3) for `net.0.weight`, which has (16, 8), `direction` has 2 parts for 6 "
        "parameters. Resume with the module that wrote the checkpoint."
    )
