"""What the launcher started against what the Trainer was told."""

import pytest

from saflex_lightning.fit.checks import launch_problems


def slurm(tasks="4", **variables):
    return {"SLURM_NTASKS": "4", "SLURM_STEP_TASKS_PER_NODE": tasks, **variables}


def torchrun(local, world):
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "LOCAL_WORLD_SIZE": str(local),
        "WORLD_SIZE": str(world),
    }


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes"),
    [
        ({}, 4, 1),  # Lightning starts the processes
        (slurm(), 4, 1),
        (slurm("4(x2)"), 4, 2),
        (slurm("1"), 1, 1),
        ({"SLURM_NTASKS": "1"}, 1, 1),  # a batch script without srun
        (slurm("1", SLURM_JOB_NAME="interactive"), 4, 1),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, 4, 1),
        (torchrun(4, 4), 4, 1),
        (torchrun(4, 8), 4, 2),
        ({**slurm("1"), **torchrun(4, 4)}, 4, 1),  # torchrun inside one SLURM task
    ],
)
def test_launchers_that_fit_are_let_pass(environment, devices, num_nodes):
    assert list(launch_problems(environment, devices=devices, num_nodes=num_nodes)) == []


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "match"),
    [
        (slurm("1"), 4, 1, "SLURM started 1 and the Trainer has devices=4. Pass `--ntasks-per-"),
        (slurm("4"), 1, 1, "SLURM started 4 and the Trainer has devices=1"),
        (slurm("4(x2)"), 4, 1, "SLURM uses 2 and the Trainer has num_nodes=1"),
        (slurm("4,3(x2)"), 4, 3, r"every node, but SLURM started [4, 3, 3]. Write `#SBATCH --nt"),
        ({"SLURM_NTASKS": "4"}, 4, 1, "Expected `srun` to start 4 processes"),
        ({"SLURM_NTASKS": "2"}, 1, 2, "Expected `srun` to start 2 processes"),
        (torchrun(2, 2), 4, 1, "torchrun started 2 and the Trainer has devices=4. Pass `--nproc-"),
        (torchrun(4, 4), 1, 1, "torchrun started 4 and the Trainer has devices=1"),
        (torchrun(4, 8), 4, 1, "torchrun uses 2 and the Trainer has num_nodes=1"),
    ],
)
def test_launchers_that_do_not_fit_are_told(environment, devices, num_nodes, match):
    (problem,) = launch_problems(environment, devices=devices, num_nodes=num_nodes)
    assert match in problem
