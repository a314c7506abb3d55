"""What a LightningModule needs so that a training step can be refined."""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .batch import AugmentedBatch
from .engines import Scores
from .functional import SAflexSolution
from .inputs import unwritten
from .plain_loss import LossOptions, mean_cross_entropy
from .step import SAflexStep
from .val_batch import read_batch

__all__ = ["SAflexMixin"]


class SAflexMixin:
    """Give a LightningModule a refined loss; put it before `LightningModule` among the bases.

    Write ``training_step`` with `saflex_forward` and `saflex_loss`. Without `SAflexCallback` in the
    Trainer, and outside its training steps, they are ``self(...)`` and ``F.cross_entropy``.

    Attributes:
        saflex_solution: Weights and soft labels of the last refined loss, detached; a tuple of
            them when the scores are a tuple; None when the last loss was plain.
        saflex_rows_interact: Set it to True where the scores of a row depend on other rows through
            collectives, as with `gather_rows`: the extra pass then runs on whole batches without
            first trying a part of one, which the other ranks might not join.
    """

    saflex_solution: SAflexSolution | tuple[SAflexSolution, ...] | None = None
    saflex_rows_interact: bool = False
    _saflex_step: SAflexStep | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(base.__module__.split(".")[0] == "pytorch_lightning" for base in cls.__mro__):
            raise TypeError(
                f"Expected {cls.__name__} to derive from `lightning.pytorch.LightningModule`, but "
                "it derives from the twin package `pytorch_lightning`. Write "
                "`import lightning.pytorch as pl` in place of `import pytorch_lightning as pl`."
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the step at hand, whose graph no copy can hold."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        return {name: value for name, value in state.items() if name != "_saflex_step"}

    def saflex_scores(self, *inputs: Any, **kwargs: Any) -> Scores:
        """Return the logits of some inputs; override it when ``forward`` returns something else.

        Args:
            *inputs: Positional inputs.
            **kwargs: Keyword inputs.

        Returns:
            Logits ``(batch, classes)``, or a tuple of them, one per proxy task.
        """
        return self(*inputs, **kwargs)  # type: ignore[operator]

    def saflex_head(self) -> nn.Linear | None:
        """Return the layer that makes the logits, for ``engine="head"``; override to name it.

        Returns:
            A linear layer, or None to take the last one called.
        """
        return None

    def saflex_group_names(self) -> Sequence[str] | None:
        """Return what each value of ``AugmentedBatch.group`` stands for, for ``gates=True``.

        A datamodule that has this method is asked first.

        Returns:
            One name per group, the first for clean rows; None where it is not known.
        """
        return None

    def saflex_val_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Return inputs and target of a validation batch; override it for other layouts.

        Args:
            batch: What the validation dataloader yields, on the device: a tuple or list whose
                first two fields are meant, or a dict or dataclass with (``inputs`` | ``x`` |
                ``image``) and (``target`` | ``y`` | ``label``).

        Returns:
            Inputs for `saflex_scores` (a tuple is splatted, a dict passed as keywords) and the
            target; None as target means contrastive scores, whose target is the diagonal.
        """
        return read_batch(batch)

    def saflex_forward(self, *inputs: Any, **kwargs: Any) -> Scores:
        """Return `saflex_scores`, after measuring how they move along the descent direction.

        Everything extra happens before the one training forward whose scores are returned. It may
        be called several times in a step, each time for its own `saflex_loss`; what is logged is
        then that of the last one.

        Args:
            *inputs: Positional inputs of `saflex_scores`.
            **kwargs: Its keyword inputs.

        Returns:
            The scores with their graph.

        Raises:
            UnsupportedModelError: If the engine cannot differentiate the model, or the forward
                writes in its inputs.
            RuntimeError: If memory runs out in the solve on one of several processes; on a single
                one the step is trained plainly.
        """
        step = self._saflex_step
        if step is None or not torch.is_grad_enabled():
            return self.saflex_scores(*inputs, **kwargs)
        started = time.perf_counter()
        inside = 0.0

        probe_scores = unwritten(self.saflex_scores, (inputs, kwargs))

        def forward() -> Scores:
            nonlocal inside
            begun = time.perf_counter()
            scores = self.saflex_scores(*inputs, **kwargs)
            inside = time.perf_counter() - begun
            return scores

        if step.gathered.watch is not None:
            forward = step.gathered.watch.watched(forward)
        probe, rows = None, None
        passes = step.engine.name != "head"  # which needs none beside the training forward
        if passes and isinstance(step.batch, AugmentedBatch) and not self.saflex_rows_interact:
            mask = step.batch.augmented
            probe, rows = step.rows.probe(probe_scores, inputs, kwargs, mask)
        probe = probe or (lambda: probe_scores(*inputs, **kwargs))
        scores = step.measure(forward, probe, rows)
        step.seconds += time.perf_counter() - started - inside
        return scores

    def saflex_loss(
        self,
        logits: Scores,
        target: Tensor | None = None,
        *,
        augmented: Tensor | None = None,
        group: Tensor | None = None,
        index: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        **unsupported: Any,
    ) -> Tensor:
        r"""Return the mean cross-entropy with learned sample weights and soft labels.

        .. math:: L = \frac{\sum_i w_i \ell_i(y_i)}{\sum_i w_i}

        When the callback has not armed this step it is exactly ``F.cross_entropy`` with the same
        options, averaged over tasks.

        Args:
            logits: What `saflex_forward` returned: ``(batch, classes)``, or a tuple of them.
            target: Upstream labels, ``(batch,)`` int64 or ``(batch, classes)`` float; None for
                contrastive scores, whose target is the diagonal (of the columns of this rank, where
                features were gathered).
            augmented: True where a row is refined, ``(batch,)`` bool; None refines every row. An
                `AugmentedBatch` brings its own mask, and then this must be None.
            group: What made each row, ``(batch,)`` int64, 0 for clean rows; read with
                ``gates=True`` where the batch is not an `AugmentedBatch`, which brings its own.
            index: Identity of each row across epochs, ``(batch,)`` int64; read likewise, with
                ``row_evidence``.
            class_weight: ``(classes,)``; enters the validation gradient too, from the second
                refined step on (the first one keeps plain weights).
            label_smoothing: In [0, 1); likewise.
            **unsupported: Refused by name, ``ignore_index`` among them.

        Returns:
            Scalar.

        Raises:
            TypeError: If an unknown option is passed, or the target's dtype does not fit.
            ValueError: If shapes do not fit, labels are out of range, or it cannot be told which of
                several `saflex_forward` made the logits.
            MisconfigurationException: If `saflex_forward` was not called in this step.
        """
        if unsupported:
            raise TypeError(_unsupported_message(unsupported))
        step, options = self._saflex_step, LossOptions(class_weight, label_smoothing)
        self.saflex_solution = None
        if step is None or not torch.is_grad_enabled():
            return mean_cross_entropy(logits, target, options)
        if step.out_of_memory:
            step.options_seen = options
            return mean_cross_entropy(logits, target, options)
        started = time.perf_counter()
        loss = step.refine(logits, target, options, augmented, group, index)
        if step.solutions:
            one = isinstance(logits, Tensor)
            self.saflex_solution = step.solutions[0] if one else step.solutions
        step.seconds += time.perf_counter() - started
        return loss


def _unsupported_message(options: dict[str, Any]) -> str:
    advice = {
        "ignore_index": "Drop the ignored rows before the loss.",
        "weight": "Pass class weights as `class_weight`.",
        "reduction": "The loss is always the weighted mean.",
        "pos_weight": "Binary cross-entropy is not supported; give the model two logits.",
    }
    names = sorted(options)
    hints = [advice[name] for name in names if name in advice] or ["Remove them."]
    return (
        "Expected `saflex_loss` options `augmented`, `group`, `index`, `class_weight` "
        "and `label_smoothing`, but got "
        + ", ".join(f"`{name}`" for name in names)
        + ". "
        + " ".join(hints)
    )
