"""What a LightningModule needs so that a training step can be refined, and how a fit meets it."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from .batch import AugmentedBatch, read_batch
from .functional.losses import LossOptions, Scores, as_tuple, mean_cross_entropy
from .functional.solve import SAflexSolution
from .step import Step

__all__ = ["Edited", "Reading", "SAflexMixin"]


class SAflexMixin:
    """Give a LightningModule a refined loss; put it before `LightningModule` among the bases.

    Write ``training_step`` with `saflex_forward` and `saflex_loss`. Without `SAflexCallback` in the
    Trainer, and outside its training steps, they are ``self(...)`` and ``F.cross_entropy``.

    Attributes:
        saflex_solution: Weights and soft labels of the last refined loss, detached; a tuple of
            them when the scores are a tuple; None when the last loss was plain.
    """

    if TYPE_CHECKING:  # TorchScript compiles the types of annotated attributes
        saflex_solution: SAflexSolution | tuple[SAflexSolution, ...] | None
        _saflex_step: Step | None
        _saflex_batch: Any
    else:
        saflex_solution = None
        _saflex_step = None
        _saflex_batch = None  # of the `training_step` that runs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "training_step" in vars(cls):
            cls.training_step = _with_batch_at_hand(vars(cls)["training_step"])

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the step and the batch at hand; no copy can hold the graph of a step."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[misc]
        at_hand = {"_saflex_step", "_saflex_batch"}
        return {name: value for name, value in state.items() if name not in at_hand}

    # Hooks to override

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
        """Return the linear layer that makes the logits; None, the default, finds it."""
        return None

    def saflex_group_names(self) -> Sequence[str] | None:
        """Return what each value of ``AugmentedBatch.group`` stands for, for ``row_evidence=True``.

        A datamodule that has this method is asked first.

        Returns:
            One name per group, the first for clean rows; None where it is not known.
        """
        return None

    def saflex_val_batch(self, batch: Any) -> tuple[Any, Tensor | None]:
        """Return inputs and target of a validation batch; override it for other layouts.

        Args:
            batch: What the validation dataloader yields, on the device: a tuple or list whose
                first two fields are meant, or a mapping or dataclass with one input (``inputs``,
                ``x``, ``image`` and the like) and one target (``target``, ``y``, ``label``).

        Returns:
            Inputs for `saflex_scores` (a tuple is splatted, a dict passed as keywords) and the
            target; None as target means contrastive scores, whose target is the diagonal.
        """
        return read_batch(batch)

    # What a training step calls

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
            UnsupportedModelError: If the engine cannot differentiate the model.
        """
        step = self._saflex_step
        if step is None or not torch.is_grad_enabled():
            return self.saflex_scores(*inputs, **kwargs)
        return step.forward(self.saflex_scores, inputs, kwargs)

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
            target: Upstream labels, ``(batch,)`` integers or ``(batch, classes)`` float. None takes
                the target of the `AugmentedBatch` that ``training_step`` was given; without one,
                and for a tuple of scores, these are contrastive and their target is the diagonal
                (of the columns of this rank, where features were gathered).
            augmented: True where a row is refined, ``(batch,)`` bool; None refines every row. An
                `AugmentedBatch` brings its own mask, and then this must be None.
            group: What made each row, ``(batch,)`` int64, 0 for clean rows; read with
                ``row_evidence=True`` where the batch is not an `AugmentedBatch`, which brings its
                own.
            index: Identity of each row across epochs, ``(batch,)`` int64; read likewise.
            class_weight: ``(classes,)``; enters the validation gradient too, from the second
                refined step on (the first one keeps plain weights).
            label_smoothing: In [0, 1); likewise.
            **unsupported: Refused by name, ``ignore_index`` among them.

        Returns:
            Scalar.

        Raises:
            TypeError: If an unknown option is passed, or the target's dtype does not fit.
            ValueError: If shapes do not fit, labels are out of range, or the logits are not those
                of a `saflex_forward` in this step.
            MisconfigurationException: If `saflex_forward` was not called in this step.
        """
        if unsupported:
            raise TypeError(_unsupported_message(unsupported))
        step, options = self._saflex_step, LossOptions(class_weight, label_smoothing)
        batch = self._saflex_batch
        if batch is None and step is not None:  # `training_step` is that of a class without us
            batch = step.batch
        if target is None and isinstance(logits, Tensor) and isinstance(batch, AugmentedBatch):
            target = batch.target
        if step is None or not torch.is_grad_enabled():
            self.__dict__.pop("saflex_solution", None)
            return mean_cross_entropy(as_tuple(logits), target, options, check="shapes")
        loss = step.loss(logits, target, options, augmented, group, index)
        solutions = tuple(task.solution for task in step.tasks)
        one = isinstance(logits, Tensor) and bool(solutions)
        self.saflex_solution = solutions[0] if one else solutions or None
        return loss


def _with_batch_at_hand(training_step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `training_step` whose module knows the batch while it runs."""

    @wraps(training_step)
    def step(self: SAflexMixin, *args: Any, **kwargs: Any) -> Any:
        before = self._saflex_batch
        self._saflex_batch = args[0] if args else kwargs.get("batch")
        try:
            return training_step(self, *args, **kwargs)
        finally:
            self._saflex_batch = before

    return step


class Reading:
    """A validation batch as its module reads it.

    Args:
        score: Returns the scores of the inputs, and their target.
        inputs: What of the batch the module looks at.
        is_contrastive: Whether there is no target, since the scores are of pairs.
    """

    def __init__(
        self,
        score: Callable[[Any], tuple[Scores, Tensor | None]],
        inputs: Any,
        *,
        is_contrastive: bool = False,
    ) -> None:
        self._score, self._inputs = score, inputs
        self.is_contrastive = is_contrastive
        self.target: Tensor | None = None  # of the last run

    def run(self) -> Scores:
        """Return the scores of the rows."""
        scores, self.target = self._score(self._inputs)
        return scores

    def copied(self) -> "Reading":
        """Return a reading of copies, for a forward that may write in its inputs."""
        inputs = apply_to_collection(self._inputs, Tensor, torch.clone)
        return Reading(self._score, inputs, is_contrastive=self.is_contrastive)


class Edited:
    """What a fit does with a module that derives from `SAflexMixin`."""

    def __init__(self, module: SAflexMixin) -> None:
        self._module = module

    def head(self) -> nn.Linear | None:
        """Return the layer that the module names as the one that makes its scores."""
        return self._module.saflex_head()

    def read(self, batch: Any) -> Reading:
        """Return a validation batch as the module reads it."""
        inputs, target = self._module.saflex_val_batch(batch)

        def score(inputs: Any) -> tuple[Scores, Tensor | None]:
            if isinstance(inputs, dict):
                return self._module.saflex_scores(**inputs), target
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            return self._module.saflex_scores(*args), target

        return Reading(score, inputs, is_contrastive=target is None)

    def arm(self, step: Step | None) -> None:
        """Hand a step to the module, or none."""
        self._module._saflex_step = step

    def disarm(self) -> None:
        """Take back the step."""
        self._module._saflex_step = None


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
