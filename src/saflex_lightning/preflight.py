"""Compare what the launcher and the GPU offer with what the Trainer was told, before it starts.

Lightning notices some mismatches only by waiting for processes that nobody started, and others not
at all: several tasks that each train alone, or one task that trains on a quarter of the rows.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.accelerators import CUDAAccelerator

__all__ = ["architecture_problems", "check_launch", "launch_problems", "preflight_problems"]

_INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning ignores SLURM


def check_launch(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that its launcher or its GPUs cannot serve; entry points call it.

    Args:
        trainer: A Trainer that has not run yet.

    Raises:
        MisconfigurationException: If anything does not fit; the message lists all of it.
    """
    problems = list(preflight_problems(trainer))
    if problems:
        raise MisconfigurationException("\n".join(problems))


def preflight_problems(trainer: pl.Trainer) -> Iterator[str]:
    """Find what `check_launch` refuses.

    Args:
        trainer: The Trainer.

    Yields:
        One message per problem.
    """
    strategy = trainer.strategy
    cluster = getattr(strategy, "cluster_environment", None)
    if cluster is None or isinstance(cluster, (SLURMEnvironment, TorchElasticEnvironment)):
        yield from launch_problems(
            os.environ, devices=trainer.num_devices, num_nodes=trainer.num_nodes
        )
    # Asking a GPU for its name starts CUDA, which processes that are forked later may not find.
    forks = strategy.launcher is not None and strategy.launcher.is_interactive_compatible
    if isinstance(trainer.accelerator, CUDAAccelerator) and not forks:
        built_for = torch.cuda.get_arch_list()
        for name, capability in sorted(
            {
                (torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
                for index in trainer.device_ids
            }
        ):
            yield from architecture_problems(capability, built_for, name=name)


def launch_problems(
    environment: Mapping[str, str], *, devices: int, num_nodes: int
) -> Iterator[str]:
    """Compare the tasks that SLURM or torchrun started with the Trainer's devices.

    Args:
        environment: The process's environment variables.
        devices: The Trainer's devices per node.
        num_nodes: The Trainer's number of nodes.

    Yields:
        One message per problem; none where neither of the two started the process.

    Example:
        >>> torchrun = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}
        >>> list(launch_problems(torchrun, devices=4, num_nodes=1))
        []
    """
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun comes first inside SLURM too
        started = int(environment["LOCAL_WORLD_SIZE"])
        nodes = int(environment["WORLD_SIZE"]) // started
        launcher, option = "torchrun", "--nproc-per-node"
    elif "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
        if "SLURM_STEP_TASKS_PER_NODE" not in environment:
            if devices * num_nodes > 1:
                yield (
                    f"Expected `srun` to start {devices * num_nodes} processes, but this one was "
                    "started in a SLURM job without it, and Lightning would wait for the others. "
                    "Write `srun` before the command."
                )
            return
        counts = _tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
        if len(set(counts)) > 1:
            yield (
                f"Expected as many tasks on every node, but SLURM started {counts}. Write "
                f"`#SBATCH --ntasks-per-node={devices}` in place of `--ntasks`."
            )
            return
        started, nodes = counts[0], len(counts)
        launcher, option = "SLURM", "--ntasks-per-node"
    else:
        return
    if started != devices:
        yield (
            f"Expected as many processes per node as `devices`, but {launcher} started {started} "
            f"and the Trainer has devices={devices}. Pass `{option}={devices}` to {launcher}, or "
            f"`devices={started}` to the Trainer."
        )
    if nodes != num_nodes:
        yield (
            f"Expected `num_nodes` to be the nodes in use, but {launcher} uses {nodes} and the "
            f"Trainer has num_nodes={num_nodes}. Pass `num_nodes={nodes}` to the Trainer."
        )


def architecture_problems(
    capability: tuple[int, int], built_for: Sequence[str], *, name: str
) -> Iterator[str]:
    """Compare a GPU with the architectures that PyTorch was compiled for.

    Machine code runs on GPUs of the same major version and an equal or higher minor one, an
    architecture-specific kind (``sm_90a``) on its own version alone, and portable code
    (``compute_80``) on any later GPU.

    Args:
        capability: Major and minor version of the GPU.
        built_for: What ``torch.cuda.get_arch_list()`` returns, such as ``["sm_75", "sm_80"]``.
        name: Name of the GPU.

    Yields:
        One message if the build has no code for the GPU.

    Example:
        >>> list(architecture_problems((7, 0), ["sm_60", "sm_70"], name="V100"))
        []
    """
    known = [match for entry in built_for if (match := _ARCHITECTURE.fullmatch(entry))]
    if not known or any(_serves(match, capability) for match in known):
        return
    major, minor = capability
    advice = (
        "Install the cu126 build of PyTorch: CUDA 13 has no code for GPUs before sm_75."
        if capability < (7, 5)
        else "Install a build of PyTorch whose CUDA version knows this GPU."
    )
    yield (
        f"Expected a PyTorch build with code for sm_{major}{minor} ({name}), but torch "
        f"{torch.__version__} was built for {', '.join(built_for)}. {advice}"
    )


_ARCHITECTURE = re.compile(r"(sm|compute)_(\d+)(\d)([a-z]?)")


def _serves(match: re.Match[str], capability: tuple[int, int]) -> bool:
    kind, major, minor, suffix = match.groups()
    built = (int(major), int(minor))
    if suffix == "a":
        return built == capability
    if kind == "compute":
        return built <= capability
    return built[0] == capability[0] and built[1] <= capability[1]


def _tasks_per_node(counts: str) -> list[int]:
    """Expand SLURM's ``"4(x2),3"`` into one number per node."""
    nodes: list[int] = []
    for tasks, repeated in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts):
        nodes += [int(tasks)] * int(repeated or 1)
    return nodes
