"""What a fit with the callback does, step by step and from run to run."""

import csv

import lightning.pytorch as pl
import pytest
import torch
from helpers.adopted import Unedited
from helpers.grouped import grouped_loader
from helpers.interrupted import Batches
from helpers.training import (
    ENGINES,
    GRADIENT,
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    make_trainer,
    seeded,
    state_of,
)
from lightning.pytorch.loggers import CSVLogger

from saflex_lightning import SAflexCallback, SAflexWarning
from saflex_lightning.fit import report

METRICS = {
    "saflex/effective_fraction",
    "saflex/inner_product_rms",
    "saflex/skipped_steps",
    "saflex/solve_seconds",
}
LABELS = {"saflex/val_gradient_norm", "saflex/relabelled_fraction", "saflex/target_entropy"}
WAYS = {  # what each way logs beside these
    "robust": {"saflex/wrong_labels/group 1", "saflex/weight/group 1"},
    "gradient": LABELS,
    "paper": LABELS | {"saflex/kept_fraction"},
}


@pytest.mark.parametrize("settings", [{}, *ENGINES[1:]], ids=str)
def test_order_of_a_step(settings):
    events = []

    class Counting(SAflexCallback):
        def on_train_batch_start(self, *args):
            events.append("arm")
            super().on_train_batch_start(*args)

        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            events.append("disarm")

    class Watching(Classifier):
        def saflex_val_batch(self, batch):
            events.append("draw")
            return super().saflex_val_batch(batch)

        def saflex_scores(self, *inputs):
            where = "eval" if not self.training else "train"
            kind = where if torch.is_grad_enabled() else f"{where}, no graph"
            events.append(f"forward ({kind})")
            return super().saflex_scores(*inputs)

        def saflex_loss(self, *args, **kwargs):
            events.append("loss")
            return super().saflex_loss(*args, **kwargs)

    fit(
        seeded(Watching),
        Counting(make_loader(), refresh_every_n_steps=2, **settings),
        train=make_loader(48),
        max_epochs=1,
    )
    engine = settings.get("engine")
    extra = ["forward (train, no graph)"] if engine == "forward_mode" else []
    step = [*extra, "forward (train)", "loss", "disarm"]
    graph = "" if engine == "forward_mode" else ", no graph"
    refresh = ["draw", f"forward (eval{graph})"]
    find = ["forward (eval)"] if engine == "head" else []  # the layer that makes the scores
    first = [*refresh[:1], *find, *refresh[1:]]
    assert events == ["arm", *first, *step, "arm", *step, "arm", *refresh, *step]


@pytest.mark.parametrize("way", WAYS)
def test_schedule_counts_training_batches(way):
    active = []

    class Watching(Classifier):
        def training_step(self, batch, batch_idx):
            active.append((self.current_epoch, batch_idx, self._saflex_step is not None))
            return super().training_step(batch, batch_idx)

    fit(
        seeded(Watching),
        SAflexCallback(make_loader(), way, every_n_steps=3, start_epoch=1),
        max_epochs=3,
    )
    assert [entry for entry in active if entry[2]] == [(1, 2, True), (2, 1, True)]


@pytest.mark.parametrize("way", ["robust", "gradient"])
def test_skipped_steps_are_plain_cross_entropy(way):
    class Watching(Classifier):
        def training_step(self, batch, batch_idx):
            logits = self.saflex_forward(batch[0])
            loss = self.saflex_loss(logits, batch[1])
            plain = torch.nn.functional.cross_entropy(logits, batch[1])
            self.equal = [*getattr(self, "equal", []), loss.item() == plain.item()]
            return loss

    module = seeded(Watching)
    fit(module, SAflexCallback(make_loader(), way, every_n_steps=2), max_epochs=1)
    assert module.equal == [False, True, False, True]


