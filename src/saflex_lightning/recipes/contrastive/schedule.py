"""AdamW with a learning rate that rises for some steps and then falls along half a cosine."""

import math

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["make_warm_up_adamw", "warm_up_cosine_factor"]


def warm_up_cosine_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate is multiplied with in an optimizer step, in [0, 1].

    Args:
        step: Number of the optimizer step, from 0.
        warmup_steps: Steps of the linear rise; a shorter training never leaves it.
        total_steps: Steps of the whole training, where half a cosine ends at 0.

    Example:
        >>> [warm_up_cosine_factor(step, 2, 6) for step in (0, 1, 2, 4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


def make_warm_up_adamw(
    module: L.LightningModule, *, lr: float, weight_decay: float, warmup_steps: int
) -> OptimizerLRScheduler:
    """Return AdamW over the trainable parameters of a module, for ``configure_optimizers``.

    Args:
        module: A module that its Trainer has been attached to.
        lr: Largest learning rate.
        weight_decay: Decoupled.
        warmup_steps: See `warm_up_cosine_factor`; stepped once per optimizer step.

    Raises:
        MisconfigurationException: If the training has no end.
    """
    steps = module.trainer.estimated_stepping_batches
    if math.isinf(steps):
        raise MisconfigurationException(
            "Expected the Trainer to have an end, but `max_epochs` is -1 and there are no "
            "`max_steps`. Set one of them: the learning rate falls until then."
        )
    params = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = AdamW(params, lr=lr, weight_decay=weight_decay)
    scheduler = LambdaLR(
        optimizer, lambda step: warm_up_cosine_factor(step, warmup_steps, int(steps))
    )
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
    }
