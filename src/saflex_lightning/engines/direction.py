"""The direction in parameter space along which the validation loss falls: the sign is made here."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Direction", "adam_second_moments", "descent_direction", "joint_norm", "whole_tensor"]

_DAMPING = 0.1  # of the root mean square of sqrt(v); Adam's own 1e-8 lets dead units dominate
_torch: Any = torch  # joined operations are documented, and exported under private names alone


class Direction(NamedTuple):
    """A direction in parameter space, kept as a unit vector and its length.

    Attributes:
        parts: One tensor per matched parameter; together of norm 1, or all 0.
        norm: Length of the direction before scaling, scalar.
    """

    parts: tuple[Tensor, ...]
    norm: Tensor


def descent_direction(
    gradient: Sequence[Tensor], second_moments: Sequence[Tensor] | None = None
) -> Direction:
    r"""Return the direction in which the validation loss falls: the one owner of Pi's sign.

    .. math:: t = -g \quad\text{or}\quad t = -g / (\sqrt{\hat v} + \epsilon)

    with epsilon a tenth of the root mean square of all entries of :math:`\sqrt{\hat v}` (1 where
    all of v is 0). Scores that grow along t are scores whose growth lowers the validation loss.

    Args:
        gradient: g, one tensor per matched parameter.
        second_moments: Adam's bias-corrected v, one tensor per parameter; None means no
            preconditioning.

    Returns:
        The direction as a unit vector and its length.

    References:
        Ding et al. 2024, Eq. 8 and 9, with the minus that the paper leaves out.
    """
    # Adam treats complex parameters as pairs of real ones, their second moments too.
    pairs = [_as_real(part) for part in gradient]
    if second_moments is None:
        ascent = _torch._foreach_mul(pairs, 1)
    else:
        roots = _torch._foreach_sqrt([_as_real(moment) for moment in second_moments])
        rms = joint_norm(roots) / sum(root.numel() for root in roots) ** 0.5
        _torch._foreach_add_(roots, torch.where(rms > 0, _DAMPING * rms, 1))
        ascent = [torch.div(part, root, out=root) for part, root in zip(pairs, roots, strict=True)]
    norm = joint_norm(ascent)
    _torch._foreach_div_(ascent, -torch.where(norm > 0, norm, 1))
    parts = zip(gradient, ascent, strict=True)
    return Direction(
        tuple(torch.view_as_complex(t) if g.is_complex() else t for g, t in parts), norm
    )


def joint_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm of all entries together, scalar."""
    return torch.linalg.vector_norm(torch.stack(_torch._foreach_norm(tensors)))


def adam_second_moments(
    params: Sequence[Tensor], optimizers: Sequence[torch.optim.Optimizer]
) -> list[Tensor] | None:
    r"""Return Adam's bias-corrected second moments :math:`\hat v = v / (1 - \beta_2^t)`.

    One tensor per parameter in float32 or wider, zeros where an optimizer has not stepped it yet;
    None before the first step of an Adam-like optimizer, or where another kind of optimizer holds
    one of the parameters, for the two kinds of steps have no common scale. Moments that are sharded
    over ranks are gathered.
    """
    wanted, moments, corrections = set(params), dict[Tensor, Tensor](), dict[Tensor, float]()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in wanted.intersection(group["params"]):
                if len(group.get("betas", ())) != 2:
                    return None
                state: Mapping[str, Any] = optimizer.state.get(parameter, {})
                step = state.get("step", group.get("step"))
                found = state.get("exp_avg_sq")
                if step is not None and found is not None and found.shape == parameter.shape:
                    moment = whole_tensor(_widen(found))
                    # 0 before the first step, as where a fused one was skipped for overflow
                    correction = 1 - group["betas"][1] ** step
                    if isinstance(correction, Tensor) and correction.device.type != "cpu":
                        moment = moment / torch.where(correction > 0, correction, 1)
                        correction = 1.0  # waits for no device
                    moments[parameter], corrections[parameter] = moment, float(correction) or 1.0
    if not moments:
        return None
    for parameter in wanted - moments.keys():
        moments[parameter], corrections[parameter] = (
            whole_tensor(_widen(torch.zeros_like(parameter))),
            1.0,
        )
    return list(_torch._foreach_div([moments[p] for p in params], [corrections[p] for p in params]))


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def whole_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor from its ranks; any other is returned as it is."""
    gather = getattr(tensor, "full_tensor", None)  # of `DTensor`
    return tensor if gather is None else gather()
