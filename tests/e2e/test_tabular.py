"""Tabular runs from the command line's configs: every set, every method, both networks."""

import lightning as L
import numpy as np
import pytest
import torch
from helpers.configs import CONFIGS, compose_config, groups_in_log
from helpers.tables import SHARED, make_table, write_csv, write_npz
from helpers.training import assert_same_state, state_of
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from saflex_lightning.cli.train import train
from saflex_lightning.recipes.tabular.facts import SETS

SHIPPED = ("arrhythmia", "qsar")
SHORT = (
    "trainer.accelerator=cpu",
    "trainer.max_epochs=2",
    "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
)
SMALL_SAINT = ("model.network.dim=2",)


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """Undo what ``seed_everything`` writes into the environment."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")


def run(tmp_path, *overrides):
    return train(compose_config(tmp_path, "experiment=tabular_mlp", *SHORT, *overrides))


@pytest.mark.parametrize(
    ("dataset", "method", "steps"),
    [
        ("qsar", "no_aug", 4),
        ("qsar", "upstream", 4),
        ("qsar", "saflex_paper", 4),
        ("qsar", "saflex_robust", 4),
        ("arrhythmia", "saflex_robust", 2),
    ],
)
def test_two_epochs_on_a_shipped_set(tmp_path, dataset, method, steps):
    result = run(tmp_path, f"data={dataset}", f"method={method}")
    assert result["steps"] == steps
    assert 0.0 <= result["test_auroc"] <= 1.0
    assert result["paper"]["cells"] == [{"column": dataset, "metric": "test_auroc"}]


@pytest.mark.parametrize(
    ("dataset", "metric"), [("qsar", "auroc"), ("letter", "accuracy"), ("volkert", "accuracy")]
)
def test_the_metric_is_that_of_the_set(tmp_path, dataset, metric):
    cfg = compose_config(tmp_path, "experiment=tabular_mlp", f"data={dataset}", "data.path=DIR")
    assert [cell.metric for cell in cfg.paper.cells] == [f"test_{metric}"]
    cfg = compose_config(tmp_path, "experiment=tabular_mlp", "data.dataset=null")
    assert [cell.metric for cell in cfg.paper.cells] == ["test_auroc"]


def test_the_perceptron_learns_qsar(tmp_path):
    settings = ("trainer.max_epochs=10", "model.lr=0.003", "method=saflex_robust")
    assert run(tmp_path, *settings)["test_auroc"] > 0.85


@pytest.mark.parametrize(
    "method",
    [
        *("uniform", "saflex_gradient", "train_plus_val", "small_loss", "saflex_robust"),
        pytest.param("label_smoothing", marks=pytest.mark.slow),
        pytest.param("learning_to_reweight", marks=pytest.mark.slow),
    ],
)
def test_other_methods_train_the_perceptron(tmp_path, method):
    limit = ["trainer.limit_val_batches=0"] if method == "train_plus_val" else []
    result = run(tmp_path, f"method={method}", "augmentation=tabular_cutmix_columns", *limit)
    assert 0.0 <= result["test_auroc"] <= 1.0
    if method == "saflex_robust":
        bins = ["cutmix_0_25", "cutmix_25_50", "cutmix_50_75", "cutmix_75_100"]
        assert sorted(groups_in_log(tmp_path)) == bins


def test_soft_augmentation_of_a_table_is_refused(tmp_path):
    message = r"`augmentation` to be one of .*'cutmix_columns', 'none'\], but got 'soft_crop'"
    with pytest.raises(InstantiationException, match=message):
        run(tmp_path, "method=soft_augmentation")


@pytest.mark.parametrize("engine", ["forward_mode", "head"])
@pytest.mark.parametrize("model", ["tabular_mlp", "saint"])
def test_other_engines_serve_both_networks(tmp_path, engine, model):
    small = SMALL_SAINT if model == "saint" else ("model.network.batch_norm=true",)
    settings = (
        f"model={model}",
        "method=saflex_gradient",
        f"callbacks.saflex.engine={engine}",
        *small,
        "data.batch_size=100",
    )
    result = run(tmp_path, *settings, "debug=fast")
    assert result["steps"] == 4
    assert result["effective_fraction"] < 1.0


def test_same_rows_with_and_without_saflex(tmp_path, monkeypatch):
    seen = {}

    def rows_of(method):
        cfg = compose_config(
            tmp_path, "experiment=tabular_mlp", *SHORT, "callbacks=none", f"method={method}"
        )
        data = instantiate(cfg.data)
        batches = seen.setdefault(method, [])
        hook = data.on_after_batch_transfer

        def keep(batch, dataloader_idx):
            if data.trainer.training:
                batches.append(torch.cat([batch[0].numeric, batch[1][:, None].float()], 1))
            return hook(batch, dataloader_idx)

        data.on_after_batch_transfer = keep
        callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
        trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False)
        trainer.fit(instantiate(cfg.model), datamodule=data)

    rows_of("uniform")
    torch.manual_seed(5)
    rows_of("saflex_robust")
    assert len(seen["uniform"]) == 4
    for one, other in zip(seen["uniform"], seen["saflex_robust"], strict=True):
        assert one.equal(other)


@pytest.mark.parametrize("dataset", SETS)
def test_a_set_and_its_networks_fit(tmp_path, dataset):
    cfg = compose_config(
        tmp_path, "experiment=tabular_saint", f"data={dataset}", "model.network.dim=2"
    )
    facts = SETS[dataset]
    assert cfg.data.dataset == dataset
    assert cfg.data.path == (None if dataset in SHIPPED else "data")
    instantiate(cfg.data)
    model = instantiate(cfg.model)
    sizes = {"num_numeric": facts.numeric, "cardinalities": [3] * facts.categorical}
    model.build({**sizes, "num_classes": facts.classes})
    levels = torch.full((3, facts.categorical), 2)
    assert model(torch.randn(3, facts.numeric), levels).shape == (3, facts.classes)


@pytest.mark.skipif(not (SHARED / "data" / "tabular").is_dir(), reason="needs the shared data")
@pytest.mark.parametrize("dataset", ["shrutime", "letter"])
def test_a_short_run_on_a_set_in_a_folder(tmp_path, dataset):
    folder = f"data.path={SHARED / 'data' / 'tabular'}"
    result = run(tmp_path, f"data={dataset}", folder, "debug=fast")
    assert result["steps"] == 4  # two of each epoch


def test_a_file_of_ones_own(tmp_path):
    path = write_csv(tmp_path / "mine.csv", make_table(200))
    result = run(
        tmp_path,
        *("data=tabular", "data.dataset=null", f"data.path={path}", "data.target=answer"),
        *("data.categorical=[colour,size]", "data.batch_size=50"),
    )
    assert result["steps"] == 4


def test_a_csv_of_a_set_whose_columns_are_the_users(tmp_path):
    """Click has no file of its own: 5 numeric and 7 categorical columns, as in Table 5."""
    facts, generator = SETS["click"], np.random.default_rng(0)
    target = generator.permutation(np.repeat([0, 1], facts.class_counts))
    columns = {f"n{k}": generator.normal(size=facts.rows).round(3) for k in range(5)}
    columns |= {f"c{k}": generator.integers(0, 2 + k, facts.rows) for k in range(7)}
    lines = np.column_stack([target, *columns.values()]).astype(str)
    file = tmp_path / "click.csv"
    np.savetxt(file, lines, "%s", ",", header=",".join(["click", *columns]), comments="")
    result = run(
        tmp_path,
        *("data=click", f"data.path={file}", "data.target=click", "debug=fast"),
        f"data.categorical=[{','.join(f'c{k}' for k in range(7))}]",
    )
    assert result["steps"] == 4
    assert result["paper"]["cells"] == [{"column": "click", "metric": "test_auroc"}]


def targets_that_steer(cfg):
    """Labels of every validation batch that steers a run."""
    seen = []
    model, data = instantiate(cfg.model), instantiate(cfg.data)
    read = model.saflex_val_batch

    def watch(batch):
        seen.append(batch[1])
        return read(batch)

    model.saflex_val_batch = watch
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
    instantiate(cfg.trainer, callbacks=callbacks, logger=False).fit(model, datamodule=data)
    return seen


def test_all_rows_steer_at_every_refresh(tmp_path):
    settings = ("callbacks.saflex.refresh_every_n_steps=2", "callbacks.saflex.val_batch_size=158")
    cfg = compose_config(tmp_path, "experiment=tabular_mlp", *SHORT, *settings)
    data = instantiate(cfg.data)
    data.setup("fit")
    counts = data.val_dataloader().dataset.target.bincount()
    seen = targets_that_steer(cfg)
    assert len(seen) == 2  # of 4 steps
    assert all(target.bincount().equal(counts) for target in seen)


def test_a_resumed_run_draws_the_steering_batches_of_an_uninterrupted_one(tmp_path):
    path = write_npz(tmp_path / "table.npz", make_table(400))
    settings = (
        *("experiment=tabular_mlp", "data=tabular", "data.dataset=null", f"data.path={path}"),
        *("data.batch_size=60", "model.network.dropout=0", *SHORT, "callbacks=none"),
        *("callbacks.saflex.refresh_every_n_steps=1", "callbacks.saflex.val_batch_size=10"),
    )

    def fit(max_epochs, checkpoint=None):
        cfg = compose_config(tmp_path, *settings, f"trainer.max_epochs={max_epochs}")
        L.seed_everything(3, verbose=False)
        model, data = instantiate(cfg.model), instantiate(cfg.data)
        callbacks = [instantiate(callback) for callback in cfg.callbacks.values()]
        trainer = instantiate(cfg.trainer, callbacks=callbacks, logger=False)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        return trainer, model

    _, whole = fit(2)
    trainer, half = fit(1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = fit(2, str(tmp_path / "half.ckpt"))
    assert not state_of(half)["network.head.weight"].equal(state_of(whole)["network.head.weight"])
    assert_same_state(state_of(whole), state_of(resumed))


def test_every_set_has_a_config():
    assert {file.stem for file in (CONFIGS / "data").glob("*.yaml")} >= {*SETS, "tabular"}
