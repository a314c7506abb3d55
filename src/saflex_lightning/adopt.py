"""How a fit meets a module that nobody edited: by watching its own steps.

The one cross-entropy that ``training_step`` computes is answered with the refined loss, and
validation rows go through ``validation_step`` up to the same call.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .batch import AugmentedBatch
from .engines.untouched import untouched_generators
from .functional.losses import LossOptions, check_target, looking_is_free
from .module import Edited, Reading, SAflexMixin
from .step import Step
from .validation.stream import overrides

__all__ = ["Adopted", "serve"]

_BINARY = (F.binary_cross_entropy_with_logits, F.binary_cross_entropy)


def serve(module: Any) -> "Adopted | Edited":
    """Return what a fit needs of a module."""
    return Edited(module) if isinstance(module, SAflexMixin) else Adopted(module)


class LossCall(NamedTuple):
    """The arguments of `torch.nn.functional.cross_entropy`."""

    input: Tensor
    target: Tensor
    weight: Tensor | None = None
    size_average: bool | None = None
    ignore_index: int = -100
    reduce: bool | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0

    @property
    def is_trained(self) -> bool:
        """Whether a gradient will flow through the loss."""
        return torch.is_grad_enabled() and self.input.requires_grad

    @property
    def is_plain_mean(self) -> bool:
        """Whether it is the mean over all rows, which the refined loss takes the place of."""
        old = self.size_average is not None or self.reduce is not None
        return self.reduction == "mean" and not old and self.ignore_index < 0


class _Interception(TorchFunctionMode):
    """Answers cross-entropies in the place of torch while the block runs."""

    def __init__(self, answer: Callable[[LossCall], Tensor]) -> None:
        super().__init__()
        self._answer = answer
        self.is_binary = False  # whether a binary cross-entropy was seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.cross_entropy:
            return self._answer(LossCall(*args, **kwargs))
        if func in _BINARY:
            self.is_binary = True
        return func(*args, **kwargs)


class _Known(BaseException):  # no step catches it by accident
    """Ends a step whose logits are known."""

    def __init__(self, call: LossCall) -> None:
        self.call = call


class _Refined:
    """Takes the place of a module's ``training_step``; a copy of the module has its own."""

    def __init__(self, module: Any, function: Callable[..., Any]) -> None:
        self._module, self._function = module, function
        own = module.training_step
        update_wrapper(self, getattr(own, "__wrapped__", own))  # Lightning looks at its arguments

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, "training_step")


