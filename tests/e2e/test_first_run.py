"""What ``saflex-train`` says and leaves: help, progress, weights, its rivals and where they are."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from helpers.configs import compose_config
from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig

import saflex_lightning
from saflex_lightning import SAflexCallback, SAflexInsight
from saflex_lightning.cli import watch
from saflex_lightning.cli.train import compare, train

SHORT = (
    *("model=small_cnn", "data.batch_size=16", "data.eval_batch_size=128"),
    *("trainer.accelerator=cpu", "trainer.max_epochs=2", "++trainer.limit_train_batches=4"),
    *("++trainer.limit_val_batches=1", "++trainer.limit_test_batches=1"),
)


@pytest.fixture(autouse=True)
def _keep_environment(monkeypatch):
    """Undo what ``seed_everything`` writes into the environment; lines come at every step."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    monkeypatch.setattr(watch, "FIRST", 0.0)
    monkeypatch.setattr(watch, "NEXT", 0.0)


def test_help_needs_neither_torch_nor_lightning():
    code = (
        "import sys; from saflex_lightning.cli.entry import main; main(); "
        "sys.exit(bool({'torch', 'lightning'} & sys.modules.keys()))"
    )
    source = str(Path(saflex_lightning.__file__).parents[1])
    run = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        env={"PYTHONPATH": source},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("saflex-train is powered by Hydra")
    assert "ckpt_path: null" in run.stdout


def test_every_public_name_is_there_when_asked_for():
    for name in saflex_lightning.__all__:
        assert getattr(saflex_lightning, name).__name__ == name
    assert set(saflex_lightning.__all__) <= set(dir(saflex_lightning))
    with pytest.raises(AttributeError, match="has no attribute 'SAflex'"):
        saflex_lightning.SAflex  # noqa: B018


def test_a_file_gets_a_line_now_and_then(tmp_path, capsys):
    train(compose_config(tmp_path, *SHORT, "callbacks.saflex.every_n_steps=1"))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    number = r"-?\d+\.\d{3}"
    line = rf"epoch [12]/2, loss {number}, effective {number}(, val accuracy {number})?"
    *steps, last = said
    assert len(steps) == 8
    assert all(re.fullmatch(rf"({line}|epoch 1/2, loss .*), \d:\d\d:\d\d left", s) for s in steps)
    assert re.fullmatch(rf"{line}, \d:\d\d:\d\d in all", last)
    assert last.startswith("epoch 2/2")


def test_lines_are_few_where_steps_are_fast(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(watch, "FIRST", 60.0)
    train(compose_config(tmp_path, *SHORT))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert len(said) == 1


def test_a_terminal_gets_a_bar_with_short_names(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("rich._console", None)  # made anew, for this terminal
    train(compose_config(tmp_path, *SHORT))
    said = capsys.readouterr().out
    assert "loss: " in said
    assert "effective: " in said
    assert "train/loss" not in said
    assert "_fraction" not in said


def test_no_progress_where_none_is_wanted(tmp_path, capsys):
    train(compose_config(tmp_path, *SHORT, "trainer.enable_progress_bar=false"))
    assert "epoch 1" not in capsys.readouterr().out


def test_insight_stands_behind_the_callback_and_once():
    steering = SAflexCallback()
    for given in ([], [L.Callback()], [steering, SAflexInsight()], [steering, L.Callback()]):
        callbacks = list(given)
        watch.add_insight(callbacks)
        kinds = [type(callback) for callback in callbacks]
        assert kinds.count(SAflexInsight) == (SAflexCallback in kinds)
        if SAflexCallback in kinds:
            assert kinds.index(SAflexInsight) == kinds.index(SAflexCallback) + 1


class Stopped(RuntimeError):
    """The machine goes down."""


# A checkpoint in another folder: Lightning says that it forgets which of its files was best.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_an_interrupted_run_goes_on_and_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    def run(folder, *overrides):
        return train(compose_config(tmp_path / folder, *SHORT, *overrides))

    whole = run("whole")
    with monkeypatch.context() as patch:

        def stop(self, trainer, *args):
            if trainer.current_epoch == 1:
                raise Stopped

        patch.setattr(SAflexInsight, "on_train_batch_end", stop)
        with pytest.raises(Stopped):
            run("first")
    weights = tmp_path / "first" / "checkpoints" / "last.ckpt"
    resumed = run("second", f"ckpt_path={weights}")
    measured = ("steps", "test_accuracy", "test_auroc", "val_loss")
    assert [resumed[name] for name in measured] == [whole[name] for name in measured]
    ends = [
        torch.load(tmp_path / folder / "checkpoints" / "last.ckpt", weights_only=False)[
            "state_dict"
        ]
        for folder in ("whole", "second")
    ]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    cfg = compose_config(tmp_path, "ckpt_path=/nowhere/last.ckpt", "data.path=/nowhere")
    with pytest.raises(FileNotFoundError, match=r"nothing at /nowhere/last\.ckpt\. Pass the file"):
        train(cfg)


def test_the_settings_lie_beside_the_result(tmp_path):
    cfg = compose_config(tmp_path, *SHORT, "seed=3")
    train(cfg)
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written["data"]["seed"] == 3  # an interpolation, resolved
    assert written["callbacks"]["saflex"]["preset"] == "robust"


def test_rivals_share_the_closing_table_and_the_folder_is_printed(tmp_path, capsys):
    home = tmp_path / "it's a run, \N{LATIN SMALL LETTER U WITH DIAERESIS} (lr=0.1)"
    own = "callbacks.saflex.refresh_every_n_steps=2", "callbacks=best", "data.steering=train"
    given = [*SHORT, *own, "output_dir='" + str(home).replace("'", r"\'") + "'"]
    with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
        cfg = compose("train", given, return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        try:
            compare(compose("train", given))
        finally:
            HydraConfig.instance().cfg = None
    said = capsys.readouterr().out
    table = said[said.index("the same rows, seed 1") :]
    methods = ["no_aug", "upstream", "label_smoothing", "saflex_robust"]
    assert re.findall(r"^│ (\w+)", table, flags=re.MULTILINE) == methods
    assert table.endswith(
        f"Results and weights: {home}\nA page of them: saflex-report {shlex.quote(str(home))}\n"
    )
    settings = yaml.safe_load((home / "config.yaml").read_text())
    assert settings["callbacks"]["saflex"]["refresh_every_n_steps"] == 2
    (again,) = re.findall(r"^saflex-train (.*)$", table, flags=re.MULTILINE)
    with initialize_config_module("saflex_lightning.configs", version_base="1.3"):
        second = compose("train", shlex.split(again))
    assert second.data.row_weights == str(home / "saflex_rows.csv")
    assert train(second)["name"] == "train_plus_val"
    rivals = [home / "rivals" / method for method in methods[:3]]
    for folder in (home, *rivals, home / "second"):
        assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_the_main_job_tells_what_a_refined_step_costs(tmp_path, capsys):
    longer = "experiment=weak_labels", "data.batch_size=8", "++trainer.limit_train_batches=54"
    result = train(compose_config(tmp_path, *SHORT, *longer))
    ratio = result["overhead_ratio"]
    assert 0.5 < ratio < 10
    said = capsys.readouterr().out
    assert re.search(rf"refined step to plain step, in time +│ {ratio:.2f} ", said)
