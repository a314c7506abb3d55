"""Linear classifiers on fixed features, and fine-tuning that starts from one (LP-FT)."""

from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from saflex_lightning import gather_rows
from saflex_lightning.data.checks import check
from saflex_lightning.recipes.contrastive.encoders import ImageTextEncoders, check_encoders
from saflex_lightning.recipes.contrastive.evaluating import evaluating

__all__ = ["FitHeadFirst", "ImageTower", "fit_linear_probe"]


def fit_linear_probe(
    features: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    penalty: float = 1e-3,
    max_iterations: int = 200,
) -> nn.Linear:
    r"""Return the linear classifier that minimises the penalised cross-entropy.

    .. math:: \frac1n \sum_i \ell_i + \frac\lambda2 \lVert W \rVert^2

    Convex and solved by L-BFGS over all rows from W = 0, so there is nothing to tune but lambda.

    Args:
        features: Fixed features, ``(n, features)``.
        target: Labels, ``(n,)`` int64.
        num_classes: Number of classes.
        penalty: lambda, positive; of the weights alone, not the bias.
        max_iterations: Most L-BFGS iterations.

    Returns:
        The classifier, on the device and of the dtype of the features.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If a setting is not positive, or a row has no label among the classes.
    """
    check("a tensor of floats, (rows, features)", features=features)
    check("a tensor of integers, (rows,)", target=target)
    check("a positive integer", num_classes=num_classes, max_iterations=max_iterations)
    check("a positive number", penalty=penalty)
    fits = (target >= 0) & (target < num_classes)
    if len(target) != len(features) or not fits.all():
        raise ValueError(
            f"Expected `target` to have a label in [0, {num_classes - 1}] for each of "
            f"{len(features)} rows, but got {len(target)}, {int((~fits).sum())} of them outside. "
            "Take both from one loader, and correct `num_classes`."
        )
    features = features.detach()
    probe = nn.Linear(features.shape[-1], num_classes).to(features)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(
        probe.parameters(), max_iter=max_iterations, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(probe(features), target) + penalty / 2 * probe.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    probe.requires_grad_(True).zero_grad()
    return probe


class ImageTower(nn.Module):
    """The image side of two towers with a linear head, as a network for `recipes.Classifier`.

    Parameters that the text side alone uses do not ask for gradients.

    Args:
        encoders: See `ImageTextEncoders`.
        num_classes: Number of logits.

    Raises:
        TypeError: If ``encoders`` lacks a part of `ImageTextEncoders`, or ``num_classes`` is no
            integer.
        ValueError: If ``num_classes`` is not positive.
    """

    def __init__(self, encoders: nn.Module, num_classes: int) -> None:
        super().__init__()
        check_encoders(encoders)
        check("a positive integer", num_classes=num_classes)
        self.encoders = encoders
        towers = cast("ImageTextEncoders", encoders)
        features = towers.encode_text(towers.tokenize(["a photo"]))
        self.head = nn.Linear(features.shape[-1], num_classes)
        params = [parameter for parameter in encoders.parameters() if parameter.requires_grad]
        if features.requires_grad:  # otherwise the text side is frozen already
            gradients: Any = torch.autograd.grad(features.sum(), params, allow_unused=True)
            for parameter, gradient in zip(params, gradients, strict=True):
                parameter.requires_grad_(gradient is None)
        towers.logit_scale.requires_grad_(False)

    def features(self, images: Tensor) -> Tensor:
        """Return what the head classifies, ``(batch, features)``."""
        return cast("ImageTextEncoders", self.encoders).encode_image(images)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, ``(batch, classes)``."""
        return self.head(self.features(images))


class FitHeadFirst(L.Callback):
    """Fit the head of an `ImageTower` on fixed features before fine-tuning everything.

    The rows are those of one training epoch on all processes, augmented ones included.

    Args:
        penalty: See `fit_linear_probe`.
        max_iterations: See `fit_linear_probe`.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If it is not positive.

    References:
        Kumar et al. 2022 (LP-FT).
    """

    def __init__(self, penalty: float = 1e-3, max_iterations: int = 200) -> None:
        check("a positive number", penalty=penalty)
        check("a positive integer", max_iterations=max_iterations)
        self.penalty = penalty
        self.max_iterations = max_iterations

    @torch.no_grad()
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fit the head, unless this run goes on where another one stopped.

        Raises:
            MisconfigurationException: If the module's network is not an `ImageTower`.
        """
        network = getattr(pl_module, "network", None)
        if not isinstance(network, ImageTower):
            raise MisconfigurationException(
                "Expected the module's `network` to be an `ImageTower` for `FitHeadFirst`, but got "
                f"{type(network).__name__}. Wrap the encoders in one, or remove the callback."
            )
        if trainer.global_step:
            return
        features, labels = [], []
        with evaluating(pl_module):
            # The Trainer may ask for a part of the loader; the limit can be infinite.
            for number, batch in enumerate(cast("Any", trainer.train_dataloader)):
                if number >= trainer.num_training_batches:
                    break
                inputs, target = trainer.strategy.batch_to_device(batch, dataloader_idx=0)[:2]
                features.append(network.features(inputs))
                labels.append(target)
        probe = fit_linear_probe(
            gather_rows(torch.cat(features)),
            gather_rows(torch.cat(labels)),
            network.head.out_features,
            penalty=self.penalty,
            max_iterations=self.max_iterations,
        )
        network.head.load_state_dict(probe.state_dict())
