"""What the launcher started against what the Trainer was told."""

import pytest

from saflex_lightning.fit.checks import launch_problems


def slurm(tasks, **variables):
    return {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": str(tasks), **variables}


def torchrun(processes):
    return {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": str(processes)}


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes"),
    [
        ({}, 4, 1),  # Lightning starts the processes
        (slurm(4), 4, 1),
        (slurm(8), 4, 2),
        (slurm(1), 1, 1),
        ({"SLURM_NTASKS": "1"}, 1, 1),  # a batch script without srun
        (slurm(1, SLURM_JOB_NAME="interactive"), 4, 1),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "bash"}, 4, 1),
        (torchrun(4), 4, 1),
        (torchrun(8), 4, 2),
        ({**slurm(1), **torchrun(4)}, 4, 1),  # torchrun inside one SLURM task
    ],
)
def test_launchers_that_fit_are_let_pass(environment, devices, num_nodes):
    assert list(launch_problems(environment, devices, num_nodes)) == []


@pytest.mark.parametrize(
    ("environment", "devices", "num_nodes", "match"),
    [
        (
            slurm(1),
            4,
            1,
            "4 processes, but it started 1. Start them by `srun --ntasks-per-node=4`",
        ),
        (slurm(4), 1, 1, "= 1 processes, but it started 4"),
        (slurm(8), 4, 1, "= 4 processes, but it started 8"),
        ({"SLURM_NTASKS": "4"}, 4, 1, "it started 1. Start them by `srun"),  # without srun
        ({"SLURM_NTASKS": "2"}, 1, 2, "on 2 nodes"),
        (torchrun(2), 4, 1, "it started 2. Start them by `torchrun --nproc-per-node=4` on 1 node,"),
        (torchrun(4), 1, 1, "it started 4"),
    ],
)
def test_launchers_that_do_not_fit_are_told(environment, devices, num_nodes, match):
    (problem,) = launch_problems(environment, devices, num_nodes)
    assert match in problem
