"""Whatever fails in a step: parameters as they were, no process left, a checkpoint that serves."""

import gc
import multiprocessing
import os
import signal
import time
import traceback
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
import torch.utils.data
from helpers.interrupted import NAME, train, train_as, train_loader
from helpers.processes import exit_codes
from helpers.training import (
    ENGINES,
    EVERY_WAY,
    GRADIENT,
    Classifier,
    assert_same_state,
    make_loader,
    make_rows,
    seeded,
    state_of,
)
from helpers.training import (
    fit as fit_on,
)
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}")  # Lightning, where on_exception.ckpt may be there
    for said in (r"`\.fit\(ckpt_path=None\)` was called", r'\.fit\(ckpt_path="last"\) is set')
]
WORKER_ERRORS = (RuntimeError, OSError, EOFError)
LOADING = os.path.dirname(torch.utils.data.__file__)
BATCH = 8  # in the middle of the second epoch


class Planted(Exception):
    pass


def fit(module, *callbacks, **settings):
    """Train two epochs of six batches with a loader that goes on in the middle."""
    return fit_on(module, *callbacks, train=train_loader(), **settings)


@pytest.fixture(autouse=True)
def _signal_handlers():
    """Lightning ignores Ctrl-C once it was pressed."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Rows(TensorDataset):
    """Validation rows whose next access may do something."""

    on_access = staticmethod(lambda: None)

    def __getitem__(self, row):
        self.on_access()
        return super().__getitem__(row)


class Faulty(Classifier):
    """Does something at one stage of one batch, having noted its parameters before it."""

    def __init__(self, stage=None, action=None):
        super().__init__()
        # What a pass of the solve assigns to the module itself is taken back.
        self.notes = SimpleNamespace(stage=stage, action=action)

    def at(self, stage):
        is_here = stage == self.notes.stage and self.trainer.fit_loop.total_batch_idx == BATCH
        if is_here and self.notes.action is not None:
            action, self.notes.action = self.notes.action, None
            self.notes.before = self.before
            action()

    def on_before_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            self.before = state_of(self)
        return batch

    def saflex_val_batch(self, batch):
        self.at("validation batch")
        return super().saflex_val_batch(batch)

    def saflex_scores(self, *inputs):
        if not self.training:
            self.at("validation forward")
        else:
            self.at("forward" if torch.is_grad_enabled() else "probe")
        scores = super().saflex_scores(*inputs)
        if (
            torch.is_grad_enabled()
            and not self.training
            and self.notes.stage == "validation backward"
        ):
            scores.register_hook(lambda _: self.at("validation backward"))
        return scores

    def saflex_loss(self, *args, **kwargs):
        self.at("loss")
        return super().saflex_loss(*args, **kwargs)

    def on_before_backward(self, loss):
        self.at("backward")

    def on_before_optimizer_step(self, optimizer):
        self.at("optimizer step")


def fail_with(error):
    def fail(*_):
        raise error

    return fail


def interrupted_fit(module, callback, error, folder):
    expected = SystemExit if error is KeyboardInterrupt else error  # Lightning's way out
    with pytest.raises(expected):
        fit(module, callback, OnExceptionCheckpoint(folder, NAME), enable_checkpointing=True)


STAGES = [
    (way, stage)
    for way in EVERY_WAY
    for stage in (
        "draw",
        "validation batch",
        "validation forward",
        "validation backward",
        "probe",
        "forward",
        "loss",
        "backward",
        "optimizer step",
    )
    if way in ENGINES[:2] or stage not in {"probe", "validation backward"}  # others have neither
]


@pytest.mark.parametrize("error", [Planted, KeyboardInterrupt])
@pytest.mark.parametrize(("way", "stage"), STAGES, ids=str)
def test_failure_at_any_stage_leaves_the_parameters_and_a_checkpoint(tmp_path, way, stage, error):
    module = seeded(lambda: Faulty(stage, fail_with(error("own words"))))
    rows = Rows(*make_rows(32, seed=7))
    rows.on_access = lambda: module.at("draw")
    settings = {**way, "refresh_every_n_steps": 1}
    callback = SAflexCallback(DataLoader(rows, 8), **settings)
    interrupted_fit(module, callback, error, tmp_path)
    parameters = dict(module.named_parameters())
    for name, value in module.notes.before.items():
        if name in parameters or stage not in {"forward", "loss", "backward", "optimizer step"}:
            assert torch.equal(module.state_dict()[name], value), name
    assert all(part.training for part in module.modules() if part is not module.accuracy)
    assert module._saflex_step is None

    saved = torch.load(tmp_path / f"{NAME}.ckpt", weights_only=False)
    assert_same_state(state_of(module), saved["state_dict"])
    rows.on_access = lambda: None
    again = seeded(Faulty)
    trainer = fit(
        again,
        SAflexCallback(DataLoader(rows, 8), **settings),
        OnExceptionCheckpoint(tmp_path, NAME),
        ckpt_path=tmp_path / f"{NAME}.ckpt",
        enable_checkpointing=True,
    )
    assert trainer.current_epoch == 2
    assert all(value.isfinite().all() for value in state_of(again).values())


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        *((way, stage) for way in ENGINES[:2] for stage in ("probe", "validation forward")),
        ({}, "validation forward"),
    ],
    ids=str,
)
def test_checkpoint_that_a_signal_asks_for_in_the_solve_holds_the_weights(tmp_path, way, stage):
    """As SLURM's requeue signal does it."""
    module = seeded(lambda: Faulty(stage, lambda: os.kill(os.getpid(), signal.SIGUSR1)))

    class Requeue(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            signal.signal(
                signal.SIGUSR1, lambda *_: trainer.save_checkpoint(tmp_path / "requeue.ckpt")
            )

    callback = SAflexCallback(make_loader(32, 8), **way, refresh_every_n_steps=1)
    fit(module, callback, Requeue())
    saved = torch.load(tmp_path / "requeue.ckpt", weights_only=False)
    assert saved["global_step"] == BATCH
    assert_same_state(module.notes.before, saved["state_dict"])


@pytest.mark.parametrize(
    ("way", "stage"),
    [
        *((ENGINES[1], stage) for stage in ("validation forward", "probe", "forward")),
        *(({}, stage) for stage in ("validation forward", "forward")),
    ],
    ids=str,
)
def test_lack_of_memory_shows_as_it_is(way, stage):
    module = seeded(lambda: Faulty(stage, lambda: torch.empty(2**46)))
    callback = SAflexCallback(make_loader(32, 8), **way, refresh_every_n_steps=1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        fit(module, callback)


def children():
    """Processes that are left after the end; a worker that nobody ended would stay for good."""
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.02)
    return multiprocessing.active_children()


class Release(pl.Callback):
    """Lets a worker that stalls go on, once the fit has given it up."""

    def __init__(self, event):
        self.event = event

    def on_exception(self, trainer, pl_module, exception):
        self.event.set()


class Kill(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.fit_loop.total_batch_idx == BATCH:
            for process in multiprocessing.active_children():
                process.kill()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        # What torch says depends on who notices first that the worker is dead: the handler of its
        # signal, the loader's own look at its workers, or the read of a batch still on its way.
        ("killed", None),
        ("raising", "own words"),
        ("stalling", "timed out after 1 seconds"),
    ],
)
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_faulty_worker_ends_the_fit_in_its_own_words_and_leaves_no_process(fault, message):
    rows = Rows(*make_rows(64, seed=7))
    counter, is_over = multiprocessing.Value("i", 0), multiprocessing.Event()

    def access():
        counter.value += 1
        if counter.value == 50:
            if fault == "raising":
                raise RuntimeError("own words")
            if fault == "stalling":
                is_over.wait(60)

    rows.on_access = access
    # On a busy machine the first batch alone may take a second.
    timeout = 1 if fault == "stalling" else 60
    loader = DataLoader(rows, 8, num_workers=1, timeout=timeout, multiprocessing_context="fork")
    callback = SAflexCallback(loader, refresh_every_n_steps=1)
    module, left = seeded(Classifier), None
    others = [Release(is_over), *([Kill()] if fault == "killed" else [])]

    def watched_fit():
        nonlocal left
        try:
            fit(module, *others, callback, max_epochs=5)
        except WORKER_ERRORS:
            left = children()  # the error, which refers to the loader, is still alive
            raise

    with pytest.raises(WORKER_ERRORS, match=message) as caught:
        watched_fit()
    files = [frame.filename for frame in traceback.extract_tb(caught.tb)]
    assert any(file.startswith(LOADING) for file in files), files
    assert left == []
    assert all(value.isfinite().all() for value in state_of(module).values())
    # After a failed read torch opens files to see whether it still can. The handler of the dead
    # worker's signal may come between, and one stays open until it is collected: here, not later.
    del caught
    gc.collect()


@pytest.mark.parametrize(
    ("way", "val"),
    [
        ({}, "plain"),
        (GRADIENT, "plain"),
        (ENGINES[1], "plain"),
        pytest.param(GRADIENT, "workers", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ctrl_c_in_the_solve_ends_with_the_weights_of_the_last_step(tmp_path, way, val):
    settings = {"signal_at": 9, "sign": signal.SIGINT, "val": val, **way}
    assert exit_codes(train_as, 1, 1, tmp_path, settings) == [1]
    saved = torch.load(tmp_path / f"{NAME}.ckpt", weights_only=False)
    assert_same_state(train(val=val, stop_after=9, **way), saved["state_dict"])
