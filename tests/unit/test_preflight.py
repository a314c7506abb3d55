"""What the launcher and the GPU offer against what the Trainer was told."""

import pytest
import torch

from saflex_lightning.preflight import architecture_problems, launch_problems

CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


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


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((7, 0), CU126),
        ((7, 2), CU126),  # a higher minor version
        ((8, 9), CU130),
        ((9, 0), ["sm_90a"]),
        ((10, 3), CU130),
        ((12, 1), CU130),
        ((9, 0), ["sm_75", "compute_80"]),  # portable code for a later GPU
        ((9, 0), ["gfx90a", "gfx942"]),  # not CUDA's names
        ((7, 0), []),
    ],
)
def test_gpus_with_code_in_the_build_are_let_pass(capability, built_for):
    assert list(architecture_problems(capability, built_for, name="gpu")) == []


@pytest.mark.parametrize(
    ("capability", "built_for", "advice"),
    [
        ((7, 0), CU130, "Install the cu126 build"),
        ((6, 1), ["sm_70"], "Install the cu126 build"),
        ((10, 0), CU126, "whose CUDA version knows this GPU"),
        ((8, 0), ["sm_86", "compute_90"], "whose CUDA version knows this GPU"),
        ((10, 3), ["sm_100a"], "whose CUDA version knows this GPU"),
    ],
)
def test_gpus_without_code_in_the_build_are_told(capability, built_for, advice):
    (problem,) = architecture_problems(capability, built_for, name="Tesla V100")
    major, minor = capability
    assert f"code for sm_{major}{minor} (Tesla V100), but torch {torch.__version__}" in problem
    assert ", ".join(built_for) in problem
    assert advice in problem


@pytest.mark.gpu
def test_the_gpu_at_hand_has_code_in_its_build():
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    assert built_for
    assert list(architecture_problems(capability, built_for, name="gpu")) == []
