"""Weights between the first and the last of a fine-tuning (WiSE-FT)."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.contrastive.evaluating import evaluating
from saflex_lightning.recipes.contrastive.metrics import MacroF1

__all__ = ["WeightEnsembling", "mix_states"]

State = Mapping[str, Tensor]


def mix_states(start: State, end: State, alpha: float) -> dict[str, Tensor]:
    r"""Return :math:`(1 - \alpha)\, \theta_0 + \alpha\, \theta_1`, entry by entry.

    Args:
        start: State dictionary before fine-tuning.
        end: The same after it.
        alpha: In [0, 1]; 0 returns ``start`` and 1 ``end``, to the bit.

    Returns:
        A state dictionary; entries that are not floating point (counters) are those of ``end``.

    References:
        Wortsman et al. 2022, section 3, step 2.
    """
    if alpha in {0.0, 1.0}:
        return dict(start if alpha == 0.0 else end)
    return {
        name: torch.lerp(start[name].to(value), value, alpha)
        if value.is_floating_point()
        else value
        for name, value in end.items()
    }


class WeightEnsembling(L.Callback):
    """Replace the weights after training by the mixture with the best validation macro F1.

    The module's ``forward`` returns class scores of the inputs of a validation batch. The first
    validation loader picks, which must be in distribution; what it picks is then tested.
    Checkpoints that were saved during training hold the weights of training. The validation rows
    select here: where they also steer SAFLEX, their own score is too good twice over.

    Args:
        intervals: The mixtures tried are 0, 1/intervals, ..., 1.
        filepath: Checkpoint to write with the picked weights, so that another command can test
            them; None writes none.

    Attributes:
        alpha: What was picked; the smallest of equally good ones. None before.
        scores: Macro F1 of every mixture tried.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If ``intervals`` is not positive.
    """

    def __init__(self, intervals: int = 10, *, filepath: str | None = None) -> None:
        check("a positive integer", intervals=intervals)
        check("a path", optional=True, filepath=filepath)
        self.intervals = intervals
        self.filepath = filepath
        self.alpha: float | None = None
        self.scores: dict[float, float] = {}
        self._start: dict[str, Tensor] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget an earlier fit; a checkpoint's state is loaded after this hook."""
        if stage == "fit":
            self._start, self.scores, self.alpha = {}, {}, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse to train where nothing could pick, or the start that was saved cannot be mixed in.

        Raises:
            MisconfigurationException: If there are no validation rows, or a checkpoint brought the
                start of another model.
        """
        if self._start and _shapes_of(self._start) != _shapes_of(pl_module.state_dict()):
            raise MisconfigurationException(
                "Expected the state of `WeightEnsembling` in the checkpoint to be that of this "
                "model, but its tensors have other names or shapes. Resume with the model that "
                "wrote it."
            )
        enabled = trainer.enable_validation  # type: ignore[attr-defined]
        if enabled and trainer.val_dataloaders is None:  # loaded before the first validation
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.setup_data()
            trainer.training = True
        if not enabled or not sum(trainer.num_val_batches):
            raise MisconfigurationException(
                "Expected validation rows for `WeightEnsembling` to pick a mixture by, but the "
                "Trainer has none. Pass a validation dataloader, or remove the callback."
            )

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep a copy of the weights, on the CPU, unless a checkpoint brought that of its start.

        The first epoch starts after every callback's ``on_train_start``: where `FitHeadFirst` fits
        a head, the copy has it.
        """
        self._start = self._start or _copy_state(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Score every mixture, load the best and write it down where that was asked for."""
        end = _copy_state(pl_module)
        for step in range(self.intervals + 1):
            alpha = step / self.intervals
            pl_module.load_state_dict(mix_states(self._start, end, alpha))
            self.scores[alpha] = _score(trainer, pl_module)
        self.alpha = max(self.scores, key=lambda alpha: self.scores[alpha])
        pl_module.load_state_dict(mix_states(self._start, end, self.alpha))
        if self.filepath is not None:
            trainer.save_checkpoint(self.filepath, weights_only=True)
        rank_zero_info(
            f"Weight ensembling: alpha {self.alpha:g} of the fine-tuned weights, validation macro "
            f"F1 {self.scores[self.alpha]:.4f} (fine-tuned alone: {self.scores[1.0]:.4f})."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the weights that training started from, so that a resumed run can mix them."""
        return {"start": self._start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the weights that training started from.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            TypeError: If it is something else.
        """
        check("a mapping of names to values", start=state_dict.get("start"))
        self._start = dict(state_dict["start"])


def _copy_state(module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}


def _shapes_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "shape", None) for name, value in state.items()}


@torch.no_grad()
def _score(trainer: L.Trainer, module: L.LightningModule) -> float:
    """Return the macro F1 over the first validation loader, the same on every rank."""
    loaders: Any = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    metric = MacroF1(module.num_classes).to(module.device)  # type: ignore[arg-type]
    with evaluating(module), trainer.precision_plugin.val_step_context():
        # The Trainer may ask for a part of the loader; the limit can be infinite.
        for number, batch in enumerate(loader):
            if number >= trainer.num_val_batches[0]:
                break
            inputs, target = trainer.strategy.batch_to_device(batch, dataloader_idx=0)[:2]
            metric.update(module(inputs), target)
    return metric.compute().item()
