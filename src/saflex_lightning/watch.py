"""What is seen at the last linear layer: validation rows, remembered, and the training batch."""

from collections.abc import Callable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from .bank import FeatureBank
from .engines import LastLayer, Scores
from .functional import ReduceSum, dense_target, widen

__all__ = ["FeatureWatch", "find_last_layer"]


def find_last_layer(module: nn.Module, head: nn.Module | None, wanted_by: str) -> LastLayer:
    """Return the watcher of the layer at which evidence is gathered.

    Args:
        module: The model.
        head: What `SAflexMixin.saflex_head` returned.
        wanted_by: The setting that needs it, as in ``"`gates=True`"``.

    Returns:
        The watcher.
    """
    instead = "Name the layer with `saflex_head()`, or leave that setting out."
    return LastLayer(module, head, wanted_by=wanted_by, instead=instead)


class FeatureWatch:
    """See the features and logits of every forward, and remember those of validation rows.

    Args:
        wanted_by: The setting that needs it, for errors.
    """

    def __init__(self, wanted_by: str) -> None:
        self.bank = FeatureBank()
        self.wanted_by = wanted_by
        self._seen: tuple[Tensor, Tensor] | None = None

    @property
    def features(self) -> Tensor:
        """Features of the last forward, ``(batch, features)``, in float32 or wider."""
        assert self._seen is not None
        return widen(self._seen[0])

    def start(
        self,
        module: nn.Module,
        head: nn.Module | None,
        *,
        num_rows: int | None,
        device: torch.device,
    ) -> None:
        """Take the model and the validation rows of a fit.

        Args:
            module: The module.
            head: What `SAflexMixin.saflex_head` returned.
            num_rows: Validation rows; None where they cannot be counted.
            device: Where the parameters live.
        """
        self._layer = find_last_layer(module, head, self.wanted_by)
        self.bank.limit(num_rows)
        self.bank.to(device)

    def watched(self, forward: Callable[[], Scores]) -> Callable[[], Scores]:
        """Return a forward that also shows its features and logits.

        Args:
            forward: Computes scores.

        Returns:
            The same scores.
        """
        self._layer.find(forward)

        def watch() -> Scores:
            with self._layer.recorded() as calls:
                scores = forward()
            logits = self._layer.check(scores, calls)
            self._seen = calls[-1][0].detach(), logits.detach()
            return scores

        return watch

    def add_validation(
        self,
        loss: Callable[[Scores], Tensor],
        target: Tensor | None,
        *,
        reduce_sum: ReduceSum | None,
        rank: int,
        world_size: int,
    ) -> None:
        """Remember the validation batch that was scored last.

        Args:
            loss: Computes its mean loss.
            target: Its labels.
            reduce_sum: Adds a tensor over ranks.
            rank: This process.
            world_size: Number of processes.

        Raises:
            MisconfigurationException: If it has no labels.
        """
        if target is None:
            raise MisconfigurationException(
                f"Expected validation batches with class labels for {self.wanted_by}, but the "
                "target is None, as for contrastive scores. Leave that setting out."
            )
        assert self._seen is not None
        logits = widen(self._seen[1]).requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss(logits), logits)
        self.bank.add(
            self.features,
            len(logits) * gradient,
            dense_target(target, logits.shape[-1], logits.dtype),
            reduce_sum=reduce_sum,
            rank=rank,
            world_size=world_size,
        )
