"""The Trainer's precisions: what they leave of the solve, and that the solve leaves them alone."""

from contextlib import nullcontext

import pytest
import torch
from helpers.training import (
    ENGINES,
    EVERY_WAY,
    NUM_CLASSES,
    Classifier,
    assert_same_state,
    fit,
    make_loader,
    make_rows,
    seeded,
    short_warm_up,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback, SAflexWarning

# Of weights and labels after one small step of the optimizer; some roundings of the dtype.
TOLERANCE = {
    "32-true": 1e-4,
    "64-true": 0.0,
    "bf16-mixed": 1e-2,
    "16-mixed": 2e-3,
    "bf16-true": 1e-2,
    "16-true": 2e-3,
}
ROUNDED = ("bf16-mixed", "16-mixed", "bf16-true", "16-true")
ACCELERATORS = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]


def precision_settings(precision, accelerator):
    """Return Trainer arguments; on a CPU Lightning itself makes "bf16-mixed" of "16-mixed"."""
    if precision != "16-mixed" or accelerator == "gpu":
        return {"precision": precision, "accelerator": accelerator, "devices": 1}
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", 2.0**16))}


class Recording(Classifier):
    """Keeps the first solution that tells rows apart; makes tensors of default dtype."""

    def __init__(self):
        super().__init__(plain=True, optimizer="sgd")
        self.register_buffer("class_weight", torch.linspace(0.5, 1.5, NUM_CLASSES))
        self.first = None

    def forward(self, inputs):
        return self.net(inputs @ torch.eye(inputs.shape[1]).to(inputs.device))

    def training_step(self, batch, batch_idx):
        logits = self.saflex_forward(batch[0])
        loss = self.saflex_loss(logits, batch[1], class_weight=self.class_weight)
        solution = self.saflex_solution
        if self.first is None and solution is not None and solution.weights.std() > 0:
            self.first = solution
        return loss


def soft_loader():
    inputs, labels = make_rows(64)
    soft = 0.87 * nn.functional.one_hot(labels, NUM_CLASSES) + 0.13 / NUM_CLASSES
    return DataLoader(TensorDataset(inputs, soft.float()), 16)


@pytest.fixture(scope="module")
def reference():
    """The first solution of each way in float64."""
    found = {}
    for way in EVERY_WAY:
        module = seeded(Recording)
        callback = SAflexCallback(soft_loader(), **way)
        with short_warm_up():
            fit(module, callback, precision="64-true", train=soft_loader())
        found[str(way)] = module.first
    return found


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
@pytest.mark.parametrize("precision", TOLERANCE)
def test_solution_is_float32_or_wider_and_near_that_of_float64(
    precision, way, accelerator, reference
):
    module, callback = seeded(Recording), SAflexCallback(soft_loader(), **way)
    settings = precision_settings(precision, accelerator)
    if precision in ROUNDED and way == ENGINES[0]:
        match = f"precision='{precision}'`: its small step.*Pass engine='forward_mode'"
        with pytest.raises(MisconfigurationException, match=match):
            fit(module, callback, train=soft_loader(), **settings)
        return
    trainer = fit(module, callback, train=soft_loader(), **settings)
    assert trainer.precision == precision
    assert module.first.weights.dtype == module.first.soft_labels.dtype
    assert module.first.weights.dtype == (
        torch.float64 if precision == "64-true" else torch.float32
    )
    assert trainer.callback_metrics["saflex/skipped_steps"] == 0
    tolerance = TOLERANCE[precision]
    if accelerator == "gpu":
        # Another device rounds otherwise, and finite differences divide that by their step, 4e-8.
        tolerance = max(tolerance, 1e-7 if way == ENGINES[0] else 1e-12)
    for name in ("weights", "soft_labels"):
        torch.testing.assert_close(
            getattr(module.first, name).double().cpu(),
            getattr(reference[str(way)], name),
            rtol=tolerance,
            atol=tolerance,
        )


class Shadow(Classifier):
    """Refines, but trains on plain cross-entropy; one training loss overflows."""

    def __init__(self, refine):
        super().__init__()
        self.refine, self.scales = refine, []

    def training_step(self, batch, batch_idx):
        forward = self.saflex_forward if self.refine else self
        logits = forward(batch[0])
        if self.refine:
            self.saflex_loss(logits, batch[1])
        loss = nn.functional.cross_entropy(logits, batch[1])
        return loss * 1e38 * 1e38 if self.global_step == 3 and batch_idx == 3 else loss

    def saflex_val_batch(self, batch):
        inputs, target = super().saflex_val_batch(batch)
        return (inputs * torch.nan if self.global_step == 2 else inputs), target

    def on_train_batch_end(self, *args):
        self.scales.append(self.trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("way", ENGINES[1:], ids=str)
def test_grad_scaler_does_not_notice_the_solve(way, accelerator):
    runs = []
    device = "cuda" if accelerator == "gpu" else "cpu"
    for refine in (True, False):
        module = seeded(lambda refine=refine: Shadow(refine))
        scaler = torch.amp.GradScaler(device, 2.0**10, growth_interval=2)
        callback = SAflexCallback(make_loader(), **way, row_evidence=True, refresh_every_n_steps=1)
        with pytest.warns(SAflexWarning, match="non-finite") if refine else nullcontext():
            trainer = fit(
                module,
                *([callback] if refine else []),
                max_epochs=3,
                plugins=MixedPrecision("16-mixed", device, scaler),
                accelerator=accelerator,
                devices=1,
            )
        runs.append((module.scales, state_of(module), trainer))
    (scales, state, trainer), (plain_scales, plain_state, _) = runs
    assert scales == plain_scales
    assert min(scales) < max(scales)
    assert_same_state(state, plain_state)
    assert trainer.callback_metrics["saflex/skipped_steps"] >= 1