class Adopted:
    """A module that nobody edited.

    Its ``training_step`` is replaced on the instance for one training batch at a time.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._evaluates_by = ""  # name of the step that computes the loss of validation rows
        self._own_step: Any = None  # `training_step` of the instance, while it is replaced
        self._is_armed = False
        self._has_looked = False  # at the values of a target, which waits for the device

    def head(self) -> nn.Linear | None:
        """Return the layer that the module names by ``saflex_head``, if it has that method."""
        hook = getattr(self._module, "saflex_head", None)
        return None if hook is None else hook()

    # Validation rows

    def read(self, batch: Any) -> Reading:
        """Return a validation batch that goes through the module's own evaluation."""
        return Reading(self._evaluate, batch)

    def _evaluate(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Return logits and target of the loss that the module's evaluation computes.

        Raises:
            MisconfigurationException: If it computes no cross-entropy.
        """
        if self._evaluates_by:
            call, _ = self._evaluate_by(self._evaluates_by, batch)
            if call is not None:
                return call.input, call.target
        is_binary = False
        for name in self._evaluations():
            with untouched_generators(), torch.enable_grad():
                call, was_binary = self._evaluate_by(name, batch)
            is_binary = is_binary or was_binary
            if call is not None and call.input.requires_grad:  # not behind a `no_grad` of its own
                self._evaluates_by = name
                return call.input, call.target
        raise self._refusal(" or ".join(f"`{name}`" for name in self._evaluations()), is_binary)

    def _evaluate_by(self, name: str, batch: Any) -> tuple[LossCall | None, bool]:
        """Run a step by the arguments that Lightning gives it."""
        step = getattr(self._module, name)
        args = [batch]
        if is_param_in_hook_signature(step, "batch_idx", min_args=2):
            args.append(0)
        if is_param_in_hook_signature(step, "dataloader_idx", explicit=True, min_args=3):
            args.append(0)
        return self._loss_call(step, args)

    def _evaluations(self) -> list[str]:
        return ["validation_step"] * overrides(self._module, "validation_step") + ["training_step"]

    def _loss_call(self, step: Callable[..., Any], args: Any) -> tuple[LossCall | None, bool]:
        """Run a step up to its cross-entropy; what it logs and counts is undone by `extra_pass`."""

        def end(call: LossCall) -> Tensor:
            raise _Known(call)

        with _unheard(self._module), _Interception(end) as seen:
            try:
                step(*args)
            except _Known as known:
                return known.call, seen.is_binary
        return None, seen.is_binary

    # Training batches

    def arm(self, step: Step | None) -> None:
        """Replace the module's ``training_step``, which some optimizers call several times."""
        if step is None:
            return
        original = self._module.training_step

        def train(batch: Any, *args: Any) -> Any:
            return self._train(original, step, batch, args)

        self._own_step = vars(self._module).get("training_step")
        vars(self._module)["training_step"] = _Refined(self._module, train)
        self._is_armed = True

    def disarm(self) -> None:
        """Give the module its ``training_step`` back."""
        if self._is_armed:
            self._is_armed = False
            del vars(self._module)["training_step"]
            if self._own_step is not None:
                vars(self._module)["training_step"] = self._own_step
            self._own_step = None

    def _train(
        self, training_step: Callable[..., Any], step: Step, batch: Any, args: tuple[Any, ...]
    ) -> Any:
        """Run the module's own ``training_step`` with the refined loss.

        Raises:
            MisconfigurationException: If it computes no cross-entropy, or more than one.
        """
        name, before = type(self._module).__name__, len(step.calls)

        def run() -> Tensor:
            call, is_binary = self._loss_call(training_step, (batch, *args))
            if call is None:
                raise self._refusal("`training_step`", is_binary)
            return call.input

        def refine(call: LossCall) -> Tensor:
            if not call.is_trained:
                return F.cross_entropy(*call)
            if len(step.calls) > before:
                raise MisconfigurationException(
                    f"Expected one cross-entropy in a training step, but `training_step` of {name} "
                    "computes several, and which one to refine cannot be told. Derive the module "
                    "from `SAflexMixin` and name it by `saflex_forward` and `saflex_loss`."
                )
            look = not self._has_looked or looking_is_free(call.target.device)
            _check_call(call, batch, look=look)
            self._has_looked = True
            step.end(call.input)
            return step.loss(
                call.input, call.target, LossOptions(call.weight, call.label_smoothing)
            )

        step.begin(run, (batch, args))
        with _Interception(refine) as seen:
            output = training_step(batch, *args)
        if len(step.calls) == before:
            step.close()
            if output is not None:  # else the module skips this batch
                raise self._refusal("`training_step`", seen.is_binary)
        return output

    def _refusal(self, steps: str, is_binary: bool) -> MisconfigurationException:
        advice = (
            "it computes a binary cross-entropy. For one label per row, give the model two logits "
            "and use `F.cross_entropy`; several labels per row are not served."
            if is_binary
            else "none was seen; a compiled one is hidden. Derive the module from `SAflexMixin`, "
            "and use `saflex_forward` and `saflex_loss` in `training_step`."
        )
        return MisconfigurationException(
            f"Expected {steps} of {type(self._module).__name__} to compute its loss by "
            f"`torch.nn.functional.cross_entropy` or `nn.CrossEntropyLoss`, but {advice}"
        )


def _check_call(call: LossCall, batch: Any, *, look: bool) -> None:
    """Refuse a loss that is no mean over the rows of the batch, in their order.

    Raises:
        MisconfigurationException: If it is not.
    """
    if not call.is_plain_mean:
        raise MisconfigurationException(
            "Expected the mean cross-entropy over all rows of the batch, but got "
            f"reduction={call.reduction!r} and ignore_index={call.ignore_index}. Use the mean "
            "without `ignore_index`, or derive the module from `SAflexMixin`."
        )
    check_target(call.target, call.input, values=look)
    if isinstance(batch, AugmentedBatch) and call.target is not batch.target:
        expected = batch.target
        same = expected is not None and expected.shape == call.target.shape
        if expected is None or not same or (look and not torch.equal(expected, call.target)):
            raise MisconfigurationException(
                "Expected the loss to see the rows of the `AugmentedBatch` in their order, but its "
                "target is another one than that of the batch. Mix or permute rows before the "
                "batch is made, or derive the module from `SAflexMixin`."
            )


@contextmanager
def _unheard(module: nn.Module) -> Iterator[None]:
    """Run a step beside the training: what it logs is dropped, and metrics count in copies."""
    kept: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for part in module.modules():
        values = vars(part)
        found = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        kept.append((values, found))
        values.update({name: value.clone() for name, value in found.items()})
    logs = {name: vars(module).get(name) for name in ("log", "log_dict")}
    vars(module).update(dict.fromkeys(logs, _ignore))
    try:
        yield
    finally:
        for values, found in kept:
            values.update(found)
        for name, value in logs.items():
            if value is None:
                del vars(module)[name]
            else:
                vars(module)[name] = value


def _ignore(*_args: Any, **_kwargs: Any) -> None:
    """Take the place of ``log``."""
