"""Who works on a training step: the module is armed, asks for the loss, and is disarmed."""

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException

from .mixin import SAflexMixin
from .step import SAflexStep

__all__ = ["Arming"]


class Arming:
    """Give steps to a module and take them back, and notice when the module asks for no loss."""

    def __init__(self) -> None:
        self._step: SAflexStep | None = None
        self._armed_steps = 0  # of this epoch
        self._loss_calls = 0

    def check_free(self, module: SAflexMixin) -> None:
        """Refuse a module that another callback has armed.

        Args:
            module: The module.

        Raises:
            MisconfigurationException: If it holds a step that is not ours.
        """
        if module._saflex_step is not self._step:
            raise MisconfigurationException(
                "Expected one `SAflexCallback` at work in a training step, but another one has "
                "already armed the module. Remove one of them from the Trainer's callbacks."
            )

    def arm(self, module: SAflexMixin, step: SAflexStep | None) -> None:
        """Hand a step to the module; another callback's step is not ours to clear.

        Args:
            module: The module.
            step: The step, or None where the training batch is not refined.
        """
        if module._saflex_step is self._step:
            module._saflex_step = step
        self._step = step

    def disarm(self, module: SAflexMixin) -> SAflexStep | None:
        """Take the step back.

        Args:
            module: The module.

        Returns:
            The step, where there was one and the module asked for its loss.
        """
        step, self._step = self._step, None
        if step is None:
            return None
        module._saflex_step = None
        self._armed_steps += 1
        if step.options_seen is None:
            return None
        self._loss_calls += 1
        return step

    def end_epoch(self, module: pl.LightningModule) -> None:
        """Refuse to go on when an epoch of armed steps never asked for the loss.

        Args:
            module: The module.

        Raises:
            MisconfigurationException: If it did not.
        """
        if self._armed_steps and not self._loss_calls:
            raise MisconfigurationException(
                f"Expected `training_step` of {type(module).__name__} to call "
                f"`self.saflex_loss(...)`, but it was not called in {self._armed_steps} steps. "
                "Return the loss that `saflex_loss` computes from the logits of `saflex_forward`."
            )
        self._armed_steps = self._loss_calls = 0