@pytest.mark.parametrize(
    ("way", "shown"),
    [
        ("robust", {"saflex/effective_fraction"}),
        ("gradient", {"saflex/relabelled_fraction", "saflex/effective_fraction"}),
        (
            "paper",
            {
                "saflex/kept_fraction",
                "saflex/relabelled_fraction",
                "saflex/effective_fraction",
            },
        ),
    ],
)
def test_metrics_reach_the_logger_and_the_progress_bar(tmp_path, way, shown):
    """What a preset makes constant is in neither."""
    logger = CSVLogger(tmp_path)
    trainer = fit(
        seeded(Classifier),
        SAflexCallback(make_loader(), way),
        logger=logger,
        log_every_n_steps=1,
    )
    expected = METRICS | WAYS[way]
    assert {name for name in trainer.callback_metrics if "saflex" in name} == expected
    header = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().split("\n")[0]
    assert set(header.split(",")) >= expected
    assert {name for name in trainer.progress_bar_metrics if "saflex" in name} == shown


class LoggingEveryStep(pl.Callback):
    """Logs by other names what Lightning is told rarely, and compares the two after each epoch."""

    def __init__(self, callback):
        self.callback = callback

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        metrics = self.callback.read_metrics()
        is_refined = trainer.fit_loop.total_batch_idx % self.callback.settings.every_n_steps == 0
        assert bool(metrics) == is_refined
        for name, value in metrics.items():
            pl_module.log(f"mine/{name}", value, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer, pl_module):
        metrics = trainer.callback_metrics
        expected = METRICS | WAYS[self.callback.preset]
        assert metrics.keys() >= expected
        for name in expected:
            assert metrics[name].equal(metrics[name.replace("saflex/", "mine/")]), name


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("every_n_steps", [1, 3])
@pytest.mark.parametrize("log_every_n_steps", [0, 1, 5, 50])
@pytest.mark.parametrize("way", ["robust", "gradient"])
def test_what_nobody_reads_is_not_logged(
    tmp_path, way, log_every_n_steps, every_n_steps, accumulate
):
    class Counting(Classifier):
        calls = 0

        def log(self, name, *args, **kwargs):
            self.calls += name == "saflex/effective_fraction"
            super().log(name, *args, **kwargs)

    module = seeded(Counting)
    callback = SAflexCallback(make_loader(), way, every_n_steps=every_n_steps)
    fit(
        module,
        callback,
        LoggingEveryStep(callback),
        train=make_loader(176),  # eleven steps an epoch
        max_epochs=3,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=log_every_n_steps,
        accumulate_grad_batches=accumulate,
    )
    file = tmp_path / "lightning_logs" / "version_0" / "metrics.csv"
    rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    assert bool(rows) == (log_every_n_steps in {1, 5})
    for row in rows:
        for name in METRICS | WAYS[way]:
            assert row[name] == row[name.replace("saflex/", "mine/")], name
    if (every_n_steps, accumulate) == (1, 1):
        assert module.calls == {0: 3, 1: 33, 5: 6 + 3, 50: 3}[log_every_n_steps]


@pytest.mark.parametrize(("log_every_n_steps", "times"), [(1, 11), (5, 3), (50, 1)])
def test_what_nobody_reads_is_not_computed(monkeypatch, log_every_n_steps, times):
    computed = []
    metrics = report.solution_metrics
    monkeypatch.setattr(
        report, "solution_metrics", lambda *task: computed.append(task) or metrics(*task)
    )
    callback = SAflexCallback(make_loader())
    settings = {"train": make_loader(176), "max_epochs": 1, "log_every_n_steps": log_every_n_steps}
    fit(seeded(Classifier), callback, **settings)
    assert len(computed) == times
    callback.read_metrics()
    assert len(computed) == times  # of the last step, which was logged


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 7, "max_epochs": -1},
        {"max_steps": 9, "max_epochs": -1, "accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
        {"fast_dev_run": 2},
        {"overfit_batches": 2},
        {"train": Batches()},
    ],
    ids=["steps", "accumulated steps", "limit", "fast run", "overfit", "batches of unknown number"],
)
@pytest.mark.parametrize("way", ["robust", "gradient"])
@pytest.mark.filterwarnings("ignore:You requested to overfit")
def test_the_last_step_is_logged_wherever_the_training_ends(settings, way):
    callback = SAflexCallback(make_loader(), way)
    settings = {"train": make_loader(176), "max_epochs": 1, **settings}
    trainer = fit(seeded(Classifier), callback, **settings)
    for name, value in callback.read_metrics().items():
        assert trainer.callback_metrics[f"saflex/{name}"].equal(value), name
    assert trainer.callback_metrics.keys() >= METRICS | WAYS[way]


