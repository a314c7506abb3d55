"""Everything that can be known to be wrong before a step is taken, said at once."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from saflex_lightning.adopt import serve
from saflex_lightning.engines.parameters import select_parameters
from saflex_lightning.functional.settings import Settings
from saflex_lightning.module import SAflexMixin
from saflex_lightning.validation.source import ask_hook, is_a

__all__ = [
    "check_fit",
    "check_initialised",
    "check_launch",
    "check_model",
    "check_saved_gradient",
    "check_state",
    "damaged_state",
    "find_group_names",
    "launch_problems",
]

STATE_VERSION = 8
_INTERACTIVE = ("bash", "interactive")  # names of SLURM jobs in which Lightning ignores SLURM


def check_fit(trainer: Any, module: Any, settings: Settings) -> None:
    """Collect every incompatibility of Trainer, module and settings, and raise once."""
    problems = [
        *_strategy_problems(trainer.strategy, settings),
        *_launch_problems_of(trainer),
        *_precision_problems(trainer, settings),
        *_compile_problems(module, settings),
    ]
    if problems:
        raise MisconfigurationException("\n".join(problems))


def check_model(module: pl.LightningModule, settings: Settings) -> None:
    """Refuse patterns and heads that do not fit a model, once it was set up."""
    problems: list[str] = []
    if settings.engine == "head" and settings.params is not None:
        problems.append(
            f"Expected `params` to be None with engine='head', but got {settings.params!r}. The "
            "head engine matches the last linear layer only; remove `params`."
        )
    head: Any = serve(module).head()
    if not isinstance(head, (nn.Linear, type(None))):
        problems.append(
            f"Expected `saflex_head()` to return an `nn.Linear`, but got {type(head).__name__}. "
            "Return the layer whose output is the scores, or None to have it found."
        )
    scores = getattr(type(module), "saflex_scores", None)  # of a module that nobody edited: none
    if scores is SAflexMixin.saflex_scores and type(module).forward is nn.Module.forward:
        problems.append(
            f"Expected {type(module).__name__} to have a `forward` that returns the logits, but it "
            "has none. Write one, or override `saflex_scores` to return them."
        )
    try:
        select_parameters(module, settings.params)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise MisconfigurationException("\n".join(problems))


def check_initialised(module: nn.Module) -> None:
    """Refuse layers that wait for their first batch: it would be one of ours.

    Raises:
        MisconfigurationException: The message names the first of them.
    """
    for name, part in module.named_modules():
        tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(map(is_lazy, tensors)):
            raise MisconfigurationException(
                f"Expected initialised layers, but submodule `{name}` ({type(part).__name__}) "
                "waits for its first batch. Run a batch through the model in `setup`, or leave "
                "Lightning's sanity check on (`num_sanity_val_steps`)."
            )


def _strategy_problems(strategy: Any, settings: Settings) -> Iterator[str]:
    whole = is_a(strategy, "SingleDeviceStrategy", "DDPStrategy")
    if whole and not is_a(strategy, "DeepSpeedStrategy"):  # which derives from `DDPStrategy`
        return
    if not is_a(strategy, "ModelParallelStrategy"):
        engine = " and pass engine='head'" if settings.solves else ""
        yield (
            "Expected a single device, `strategy='ddp'` or `ModelParallelStrategy`, but got "
            f"`{type(strategy).__name__}`. Choose `ddp`, or shard the model with `fully_shard` in "
            f"`configure_model` under `ModelParallelStrategy`{engine}."
        )
        return
    if settings.solves and settings.engine != "head":
        yield (
            "Expected engine='head' under `ModelParallelStrategy`, but got "
            f"engine={settings.engine!r}, which may need whole parameters. Pass engine='head', or "
            "choose `ddp`."
        )
    tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        yield (
            "Expected every process to have rows of its own, but got a tensor-parallel group of "
            f"{tensor_parallel}. Pass `ModelParallelStrategy(data_parallel_size=..., "
            "tensor_parallel_size=1)`."
        )


def _precision_problems(trainer: pl.Trainer, settings: Settings) -> Iterator[str]:
    narrow = str(trainer.precision).startswith(("16", "bf16", "transformer-engine"))
    if narrow and settings.solves and settings.engine == "finite_difference":
        yield (
            "Expected parameters and products of float32 or wider for engine='finite_difference', "
            f"but got `precision={trainer.precision!r}`: its small step would be rounded away. "
            "Pass engine='forward_mode' or engine='head'."
        )


def _compile_problems(module: Any, settings: Settings) -> Iterator[str]:
    # Lightning puts this on a module that was compiled as a whole, training step included.
    whole = getattr(module, "_compiler_ctx", None) is not None
    if whole and not isinstance(module, SAflexMixin):
        yield (
            f"Expected {type(module).__name__} to derive from `SAflexMixin` where `torch.compile` "
            "takes the whole module, but it does not, and compiled code hides its loss. Compile "
            "the inner network without its last layer instead."
        )
    elif whole and settings.solves and settings.engine != "finite_difference":
        yield (
            "Expected engine='finite_difference' where `torch.compile` takes the whole module, but "
            f"got engine={settings.engine!r}, for which compiled code hides what it needs. Compile "
            "the inner network without its last layer instead, or pass engine='finite_difference'."
        )


# What a launcher started against what the Trainer was told: Lightning would wait for processes
# that nobody started.


def check_launch(trainer: pl.Trainer) -> None:
    """Refuse a Trainer that its launcher cannot serve; entry points call it before a run."""
    problems = list(_launch_problems_of(trainer))
    if problems:
        raise MisconfigurationException("\n".join(problems))


def _launch_problems_of(trainer: pl.Trainer) -> Iterator[str]:
    cluster = getattr(trainer.strategy, "cluster_environment", None)
    if cluster is None or is_a(cluster, "SLURMEnvironment", "TorchElasticEnvironment"):
        yield from launch_problems(os.environ, trainer.num_devices, trainer.num_nodes)


def launch_problems(environment: Mapping[str, str], devices: int, num_nodes: int) -> Iterator[str]:
    """Compare how many processes SLURM or torchrun started with what the Trainer waits for."""
    if "TORCHELASTIC_RUN_ID" in environment:  # torchrun comes first inside SLURM too
        started, option = int(environment["WORLD_SIZE"]), "torchrun --nproc-per-node"
    elif "SLURM_NTASKS" in environment and environment.get("SLURM_JOB_NAME") not in _INTERACTIVE:
        # A batch script that does not say `srun` has no job step.
        started, option = int(environment.get("SLURM_STEP_NUM_TASKS", 1)), "srun --ntasks-per-node"
    else:
        return
    if started != devices * num_nodes:
        yield (
            f"Expected the launcher to start `devices` times `num_nodes` = {devices * num_nodes} "
            f"processes, but it started {started}. Start them by `{option}={devices}` on "
            f"{num_nodes} node{'s' * (num_nodes > 1)}, or change `devices` and `num_nodes` of the "
            "Trainer."
        )


# What evidence needs to know of a fit


def find_group_names(trainer: pl.Trainer, module: pl.LightningModule) -> Sequence[str]:
    """Return the name of every group of training rows: of a hook, or of what loads them.

    There are none where nobody names them.

    Raises:
        MisconfigurationException: If none is named, or a name stands twice.
    """
    names = ask_hook(trainer, module, "saflex_group_names")
    if names is None:
        names = next(_names_of(trainer.train_dataloader), None)
    if names is None:
        return ()
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise MisconfigurationException(
            "Expected `saflex_group_names()` of the datamodule or module, or `group_names` of the "
            "training loader, to name the groups of `AugmentedBatch.group`, the clean rows first, "
            f"each once, but got {names if isinstance(names, str) else list(names)!r}. Return "
            "names such as ('clean', 'Rotate', 'Invert'), `group_names_of(augment)`, or None."
        )
    return names


def _names_of(loaders: Any) -> Iterator[Any]:
    """Yield the names that loaders, or their datasets, have for the groups of their rows."""
    parts = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    for loader in parts if isinstance(parts, (list, tuple)) else [parts]:
        for owner in (loader, getattr(loader, "dataset", None)):
            if (names := getattr(owner, "group_names", None)) is not None:
                yield names


# Checkpoints


def check_state(state: Any, expected: Mapping[str, Any]) -> None:
    """Refuse the state of a checkpoint that is of another version, or has other parts than ours.

    Raises:
        MisconfigurationException: The message lists every part that is missing or of another kind.
    """
    version = state.get("version") if isinstance(state, dict) else None
    if version != STATE_VERSION:
        raise MisconfigurationException(
            f"Expected callback state of version {STATE_VERSION}, but the checkpoint holds "
            f"version {version!r}. Resume with the library version that wrote it, or start a new "
            "run."
        )
    # Settings that differ are said by name.
    if problems := list(_state_problems(state, {**expected, "settings": {}}, "")):
        raise damaged_state(", ".join(problems))


def damaged_state(problem: str) -> MisconfigurationException:
    """Return the error for a checkpoint whose state cannot be taken."""
    return MisconfigurationException(
        f"Expected the whole state of `SAflexCallback` in the checkpoint, but {problem}. The file "
        "is damaged or was edited; resume from another checkpoint."
    )


def _state_problems(found: Any, expected: Any, name: str) -> Iterator[str]:
    """Compare a state with that of a callback that has not run, where None may become anything."""
    if expected is None or found is None:  # what a setting has switched on or off since
        if expected is None and not _is_plain(found):
            yield f"`{name}` holds something else than tensors, numbers and names"
    elif _kind_of(found) != _kind_of(expected):
        yield f"`{name}` is {_kind_of(found)}, not {_kind_of(expected)}"
    elif isinstance(expected, Mapping):
        yield from _dict_problems(found, expected, f"{name}." if name else "")
    elif isinstance(expected, tuple) and expected:
        if len(found) != len(expected):
            yield f"`{name}` has {len(found)} entries, not {len(expected)}"
        for place, (entry, part) in enumerate(zip(found, expected, strict=False)):
            yield from _state_problems(entry, part, f"{name}[{place}]")
    elif isinstance(expected, tuple) and not all(isinstance(part, (int, str)) for part in found):
        yield f"`{name}` holds something else than numbers or names"


def _dict_problems(
    found: Mapping[str, Any], expected: Mapping[str, Any], prefix: str
) -> Iterator[str]:
    for key, part in expected.items():
        if key in found:
            yield from _state_problems(found[key], part, f"{prefix}{key}")
        else:
            yield f"`{prefix}{key}` is missing"
    absent = [key for key in expected if found.get(key) is None]
    begins_together = all(part is None for part in expected.values())
    if begins_together and 0 < len(absent) < len(expected):
        yield f"of `{prefix[:-1]}` only {absent} are None"


def _kind_of(value: Any) -> str:
    """Return what a part of a state is, in words."""
    if isinstance(value, Tensor):
        kind = "float" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        return f"a {kind} tensor of {value.ndim} dimensions"
    kinds = {list: tuple, int: float} if not isinstance(value, bool) else {}
    names = {dict: "a dict", tuple: "a sequence", float: "a number"}
    kind = kinds.get(type(value), type(value))
    return names.get(kind, f"a {kind.__name__}")


def _is_plain(value: Any) -> bool:
    """Say whether a value is a number, a name, a tensor, a sequence of these two, or parts so."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (tuple, list)):
        return all(isinstance(part, (Tensor, str)) for part in value)
    return value is None or isinstance(value, (bool, int, float, str, Tensor))


def check_saved_gradient(
    gradient: Mapping[str, Any], names: tuple[str, ...], module: nn.Module
) -> None:
    """Refuse a saved validation gradient that does not fit the parameters of the module."""
    if gradient["average"] is None:
        return
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
    problems: list[str] = []
    for kind in ("average", "direction"):
        parts = [part for part in gradient[kind] if isinstance(part, Tensor)]
        if len(parts) != len(names):
            problems.append(f"`{kind}` has {len(parts)} parts for {len(names)} parameters")
            continue
        problems += [
            f"`{kind}` has shape {tuple(part.shape)} for `{name}`, which "
            + (f"has {shapes[name]}" if name in shapes else "the module does not have")
            for name, part in zip(names, parts, strict=False)
            if shapes.get(name) != tuple(part.shape)
        ]
    if problems:
        raise MisconfigurationException(
            "Expected the saved validation gradient to fit the parameters of the module, but "
            + ", ".join(problems)
            + ". Resume with the module that wrote the checkpoint."
        )
