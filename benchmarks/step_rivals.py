"""Other ways to weigh or choose training rows, for `step_time.py`: what one step of each costs.

Each is made for a module with ``net`` and ``val_rows()`` and returns the loss of a batch. They are
as short as they can be and equal to the published ones in what they compute, not in their details.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

RATE = 1e-3  # of the step that is looked ahead
ROWS_AT_A_TIME = 16  # of which gradients are held


def losses_of(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each row."""
    return F.cross_entropy(logits, target, reduction="none")


def positive_mean(scores: Tensor, losses: Tensor) -> Tensor:
    """Return the mean loss, weighed by what is positive of the scores."""
    weights = scores.detach().clamp(min=0)
    return (weights * losses).sum() / weights.sum().clamp(min=1e-12)


def look_ahead(module, losses: Tensor, weights: Tensor) -> Tensor:
    """Return the validation loss after a step of weighted losses, with a graph to the weights."""
    params = dict(module.net.named_parameters())
    grads = torch.autograd.grad((weights * losses).sum(), [*params.values()], create_graph=True)
    moved = {
        name: value - RATE * slope
        for (name, value), slope in zip(params.items(), grads, strict=True)
    }
    inputs, target = module.val_rows()
    return F.cross_entropy(functional_call(module.net, moved, inputs), target)


def learning_to_reweight(module) -> Callable:
    """Weigh by the derivative of a look ahead, by double backward (Ren et al. 2018)."""

    def loss(batch):
        losses = losses_of(module.net(batch.inputs), batch.target)
        weights = torch.zeros_like(losses, requires_grad=True)
        (slope,) = torch.autograd.grad(look_ahead(module, losses, weights), weights)
        return positive_mean(-slope, losses)

    return loss


def meta_weight_net(module) -> Callable:
    """Weigh by a network of the loss, which learns from a look ahead (Shu et al. 2019)."""
    parts = (nn.Linear(1, 100), nn.ReLU(), nn.Linear(100, 1), nn.Sigmoid())
    weigher = nn.Sequential(*parts).to(next(module.net.parameters()).device)
    optimizer = torch.optim.Adam(weigher.parameters(), 1e-3)

    def loss(batch):
        losses = losses_of(module.net(batch.inputs), batch.target)
        column = losses.detach().unsqueeze(1)
        ahead = look_ahead(module, losses, weigher(column).squeeze(1) / len(losses))
        slopes = torch.autograd.grad(ahead, [*weigher.parameters()])
        for parameter, slope in zip(weigher.parameters(), slopes, strict=True):
            parameter.grad = slope
        optimizer.step()
        return positive_mean(weigher(column).squeeze(1), losses)

    return loss


def per_sample_gradients(module) -> Callable:
    """Weigh by the inner product of each row's gradient, by vmap, with that of validation rows."""

    def loss(batch):
        params = dict(module.net.named_parameters())
        inputs, target = module.val_rows()
        slopes = torch.autograd.grad(
            F.cross_entropy(module.net(inputs), target), [*params.values()]
        )

        def row_loss(params, row, label):
            return F.cross_entropy(functional_call(module.net, params, row[None]), label[None])

        def product(row, label):
            own = grad(row_loss)(params, row, label)
            return sum((a * b).sum() for a, b in zip(own.values(), slopes, strict=True))

        mapped = vmap(product, chunk_size=ROWS_AT_A_TIME, randomness="different")
        products = mapped(batch.inputs, batch.target)
        return positive_mean(products, losses_of(module.net(batch.inputs), batch.target))

    return loss


@contextmanager
def seen(layers) -> Iterator[dict]:
    """Hold the input and the output of each layer that runs in the block."""
    found = {}

    def keep(layer, inputs, output):
        found[layer] = (inputs[0].detach(), output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    yield found
    for handle in handles:
        handle.remove()


def ghost_products(module) -> Callable:
    """Weigh by the same inner products, from layers' inputs and the gradients of their outputs.

    Linear layers and convolutions count; weights that another layer reads itself do not, as those
    of PyTorch's attention.
    """
    layers = [part for part in module.net.modules() if isinstance(part, (nn.Linear, nn.Conv2d))]

    def apply(layer, inputs, weight):
        if isinstance(layer, nn.Conv2d):
            return layer._conv_forward(inputs, weight, None)
        return F.linear(inputs, weight)

    def loss(batch):
        with seen(layers) as found:
            losses = losses_of(module.net(batch.inputs), batch.target)
        inputs, target = module.val_rows()
        slopes = torch.autograd.grad(
            F.cross_entropy(module.net(inputs), target), [layer.weight for layer in found]
        )
        outputs = [output for _, output in found.values()]
        signals = torch.autograd.grad(losses.sum(), outputs, retain_graph=True)
        products = sum(
            (signal * apply(layer, entered, slope)).flatten(1).sum(1)
            for (layer, (entered, _)), signal, slope in zip(
                found.items(), signals, slopes, strict=True
            )
        )
        return positive_mean(products, losses)

    return loss


def selective_backprop(module) -> Callable:
    """Train on the half of the rows with the largest loss, by an extra forward (Jiang 2019)."""

    def loss(batch):
        with torch.no_grad():
            losses = losses_of(module.net(batch.inputs), batch.target)
        rows = losses.topk(len(losses) // 2).indices
        return F.cross_entropy(module.net(batch.inputs[rows]), batch.target[rows])

    return loss


def early_learning(module) -> Callable:
    """Draw each row to the average of its earlier predictions (ELR, Liu et al. 2020)."""
    averages: list[Tensor] = []

    def loss(batch):
        logits = module.net(batch.inputs)
        probs = logits.softmax(1).clamp(1e-4, 1 - 1e-4)
        if not averages:
            averages.append(probs.new_zeros(module.num_indices, probs.shape[1]))
        kept = 0.7 * averages[0][batch.index] + 0.3 * probs.detach()
        averages[0][batch.index] = kept
        drawn = (1 - (kept * probs).sum(1)).log().mean()
        return F.cross_entropy(logits, batch.target) + 3 * drawn

    return loss


def _by_plain_attention(make):
    """Use attention that can be differentiated twice and mapped over rows."""

    def made(module):
        loss = make(module)

        def with_plain_attention(batch):
            with sdpa_kernel(SDPBackend.MATH):
                return loss(batch)

        return with_plain_attention

    return made


RIVALS = {
    "learning to reweight": _by_plain_attention(learning_to_reweight),
    "meta-weight-net": _by_plain_attention(meta_weight_net),
    "per-sample gradients": _by_plain_attention(per_sample_gradients),
    "ghost products": ghost_products,
    "selective backprop": selective_backprop,
    "ELR": early_learning,
}