LEARNS = {
    way: f"SAFLEX learns {what} from a validation batch every 4 training batches. Algorithm 1 to "
    "the letter: SAflexCallback(preset='paper')."
    for way, what in {
        "robust": "weights of rows from evidence",
        "gradient": "sample weights and soft labels with engine 'head' over `net.4`",
    }.items()
}
UNIONS = (
    "SAFLEX refines every row, since no mask tells the augmented ones from clean ones; union "
    "batches of both measured better, and this makes them: "
    "saflex_lightning.data.union_loader(dataset, augment, transform)."
)


@pytest.mark.parametrize("way", LEARNS)
@pytest.mark.parametrize("make", [Classifier, Unedited])
@pytest.mark.parametrize(("train", "told"), [(make_loader, [UNIONS]), (grouped_loader, [])])
def test_fit_says_once_what_is_learned_and_what_measured_better(make, train, told, way, caplog):
    with caplog.at_level("INFO"):
        fit(seeded(make), SAflexCallback(make_loader(), way), train=train())
    said = [record.message for record in caplog.records if "SAFLEX" in record.message]
    assert said == [LEARNS[way], *told]


def test_same_seed_same_run_and_other_seed_other_rows():
    runs = []
    for seed in (None, None, 7):
        module = seeded(Classifier)
        fit(module, SAflexCallback(make_loader(), "paper", seed=seed))
        runs.append(state_of(module))
    assert_same_state(runs[0], runs[1])
    assert not torch.equal(runs[0]["net.0.weight"], runs[2]["net.0.weight"])


@pytest.mark.parametrize(("preset", "least"), [("robust", 0.8), ("gradient", 0.8), ("paper", 0.5)])
def test_refined_training_learns(preset, least):
    module = seeded(Classifier)
    trainer = fit(
        module,
        SAflexCallback(make_loader(128, seed=8), preset),
        train=make_loader(256, shuffle=True),
        val_dataloaders=make_loader(256, seed=9),
        max_epochs=8,
    )
    assert trainer.callback_metrics["val/accuracy"] > least


def test_two_callbacks_are_refused():
    with pytest.raises(RuntimeError, match="must be unique among all callbacks"):
        make_trainer(SAflexCallback(), SAflexCallback(preset="paper"))


