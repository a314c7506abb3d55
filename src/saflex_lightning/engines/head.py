"""The cheap engine: the last linear layer alone, in closed form."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saflex_lightning.functional import widen

from .errors import UnsupportedModelError
from .gradient import evaluate
from .last_layer import LastLayer
from .parameters import Scores
from .precision import full_precision
from .tangent import Tangent

__all__ = ["HeadEngine"]

_INSTEAD = "Pass engine='finite_difference', or name the layer with `saflex_head()`."


class HeadEngine:
    r"""Compute Z of the last linear layer from its input h: :math:`Z = h T_W^\top + t_b`.

    Exact for the parameters of that layer and blind to all others: a different, cheaper
    algorithm. Neither the validation pass nor the training pass needs an extra backward or forward.

    Args:
        module: The model.
        head: The layer whose output is the scores; None finds the last ``nn.Linear`` called.

    Raises:
        UnsupportedModelError: If the model has no linear layer, or the head is frozen or of
            another type.
    """

    name = "head"

    def __init__(self, module: nn.Module, head: nn.Module | None = None) -> None:
        self.module = module
        self._last = LastLayer(module, head, wanted_by="engine='head'", instead=_INSTEAD)
        if self._last.layer is not None:
            _check_parameters(self._last.layer)

    @property
    def head(self) -> nn.Linear:
        """The layer in use.

        Returns:
            The linear layer whose output is the scores.

        Raises:
            RuntimeError: If no pass has been run yet to find it.
        """
        if self._last.layer is None:
            raise RuntimeError("Expected `gradient` to be called once before `head` is read.")
        return self._last.layer

    @property
    def params(self) -> list[Tensor]:
        """The head's weight and, where it has one that is trainable, its bias.

        Returns:
            One or two parameters.
        """
        bias = self.head._parameters["bias"]
        if bias is None or not bias.requires_grad:
            return [self.head.weight]
        return [self.head.weight, bias]

    def gradient(
        self, forward: Callable[[], Scores], loss: Callable[[Scores], Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the head's gradient of the validation loss, without a backward pass.

        Args:
            forward: Computes the scores of a validation batch.
            loss: Computes its mean loss.

        Returns:
            One tensor per parameter, in float32 or wider: ``(classes, features)`` and, with a bias,
            ``(classes,)``.
        """
        _check_parameters(self._last.find(forward))
        with self._last.recorded() as inputs:
            scores = evaluate(self.module, forward)
        scores = widen(self._last.check(scores, inputs).detach()).requires_grad_()
        with torch.enable_grad():
            (residual,) = torch.autograd.grad(loss(scores), scores)
        features = inputs[-1][0].to(residual.dtype)
        return (residual.T @ features, residual.sum(0))[: len(self.params)]

    def measure(
        self,
        forward: Callable[[], Scores],
        tangent: Tangent,
        *,
        probe: Callable[[], Scores] | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Scores, Scores]:
        """Run the training forward and return its scores with their tangent.

        Args:
            forward: The training forward; called exactly once.
            tangent: Direction of the derivative, for the head's parameters.
            probe: Finds the head where `gradient` has not yet; not needed otherwise.
            rows: Rows of the batch whose tangent is wanted, int64; None means all.

        Returns:
            The scores with their graph, and the detached tangent of the rows.
        """
        # A resumed run has a tangent before its first gradient.
        _check_parameters(self._last.find(probe or forward))
        with self._last.recorded() as inputs:
            scores = forward()
        self._last.check(scores, inputs)
        features = inputs[-1][0].detach()
        if rows is not None:
            features = features[rows]
        wide = torch.promote_types(features.dtype, tangent.norm.dtype)
        with full_precision(self.params), torch.no_grad():
            product = features.to(wide) @ tangent.direction[0].to(wide).T
            if len(tangent.direction) > 1:
                product = product + tangent.direction[1].to(wide)
            return scores, product * tangent.norm


def _check_parameters(head: nn.Linear) -> None:
    if "weight" not in head._parameters:
        raise UnsupportedModelError(
            "Expected the weight of the last linear layer to be a parameter for engine='head', but "
            f"it is computed from others (weight or spectral norm). {_INSTEAD}"
        )
    if not head.weight.requires_grad:
        raise UnsupportedModelError(
            "Expected the last linear layer to be trainable for engine='head', but it is frozen. "
            f"{_INSTEAD}"
        )
