"""Everything that can be known to be wrong before a step is taken, said at once."""

from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)

from .engines import UnsupportedModelError, make_engine
from .functional import Preset
from .mixin import SAflexMixin
from .preflight import preflight_problems
from .sources import ask_hook
from .watch import find_last_layer

__all__ = ["check_fit", "check_model", "count_batches", "find_group_names"]


def check_fit(trainer: Any, module: Any, preset: Preset) -> None:
    """Collect every incompatibility of Trainer, module and settings, and raise once.

    Args:
        trainer: The Trainer.
        module: Its module; its layers may not be there yet.
        preset: The settings.

    Raises:
        MisconfigurationException: If anything does not fit; the message lists all of it.
    """
    if not isinstance(trainer, pl.Trainer):
        raise MisconfigurationException(
            "Expected `SAflexCallback` in a `lightning.pytorch.Trainer`, but found "
            f"`{type(trainer).__module__}.{type(trainer).__name__}`. Write "
            "`import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`."
        )
    problems = [
        *_module_problems(module),
        *_strategy_problems(trainer.strategy, preset),
        *preflight_problems(trainer),
        *_precision_problems(trainer, preset),
        *_compile_problems(module, preset),
    ]
    if problems:
        raise MisconfigurationException("\n".join(problems))


def check_model(
    module: SAflexMixin, preset: Preset, params: list[str] | None, *, head_wanted_by: str | None
) -> None:
    """Check that the engine can serve a model, once its ``setup`` and ``configure_model`` ran.

    Args:
        module: The module.
        preset: The settings.
        params: Name patterns of the matched parameters.
        head_wanted_by: The setting that needs a linear layer for its scores; None if none does.

    Raises:
        MisconfigurationException: If it cannot; the message lists every reason.
    """
    problems = list(_engine_problems(module, preset, params))
    if head_wanted_by is not None:
        problems += _head_problems(module, head_wanted_by)
    if problems:
        raise MisconfigurationException("\n".join(problems))


def _module_problems(module: Any) -> Iterator[str]:
    if not isinstance(module, SAflexMixin):
        yield (
            f"Expected the module to derive from `SAflexMixin`, but {type(module).__name__} does "
            f"not. Write `class {type(module).__name__}(SAflexMixin, LightningModule)` and use "
            "`self.saflex_forward` and `self.saflex_loss` in `training_step`."
        )


def _strategy_problems(strategy: Strategy, preset: Preset) -> Iterator[str]:
    whole = isinstance(strategy, (SingleDeviceStrategy, DDPStrategy))
    if whole and not isinstance(strategy, DeepSpeedStrategy):  # which derives from `DDPStrategy`
        return
    if not isinstance(strategy, ModelParallelStrategy):
        yield (
            "Expected a single device, `strategy='ddp'` or `ModelParallelStrategy`, but got "
            f"`{type(strategy).__name__}`. Choose `ddp`, or shard the model with `fully_shard` in "
            "`configure_model` under `ModelParallelStrategy` and pass engine='head'."
        )
        return
    if preset.engine != "head":
        yield (
            "Expected engine='head' under `ModelParallelStrategy`, but got "
            f"engine={preset.engine!r}, which needs whole parameters. Pass engine='head', or "
            "choose `ddp`."
        )
    tensor_parallel = strategy.device_mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        yield (
            "Expected every process to have rows of its own, but got a tensor-parallel group of "
            f"{tensor_parallel}. Pass `ModelParallelStrategy(data_parallel_size=..., "
            "tensor_parallel_size=1)`."
        )


def _precision_problems(trainer: pl.Trainer, preset: Preset) -> Iterator[str]:
    if trainer.precision in {"16-true", "bf16-true"} and preset.engine == "finite_difference":
        yield (
            "Expected parameters of float32 or wider for engine='finite_difference', but got "
            f"`precision={trainer.precision!r}`: its small step would be rounded away. Pass "
            "engine='forward_mode' or engine='head', or choose `precision='bf16-mixed'` or "
            "'16-mixed'."
        )


def _compile_problems(module: Any, preset: Preset) -> Iterator[str]:
    # Lightning puts this on a module that was compiled as a whole, training step included.
    whole = getattr(module, "_compiler_ctx", None) is not None
    if whole and preset.engine != "finite_difference":
        yield (
            "Expected engine='finite_difference' where `torch.compile` takes the whole module, but "
            f"got engine={preset.engine!r}, which compiled code can leave without a tangent. "
            "Compile the inner network instead, or pass engine='finite_difference'."
        )


def _engine_problems(
    module: SAflexMixin, preset: Preset, params: list[str] | None
) -> Iterator[str]:
    assert isinstance(module, pl.LightningModule)
    try:
        make_engine(preset.engine, module, params=params, head=module.saflex_head())
    except (UnsupportedModelError, ValueError) as error:
        yield str(error)


def _head_problems(module: SAflexMixin, wanted_by: str) -> Iterator[str]:
    assert isinstance(module, pl.LightningModule)
    try:
        find_last_layer(module, module.saflex_head(), wanted_by)
    except UnsupportedModelError as error:
        yield str(error)


def find_group_names(trainer: pl.Trainer, module: pl.LightningModule) -> Sequence[str]:
    """Return the name of every group of training rows, from a `saflex_group_names` hook.

    Args:
        trainer: The Trainer; the hook of its datamodule is asked first.
        module: Its module.

    Returns:
        At least two names, the first for clean rows.

    Raises:
        MisconfigurationException: If there is no hook, no augmented group, or a name twice.
    """
    names = ask_hook(trainer, module, "saflex_group_names")
    if names is None or len(names) < 2 or len(set(names)) < len(names):
        raise MisconfigurationException(
            "Expected `saflex_group_names()` of the datamodule or module to name the groups of "
            "`AugmentedBatch.group` for `gates=True`, the clean rows first, each once, but got "
            f"{names if names is None else list(names)}. Return names such as "
            "('clean', 'Rotate', 'Invert'), or pass `gates=False`."
        )
    return names


def count_batches(trainer: pl.Trainer) -> float:
    """Return how many training batches the whole training has.

    Args:
        trainer: The Trainer, at the start of training.

    Returns:
        A number of batches.

    Raises:
        MisconfigurationException: If nothing limits the training.
    """
    batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
    if batches == float("inf"):
        raise MisconfigurationException(
            "Expected the length of training to be known for `gates=True`, whose warm-up is a "
            "tenth of it, but neither `max_steps` nor `max_epochs` with a sized dataloader limits "
            "it. Set `max_steps` of the Trainer, or pass `gates=False`."
        )
    return batches
