"""The parameters that are matched, and the engine that follows scores along them."""

import lightning.pytorch as pl
from torch import Tensor

from .engines import ENGINES, Engine, make_engine, select_parameters
from .functional import EngineName
from .mixin import SAflexMixin

__all__ = ["Matching"]


class Matching:
    """Match the parameters that are trained, also where a fine-tuning schedule changes them.

    Args:
        engine: Name of the engine.
        module: The module.
        params: Name patterns of the matched parameters; None takes every trainable one that an
            optimizer of the Trainer holds: the others do not move.
    """

    def __init__(
        self, engine: EngineName, module: pl.LightningModule, params: list[str] | None
    ) -> None:
        self._name: EngineName = engine
        self._patterns = params
        self._build(module)

    def follow(self, module: pl.LightningModule) -> None:
        """Make another engine where other parameters are trainable now than when it was made.

        Args:
            module: The module.

        Raises:
            ValueError: If a pattern matches no trainable parameter any more, or none is trainable.
        """
        if self._name == "head":
            return  # it asks its layer each time
        if list(map(id, self._select(module))) != list(map(id, self.engine.params)):
            self._build(module)

    def fits(self, names: tuple[str, ...]) -> bool:
        """Say whether a direction along some parameters can be followed.

        Args:
            names: Their names; empty where there is none yet.

        Returns:
            False if others are matched. What the head engine matches is not known before its first
            pass; it takes any.
        """
        return not names or self._name == "head" or names == self.names()

    def names(self) -> tuple[str, ...]:
        """Return the names of the matched parameters, in the order of the gradient's parts."""
        return tuple(self._names[parameter] for parameter in self.engine.params)

    def _select(self, module: pl.LightningModule) -> list[Tensor]:
        trainable = select_parameters(module, self._patterns)
        held = {
            parameter
            for optimizer in module.trainer.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        trained = [parameter for parameter in trainable if parameter in held]
        return trained if trained and self._patterns is None else trainable

    def _build(self, module: pl.LightningModule) -> None:
        assert isinstance(module, SAflexMixin)
        self.engine: Engine = (
            make_engine("head", module, params=self._patterns, head=module.saflex_head())
            if self._name == "head"
            else ENGINES[self._name](module, self._select(module))
        )
        self._names: dict[Tensor, str] = {
            parameter: name for name, parameter in module.named_parameters()
        }
