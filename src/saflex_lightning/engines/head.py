"""The default engine: the last linear layer alone, in closed form, without an extra pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saflex_lightning.functional.losses import Scores

from .direction import Direction
from .engine import Finish
from .errors import UnsupportedModelError
from .untouched import extra_pass

__all__ = ["INSTEAD", "HeadEngine", "LastLayer", "Recording", "linear_jvp"]

# What to do where no last layer makes the scores.
INSTEAD = "Pass engine='forward_mode', or name the layer with `saflex_head()`."
# Nodes of a graph that leave every value in its place; views keep the order of values.
_COPIES = (
    "AliasBackward0",
    "CloneBackward0",
    "ReshapeAliasBackward0",
    "SqueezeBackward0",
    "SqueezeBackward1",
    "ToCopyBackward0",
    "UnsafeViewBackward0",
    "UnsqueezeBackward0",
    "ViewBackward0",
)


def linear_jvp(features: Tensor, direction: Direction) -> Tensor:
    r"""Return :math:`Z = h T_W^\top + t_b`, how a linear layer's output moves along a direction.

    ``direction`` has the parts of the weight ``(classes, features)`` and, maybe, the bias.
    """
    wide = torch.promote_types(features.dtype, direction.norm.dtype)
    weight, *bias = (part.to(wide) for part in direction.parts)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        features = features.to(wide)
        jvp = torch.addmm(bias[0], features, weight.T) if bias else features @ weight.T
        return jvp * direction.norm


class LastLayer:
    """The linear layer whose output is the scores.

    Args:
        module: The model.
        layer: The layer.
        name: Its name, for errors.
        wanted_by: The setting that needs it, for errors.
    """

    def __init__(self, module: nn.Module, layer: nn.Linear, name: str, *, wanted_by: str) -> None:
        self.module = module
        self.layer = layer
        self.name = name
        self.wanted_by = wanted_by

    def record(self) -> "Recording":
        """Begin to record what the layer sees, until `Recording.take`."""
        return Recording(self)


class Recording:
    """The input and output of a layer's last call in one forward."""

    def __init__(self, last: LastLayer) -> None:
        self._last = last
        self._output: Tensor | None = None
        self._handle = last.layer.register_forward_hook(self._note, with_kwargs=True)

    def _note(
        self, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        self._features = (args[0] if args else kwargs["input"]).detach()
        self._output, self._node, self._version = output, output.grad_fn, output._version

    def close(self) -> None:
        """End it."""
        self._handle.remove()

    def take(self, scores: Scores) -> Tensor:
        """End it and return the layer's input, ``(batch, features)``.

        Raises:
            UnsupportedModelError: If the scores are not the layer's output.
        """
        self.close()
        last, output, self._output = self._last, self._output, None
        if output is None:
            raise UnsupportedModelError(
                f"Expected submodule `{last.name}` to be called for {last.wanted_by}, but no call "
                "was seen; a compiled model hides its layers. Leave the head out of what "
                f"`torch.compile` takes. {INSTEAD}"
            )
        if not isinstance(scores, Tensor) or self._features.ndim != 2:
            raise UnsupportedModelError(
                f"Expected submodule `{last.name}` to map (batch, features) to the scores, but the "
                f"model does something else with it. {INSTEAD}"
            )
        unchanged = output._version == self._version
        if not (unchanged and same_values(scores, output, self._node)):
            raise UnsupportedModelError(
                f"Expected the output of submodule `{last.name}` to be the scores, but they "
                f"differ. {INSTEAD}"
            )
        return self._features


def same_values(scores: Tensor, source: Tensor, node: Any = None) -> bool:
    """Say whether scores are a tensor, a copy or a cast of it, with every value in its place.

    Graphs tell (``node`` is what the source's was when it was made); without one, values are
    compared, which waits for the device.
    """
    if scores is source:
        return True
    node = source.grad_fn if node is None else node
    if scores.shape != source.shape or (scores.grad_fn is None) != (node is None):
        return False
    if node is None:
        return torch.equal(scores.detach().nan_to_num(), source.detach().to(scores).nan_to_num())
    found: Any = scores.grad_fn
    while found is not node and found.name() in _COPIES:
        found = found.next_functions[0][0]
    return found is node


class HeadEngine:
    r"""Compute Z of the last linear layer from its input h: :math:`Z = h T_W^\top + t_b`.

    Exact for the parameters of that layer and blind to all others: a different, cheaper
    algorithm. Neither the validation pass nor the training pass needs an extra backward or forward.
    """

    name = "head"
    repeats_forward = False

    def __init__(self, last: LastLayer) -> None:
        self.last = last

    @property
    def params(self) -> list[Tensor]:
        """The layer's weight and, where it has one that is trainable, its bias."""
        layer = self.last.layer
        bias = layer._parameters["bias"]
        return [layer.weight] if bias is None or not bias.requires_grad else [layer.weight, bias]

    def gradient(
        self, run: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the gradient of the loss for the layer, without a backward pass through it."""
        recording = self.last.record()
        try:
            with torch.no_grad(), extra_pass(self.last.module):
                scores = run()
        finally:
            recording.close()
        features = recording.take(scores)
        assert isinstance(scores, Tensor)
        wide = torch.promote_types(scores.dtype, torch.float32)
        logits = scores.detach().to(wide).requires_grad_()
        with torch.enable_grad():
            (residual,) = torch.autograd.grad(loss(logits), logits)
        with torch.autocast(features.device.type, enabled=False):
            weight = residual.T @ features.to(residual.dtype)
        return (weight, residual.sum(0))[: len(self.params)]

    def jvp(self, run: Callable[[], Scores], direction: Direction) -> Finish:
        """Record what the layer sees in the training forward that follows."""
        recording = self.last.record()
        return Finish(lambda scores: linear_jvp(recording.take(scores), direction), recording.close)
