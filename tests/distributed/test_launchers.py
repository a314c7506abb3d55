"""Every way to start several processes, from a script and from both entry points."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import script

import saflex_lightning

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SOURCE = Path(saflex_lightning.__file__).parents[1]
REPOSITORY = Path(__file__).parents[2]
PYTHON = (sys.executable,)
TORCHRUN = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
LAUNCHERS = {
    "ddp": (PYTHON, "ddp"),
    "ddp_spawn": (PYTHON, "ddp_spawn"),
    "torchrun": (TORCHRUN, "ddp"),
}
FOUR_GPUS = "medmnist_4gpu_fp16"
TRAIN = ("-m", "saflex_lightning.cli.train")
SIMULATED = (
    *("trainer=ddp_sim", "trainer.max_epochs=1"),
    *("data.batch_size=4", "data.eval_batch_size=128", "trainer.enable_progress_bar=false"),
    *("++trainer.limit_train_batches=2", "++trainer.limit_val_batches=1"),
    "++trainer.limit_test_batches=1",
)
FIT = (
    *("--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.precision=32"),
    *("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"),
    *("--data.dataset=blood_subset", "--data.batch_size=2", "--data.eval_batch_size=64"),
    "--data.num_workers=0",
)


def environment(**variables):
    path = os.pathsep.join([str(SOURCE), str(Path(__file__).parents[1])])
    return {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run(command, folder, **variables):
    """Run a command to its end and return it; both streams are in ``stdout``."""
    return subprocess.run(
        command,
        cwd=folder,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )


every_launcher = pytest.mark.parametrize(
    ("python", "strategy"), LAUNCHERS.values(), ids=LAUNCHERS.keys()
)


@every_launcher
def test_script_reaches_the_parameters_of_one_process(python, strategy, tmp_path):
    done = run([*python, script.__file__, strategy, "2", "parameters.pt"], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "MEMBER: 2/2" in done.stdout
    found = torch.load(tmp_path / "parameters.pt")
    _, expected = script.train("auto", 1)
    for name, value in expected.items():
        assert (value - found[name]).abs().max() < 1e-8, name


@every_launcher
def test_hydra_run_has_one_directory_and_one_result(python, strategy, tmp_path):
    variables = {"SAFLEX_RUN_DIR": "outputs/a/run"} if python is TORCHRUN else {}
    done = run([*python, *TRAIN, *SIMULATED, f"trainer.strategy={strategy}"], tmp_path, **variables)
    assert done.returncode == 0, done.stdout
    assert "MEMBER: 2/2" in done.stdout
    (folder,) = tmp_path.glob("outputs/*/*")
    (written,) = tmp_path.rglob("result.json")
    assert written.parent == folder
    assert len(list(tmp_path.rglob(".hydra"))) == 1
    result = json.loads(written.read_text())
    assert result["processes"] == 2
    assert result["steps"] == 2
    assert 0.0 < result["step_seconds_without_solve"] < result["step_seconds"]
    assert 0.0 < result["effective_fraction"] <= 1.0 + 1e-6
    assert done.stdout.count("seconds per step without the solve") == 1


def test_processes_that_would_each_name_a_directory_are_refused(tmp_path):
    done = run([*TORCHRUN, *TRAIN, *SIMULATED], tmp_path)
    assert done.returncode == 1
    assert "Set the environment variable `SAFLEX_RUN_DIR`, or pass `hydra.run.dir`" in done.stdout
    assert not list(tmp_path.rglob("result.json"))


def test_sweep_of_spawned_jobs_makes_one_tree(tmp_path):
    sweep = ("trainer.strategy=ddp_spawn", "seed=1,2", "hydra.sweep.dir=sweep")
    done = run([*PYTHON, *TRAIN, "-m", *SIMULATED, *sweep], tmp_path)
    assert done.returncode == 0, done.stdout
    results = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("result.json"))]
    assert [(result["seed"], result["processes"]) for result in results] == [(1, 2), (2, 2)]
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]
    assert done.stdout.count("mean ± std over seeds") == 1


def test_sweep_of_jobs_that_would_sweep_again_is_refused(tmp_path):
    sweep = ("seed=1,2", "hydra.sweep.dir=sweep")
    done = run([*PYTHON, *TRAIN, "-m", *SIMULATED, *sweep], tmp_path)
    assert done.returncode == 1
    assert "Add `trainer.strategy=ddp_spawn`, or start one command per job" in done.stdout
    assert "GLOBAL_RANK" not in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["sweep"]


@every_launcher
def test_shipped_four_gpu_file_runs_on_two_cpu_processes(python, strategy, tmp_path):
    fit = ("-m", "saflex_lightning.cli.saflex", "fit", "--config", FOUR_GPUS, *FIT)
    ends = (f"--trainer.strategy={strategy}", "--trainer.max_epochs=1")
    done = run([*python, *fit, *ends], tmp_path)
    assert done.returncode == 0, done.stdout
    assert "MEMBER: 2/2" in done.stdout
    (written,) = tmp_path.glob("outputs/*/*/metrics.csv")
    assert "saflex/effective_fraction" in written.read_text()
    assert "val/auroc" in written.read_text()
    checkpoints = {path.name for path in written.parents[1].glob("checkpoints/*")}
    assert checkpoints == {"best.ckpt", "last.ckpt"}


def write_program(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def wait_for(condition, process, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.2)


def test_batch_script_is_requeued_and_goes_on(tmp_path):
    """The shipped script, with an ``srun`` that starts two tasks here as SLURM's would."""
    programs = tmp_path / "bin"
    programs.mkdir()
    write_program(
        programs / "saflex", f'exec "{sys.executable}" -m saflex_lightning.cli.saflex "$@"\n'
    )
    write_program(programs / "scontrol", 'echo "$@" > "$SLURM_SUBMIT_DIR/requeued"\n')
    write_program(
        programs / "srun",
        "shift\n"  # --kill-on-bad-exit
        "export SLURM_STEP_NUM_TASKS=2 SLURM_NODEID=0\n"
        "trap 'kill $(jobs -p)' TERM\n"
        'SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & SLURM_PROCID=1 SLURM_LOCALID=1 "$@" &\n'
        "wait; wait\n",
    )
    job = environment(
        PATH=os.pathsep.join([str(programs), os.environ["PATH"]]),
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="saflex",
        SLURM_NTASKS="2",
        SLURM_NTASKS_PER_NODE="2",
        SLURM_SUBMIT_DIR=str(tmp_path),
    )
    command = ["bash", str(REPOSITORY / "docs" / "medmnist_4gpu.sbatch"), *FIT]

    def start(*ends):
        return subprocess.Popen(
            [*command, *ends],
            env=job,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    last = tmp_path / "outputs" / "4711" / "outputs/medmnist_4gpu_fp16/checkpoints/last.ckpt"
    first = start("--trainer.max_epochs=1000")
    try:
        wait_for(last.exists, first)
        first.send_signal(signal.SIGUSR1)
        wait_for((tmp_path / "requeued").exists, first)
    finally:
        os.killpg(first.pid, signal.SIGKILL)  # as SLURM ends a job that it requeues
        first.communicate()
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    epoch = torch.load(last, weights_only=False)["epoch"]

    output, _ = start(f"--trainer.max_epochs={epoch + 3}").communicate(timeout=900)
    assert "Restored all states from the checkpoint" in output, output
    assert torch.load(last, weights_only=False)["epoch"] == epoch + 2
