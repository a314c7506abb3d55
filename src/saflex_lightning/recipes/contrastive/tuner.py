"""Fine-tune both towers with the loss they were pre-trained with (FLYP), ready for SAFLEX."""

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import normalize

from saflex_lightning import AugmentedBatch, SAflexMixin, gather_rows
from saflex_lightning.data.checks import check
from saflex_lightning.functional import contrastive_scores, same_class_target
from saflex_lightning.recipes.contrastive.encoders import ImageTextEncoders, check_encoders
from saflex_lightning.recipes.contrastive.metrics import make_stage_metrics
from saflex_lightning.recipes.contrastive.prompts import (
    make_prompts,
    template_of_rows,
    zero_shot_head,
)
from saflex_lightning.recipes.contrastive.tower_module import TowerModule, check_rates

__all__ = ["ContrastiveTuner"]

TEMPLATES = ("a photo of {}.", "{} in the wild.")
_LARGEST_LOG_SCALE = math.log(100.0)


class ContrastiveTuner(SAflexMixin, TowerModule):
    """Image-text fine-tuning on captions made of class names ("finetune like you pretrain").

    A row is an image with the caption of its class; the loss is the symmetric contrastive one over
    the pairs of all processes, with a learned scale. Validation and test rows are classified by
    the captions of the tower as it is then. ``docs/contrastive.md`` says what each choice
    means for SAFLEX.

    Args:
        encoders: Both towers, see `ImageTextEncoders`.
        class_names: One name per class; None asks the datamodule's ``class_names()``.
        templates: Captions with ``{}`` for the name; None means those of FLYP, "a photo of {}."
            and "{} in the wild.".
        lr: Largest learning rate of AdamW.
        weight_decay: Of AdamW, decoupled.
        warmup_steps: Optimizer steps in which the rate rises; see `make_warm_up_adamw`.
        target: ``"diagonal"``: every other pair is a negative, also one of the same class (FLYP);
            ``"same_class"``: the pairs of a class share the target.
        steering_loss: Validation loss whose gradient steers SAFLEX: ``"classes"``, the
            cross-entropy of classifying by the captions, or ``"pairs"``, the training loss on
            validation pairs.

    Raises:
        TypeError: If ``encoders`` lacks a part of `ImageTextEncoders`, or a setting is of another
            type.
        ValueError: If a setting is out of its range.

    References:
        Goyal et al. 2023 (FLYP); Ding et al. 2024, section 4.4 and Table 4.
    """

    saflex_rows_interact = True
    tokens: Tensor

    def __init__(
        self,
        encoders: nn.Module,
        class_names: list[str] | None = None,
        templates: list[str] | None = None,
        *,
        lr: float = 1e-5,
        weight_decay: float = 0.2,
        warmup_steps: int = 500,
        target: Literal["diagonal", "same_class"] = "diagonal",
        steering_loss: Literal["classes", "pairs"] = "classes",
    ) -> None:
        super().__init__()
        check_encoders(encoders)
        check("a list of names", optional=True, class_names=class_names, templates=templates)
        check_rates(lr=lr, weight_decay=weight_decay, warmup_steps=warmup_steps)
        check(("diagonal", "same_class"), target=target)
        check(("classes", "pairs"), steering_loss=steering_loss)
        self.save_hyperparameters(ignore=["encoders"])
        self.encoders = encoders
        self.templates = list(TEMPLATES if templates is None else templates)
        self.lr, self.weight_decay, self.warmup_steps = lr, weight_decay, warmup_steps
        self.target, self.steering_loss = target, steering_loss
        self._head: Tensor | None = None
        if class_names is not None:
            self._set_classes(class_names)

    def setup(self, stage: str) -> None:
        """Ask the datamodule for the class names where none were given.

        Raises:
            MisconfigurationException: If it has none.
        """
        if hasattr(self, "tokens"):
            return
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", None)
        if names is None:
            raise MisconfigurationException(
                "Expected `class_names` or a datamodule with a method `class_names()`, but found "
                "neither. Pass one name per class, in the order of the labels."
            )
        self._set_classes(names())

    def _set_classes(self, class_names: Sequence[str]) -> None:
        self.num_classes = len(class_names)
        tokens = self._towers.tokenize(make_prompts(class_names, self.templates))
        # Not in checkpoints: the names make them anew.
        self.register_buffer("tokens", tokens.to(self.device), persistent=False)
        self.metrics = make_stage_metrics(self.num_classes).to(self.device)

    @property
    def _towers(self) -> ImageTextEncoders:
        return cast("ImageTextEncoders", self.encoders)

    # Scores

    def make_head(self) -> Tensor:
        """Return the classifier that the captions make, ``(classes, features)``, rows of length 1.

        Returns:
            The head, connected to the text tower.
        """
        return zero_shot_head(self._towers.encode_text(self.tokens), self.num_classes)

    def forward(self, images: Tensor, head: Tensor | None = None) -> Tensor:
        """Return class scores of images.

        Args:
            images: In [-1, 1], ``(batch, channels, height, width)``.
            head: From `make_head`; None makes it.

        Returns:
            Scaled cosines, ``(batch, classes)``.
        """
        features = normalize(self._towers.encode_image(images), dim=-1)
        head = self.make_head() if head is None else head
        return self._towers.logit_scale.exp() * features @ head.T

    def saflex_scores(
        self, images: Tensor, captions: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return class scores, or with captions the scores of both directions over all pairs.

        Args:
            images: As for `forward`.
            captions: Number of each image's caption, ``(batch,)`` int64; see `make_prompts`.

        Returns:
            ``(batch, classes)``, or two of ``(batch, pairs of all processes)``.
        """
        if captions is None:
            return self(images)
        return contrastive_scores(
            self._towers.encode_image(images),
            self._encode_captions(captions),
            self._towers.logit_scale.exp(),
            gather=gather_rows,
        )

    def _encode_captions(self, captions: Tensor) -> Tensor:
        if len(self.tokens) <= len(captions):  # then each caption is computed once
            return self._towers.encode_text(self.tokens)[captions]
        return self._towers.encode_text(self.tokens[captions])

    def saflex_val_batch(self, batch: Any) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Return images to classify, or pairs of images and captions."""
        images, labels = batch[:2]
        if self.steering_loss == "classes":
            return (images,), labels
        captions = self._captions(labels, torch.arange(len(labels), device=labels.device))
        return (images, captions), self._pair_target(labels)

    def _captions(self, labels: Tensor, index: Tensor) -> Tensor:
        if labels.is_floating_point():
            raise TypeError(
                f"Expected labels of shape (batch,) and int64, but got {labels.dtype} of shape "
                f"{tuple(labels.shape)}. No caption says a mixture of classes: choose an "
                "augmentation that keeps the label."
            )
        templates = template_of_rows(index, self.current_epoch, len(self.templates))
        return labels * len(self.templates) + templates

    def _pair_target(self, labels: Tensor) -> Tensor | None:
        return same_class_target(labels, gather_rows(labels)) if self._shares_target else None

    @property
    def _shares_target(self) -> bool:
        return self.target == "same_class"

    # Steps

    def training_step(self, batch: AugmentedBatch, batch_idx: int) -> Tensor:
        """Return the SAFLEX loss of both directions, or the plain contrastive loss."""
        labels, index = batch.target, batch.index
        if labels is None or index is None:
            raise TypeError(
                "Expected an `AugmentedBatch` with `target` and `index`, as captions are chosen by "
                "both, but got None. Give every row its label and a number."
            )
        scores = self.saflex_forward(batch.inputs, self._captions(labels, index))
        loss = self.saflex_loss(scores, self._pair_target(labels))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep the scale at most 100, as in pre-training."""
        with torch.no_grad():
            self._towers.logit_scale.clamp_(max=_LARGEST_LOG_SCALE)

    def on_validation_epoch_start(self) -> None:
        """Make the classifier of this evaluation once."""
        self._head = self.make_head()

    def on_test_epoch_start(self) -> None:
        """Make the classifier of this evaluation once."""
        self._head = self.make_head()

    def class_scores(self, images: Tensor) -> Tensor:
        """Return scores by the classifier of this evaluation."""
        return self(images, self._head)