@pytest.mark.parametrize("where", ["validation rows", "training scores"])
def test_non_finite_numbers_skip_the_solve_warn_once_and_poison_nothing(where):
    class Poisoned(Classifier):
        def saflex_val_batch(self, batch):
            inputs, target = super().saflex_val_batch(batch)
            if where == "validation rows" and self.global_step in {4, 8}:
                inputs = inputs * float("nan")
            return inputs, target

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            logits = self.saflex_forward(inputs)
            if where == "training scores" and self.global_step in {4, 8}:
                self._saflex_step.calls[0].jvp[0][0, 0] = float("inf")
            loss = self.saflex_loss(logits, target)
            self.log_of_weights = getattr(self, "log_of_weights", [])
            self.log_of_weights.append(self.saflex_solution.weights.clone())
            return loss

    module = seeded(Poisoned)
    callback = SAflexCallback(make_loader(64, 64), **GRADIENT)
    with pytest.warns(SAflexWarning, match="batch 0 of epoch 1") as caught:
        trainer = fit(module, callback, max_epochs=4)
    assert len([w for w in caught if w.category is SAflexWarning]) == 1
    plain = [step for step, w in enumerate(module.log_of_weights) if torch.equal(w, torch.ones(16))]
    assert plain == [4, 8]
    assert trainer.callback_metrics["saflex/skipped_steps"] == 2
    resumed = SAflexCallback(make_loader(64, 64), **GRADIENT)
    resumed.load_state_dict(callback.state_dict())
    assert resumed.state_dict()["skipped_steps"] == 2
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("where", ["validation rows", "training scores"])
def test_rows_with_non_finite_numbers_are_no_evidence_and_poison_nothing(where):
    class Poisoned(Classifier):
        weights = ()

        def saflex_val_batch(self, batch):
            inputs, target = super().saflex_val_batch(batch)
            if where == "validation rows" and self.global_step in {0, 8}:
                inputs = inputs.clone()
                inputs[:3] = float("nan")
            return inputs, target

        def training_step(self, batch, batch_idx):
            inputs, target = batch
            if where == "training scores" and self.global_step in {4, 8}:
                inputs = torch.cat([torch.full_like(inputs[:3], float("nan")), inputs[3:]])
            loss = self.saflex_loss(self.saflex_forward(inputs), target)
            self.weights += (self.saflex_solution.weights.clone(),)
            return loss if loss.isfinite() else None

    module = seeded(lambda: Poisoned(plain=True))
    callback = SAflexCallback(make_loader(64, 64))
    if where == "validation rows":
        trainer = fit(module, callback, max_epochs=4)
        present = callback.state_dict()["evidence"]["memory"]["rows"][:, -1]
        assert present.sum() == 64  # the newest three that were left out were seen before
    else:
        with pytest.warns(UserWarning, match="batch 0 of epoch 1") as caught:
            trainer = fit(module, callback, max_epochs=4)
        assert len([w for w in caught if w.category is SAflexWarning]) == 1
        for step in (4, 8):  # rows that can be judged still are
            assert module.weights[step][:3].equal(torch.ones(3))
            assert module.weights[step][3:].std() > 0
    skipped = 0 if where == "validation rows" else 2
    assert trainer.callback_metrics["saflex/skipped_steps"] == skipped
    assert all(weights.isfinite().all() for weights in module.weights)
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())


def test_first_gradients_non_finite_leave_plain_steps_until_a_finite_one():
    class Poisoned(Classifier):
        plain = ()

        def saflex_val_batch(self, batch):
            inputs, target = super().saflex_val_batch(batch)
            return (inputs * float("nan") if self.global_step < 4 else inputs), target

        def on_train_batch_end(self, *args):
            self.plain += (torch.equal(self.saflex_solution.weights, torch.ones(16)),)

    module = seeded(Poisoned)
    with pytest.warns(SAflexWarning, match="non-finite"):
        fit(module, SAflexCallback(make_loader(64, 64), **GRADIENT))
    assert module.plain == (True,) * 4 + (False,) * 4


@pytest.mark.parametrize("way", ["robust", "gradient"])
def test_gradient_accumulation_runs_and_refines_every_batch(way):
    module = seeded(Classifier)
    trainer = fit(module, SAflexCallback(make_loader(), way), accumulate_grad_batches=2)
    assert trainer.global_step == 4
    assert module.saflex_solution is not None


@pytest.mark.parametrize("way", ["robust", "gradient"])
def test_module_is_left_clean_after_the_fit(way):
    module = seeded(Classifier)
    trainer = fit(module, SAflexCallback(make_loader(), way))
    assert module._saflex_step is None
    assert module.training
    assert set(dict(module.named_buffers())) == set(dict(Classifier().named_buffers()))
    trainer.validate(module, make_loader(), verbose=False)
