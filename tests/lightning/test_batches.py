"""Every kind of batch, target, module and loss option that the mixin promises to serve."""

from dataclasses import dataclass

import lightning.pytorch as pl
import pytest
import torch
from helpers.pairs import TwoTowers
from helpers.training import (
    EVERY_WAY,
    GRADIENT,
    NUM_CLASSES,
    Classifier,
    fit,
    make_loader,
    make_rows,
    seeded,
    state_of,
)
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import AugmentedBatch, SAflexCallback, SAflexMixin
from saflex_lightning.fit.report import Report
from saflex_lightning.fit.run import Fit
from saflex_lightning.functional import contrastive_scores
from saflex_lightning.functional.losses import NO_OPTIONS
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.settings import PRESETS
from saflex_lightning.step import Call, Step


@dataclass
class Sample:
    image: torch.Tensor
    label: torch.Tensor


def collated(make_batch):
    rows = TensorDataset(*make_rows(64))

    def collate(samples):
        return make_batch(*(torch.stack(column) for column in zip(*samples, strict=True)))

    return DataLoader(rows, 16, collate_fn=collate)


class Recording(Classifier):
    """Reads any batch and keeps the last solution."""

    options = {}  # noqa: RUF012

    def training_step(self, batch, batch_idx):
        inputs, target = self.saflex_val_batch(batch)
        logits = self.saflex_forward(inputs)
        loss = self.saflex_loss(logits, target, **self.options)
        self.last = (batch, logits.detach(), target, loss.detach(), self.saflex_solution)
        return loss


@pytest.mark.parametrize(
    "make_batch",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y, torch.arange(len(y))],
        lambda x, y: {"x": x, "y": y},
        lambda x, y: {"inputs": x, "target": y, "name": ["a"] * len(y)},
        lambda x, y: Sample(image=x, label=y),
    ],
    ids=["tuple", "list", "dict", "dict with strings", "dataclass"],
)
@pytest.mark.parametrize("preset", PRESETS)
def test_batch_layouts(make_batch, preset):
    module = seeded(Recording)
    loader = collated(make_batch)
    trainer = fit(module, SAflexCallback(collated(make_batch), preset), train=loader)
    assert module.last[-1].weights.shape == (16,)
    assert torch.isfinite(trainer.callback_metrics["saflex/inner_product_rms"])


def test_batch_without_inputs_and_target_names_the_hook_to_override():
    module = seeded(Recording)
    loader = collated(lambda x, y: {"pixels": x, "y": y})
    with pytest.raises(TypeError, match=r"fields \['pixels', 'y'\].*Override `saflex_val_batch"):
        fit(module, SAflexCallback(loader))


def union_batch(inputs, target):
    n = len(target)
    return AugmentedBatch(
        inputs=torch.cat([inputs, inputs + 0.3]),
        target=torch.cat([target, target]),
        augmented=torch.arange(2 * n) >= n,
        group=(torch.arange(2 * n) >= n).long(),
        index=torch.arange(2 * n),
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("plain", [True, False])
def test_union_batches_refine_only_augmented_rows(preset, plain):
    module = seeded(lambda: Recording(plain=plain))
    trainer = fit(module, SAflexCallback(make_loader(seed=7), preset), train=collated(union_batch))
    batch, logits, target, loss, solution = module.last
    clean = ~batch.augmented
    assert torch.equal(solution.weights[clean], torch.ones(16))
    assert torch.equal(
        solution.soft_labels[clean], nn.functional.one_hot(target[clean], NUM_CLASSES).float()
    )
    assert not torch.allclose(solution.weights[~clean], torch.ones(16))
    if PRESETS[preset].solves:
        kept = solution.weights[~clean].sum().item()
        assert kept == pytest.approx(16, rel=1e-5) or kept == 0
    else:
        assert solution.weights[~clean].min() > 0
        assert solution.weights[~clean].max() < 2.02
    by_hand = -(solution.soft_labels * logits.log_softmax(-1)).sum(-1)
    expected = (solution.weights * by_hand).sum() / solution.weights.sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    fraction = (solution.weights[~clean] > 0).float().mean().item()
    logged = trainer.callback_metrics.get("saflex/kept_fraction", torch.ones(()))
    assert logged.item() == pytest.approx(fraction)


def test_a_second_mask_beside_that_of_the_batch_is_refused():
    module = seeded(lambda: Recording(plain=True))
    module.options = {"augmented": torch.ones(32, dtype=torch.bool)}
    with pytest.raises(ValueError, match="None beside an `AugmentedBatch`, but got a second one"):
        fit(module, SAflexCallback(make_loader(seed=7)), train=collated(union_batch))


def test_mask_given_to_the_loss_goes_before_all_rows():
    module = seeded(Recording)
    module.options = {"augmented": torch.arange(16) % 2 == 0}
    fit(module, SAflexCallback(make_loader(seed=7)))
    assert torch.equal(module.last[-1].weights[1::2], torch.ones(8))


@pytest.mark.parametrize("preset", PRESETS)
def test_soft_upstream_labels(preset):
    def mixup(inputs, target):
        soft = nn.functional.one_hot(target, NUM_CLASSES).float()
        return 0.7 * inputs + 0.3 * inputs.flip(0), 0.7 * soft + 0.3 * soft.flip(0)

    module = seeded(Recording)
    trainer = fit(module, SAflexCallback(make_loader(seed=7), preset), train=collated(mixup))
    assert module.last[2].shape == (16, NUM_CLASSES)
    assert module.last[-1].soft_labels.sum(-1) == pytest.approx(torch.ones(16), abs=1e-5)
    if PRESETS[preset].solves:
        assert trainer.callback_metrics["saflex/target_entropy"] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {**GRADIENT, "weight_rule": "ones", "label_rule": "keep"},  # nothing at all
        # Labels that are learned from a gradient, and stay as they are.
        {
            **GRADIENT,
            "weight_rule": "ones",
            "label_rule": "softmax",
            "label_penalty": 1e6,
            "engine": "forward_mode",
            "precondition": False,
            "gradient_decay": 0.0,
        },
    ],
    ids=["nothing", "labels"],
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [True, False])
def test_class_weights_and_smoothing_enter_gradient_and_loss_alike(weighted, smoothing, settings):
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5]) if weighted else None
    module = seeded(lambda: Recording(plain=True))
    module.options = {"class_weight": weight, "label_smoothing": smoothing}
    val = make_loader(64, 64, seed=7)
    callback = SAflexCallback(val, **settings, refresh_every_n_steps=1)
    fit(module, callback, max_epochs=1)
    _, logits, target, loss, solution = module.last
    # Weights 1 and upstream labels: exactly F.cross_entropy with the same options.
    expected = cross_entropy(logits, target, weight=weight, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert solution is not None
    assert torch.equal(solution.soft_labels.argmax(-1), target)


def test_validation_gradient_uses_the_class_weights_of_the_loss():
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5])

    class Observing(Recording):
        options = {"class_weight": weight, "label_smoothing": 0.1}  # noqa: RUF012

        def training_step(self, batch, batch_idx):
            inputs, target = VAL[:]
            loss = cross_entropy(self.net(inputs), target, weight=weight, label_smoothing=0.1)
            expected = torch.autograd.grad(loss, list(self.parameters()))
            self.expected = torch.cat([part.flatten() for part in expected])
            direction = self._saflex_step.fit.gradient.direction
            self.found = -torch.cat([p.flatten() for p in direction.parts]) * direction.norm
            return super().training_step(batch, batch_idx)

    val = make_loader(32, 32, seed=7)
    VAL = val.dataset
    module = seeded(lambda: Observing(plain=True))
    fit(module, SAflexCallback(val, "paper", gumbel=False), max_epochs=1)
    torch.testing.assert_close(module.found, module.expected, rtol=1e-4, atol=1e-6)


def test_remembered_residuals_are_those_of_the_loss_with_its_class_weights():
    weight = torch.tensor([0.2, 1.0, 3.0, 0.5])

    class Observing(Recording):
        options = {"class_weight": weight, "label_smoothing": 0.1}  # noqa: RUF012

        def on_train_batch_start(self, batch, batch_idx):
            inputs, target = VAL[:]
            logits = self.net(inputs).requires_grad_()
            loss = cross_entropy(logits, target, weight=weight, label_smoothing=0.1)
            (gradient,) = torch.autograd.grad(loss, logits)
            self.expected = torch.cat([logits.detach(), len(target) * gradient], 1)

    val = make_loader(32, 32, seed=7)
    VAL = val.dataset
    module = seeded(lambda: Observing(plain=True))
    callback = SAflexCallback(val, refresh_every_n_steps=1)
    fit(module, callback, max_epochs=1)
    rows = callback.state_dict()["evidence"]["memory"]["rows"]
    found = rows[:, : 2 * NUM_CLASSES]
    places = torch.cdist(found[:, :NUM_CLASSES], module.expected[:, :NUM_CLASSES]).argmin(1)
    assert places.unique().numel() == 32  # they are drawn in an order of their own
    torch.testing.assert_close(found, module.expected[places], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_first_step_with_class_weights_is_plain_and_the_second_refined(settings):
    solutions = []

    class Observing(Recording):
        options = {"class_weight": torch.ones(NUM_CLASSES)}  # noqa: RUF012

        def on_train_batch_end(self, outputs, batch, batch_idx):
            solutions.append(self.saflex_solution)

    fit(seeded(Observing), SAflexCallback(make_loader(seed=7), **settings), max_epochs=1)
    assert solutions[0] is None
    assert all(solution is not None for solution in solutions[1:])


class DictForward(Recording):
    def forward(self, inputs):
        return {"logits": self.net(inputs), "features": inputs}

    def saflex_scores(self, *inputs):
        return self(*inputs)["logits"]


@pytest.mark.parametrize("way", EVERY_WAY, ids=str)
def test_module_whose_forward_returns_a_dict(way):
    module = seeded(DictForward)
    fit(module, SAflexCallback(make_loader(seed=7), **way))
    assert module.last[-1].soft_labels.shape == (16, NUM_CLASSES)


def info_nce(first, second, scale):
    """Eq. 12 pair by pair."""
    scores = scale * cosine_similarity(first.unsqueeze(1), second.unsqueeze(0), dim=-1)
    pairs = [
        -(scores[i].log_softmax(0)[i] + scores[:, i].log_softmax(0)[i]) / 2
        for i in range(len(scores))
    ]
    return torch.stack(pairs).mean()


class Contrastive(SAflexMixin, pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(8, 6)

    def saflex_scores(self, first, second):
        return contrastive_scores(self.first(first), self.second(second), 10.0)

    def saflex_val_batch(self, batch):
        return (batch[0], batch[0].flip(-1)), None

    def training_step(self, batch, batch_idx):
        first, second = batch[0], batch[0].flip(-1)
        scores = self.saflex_forward(first, second)
        loss = self.saflex_loss(scores)
        plain = info_nce(self.first(first), self.second(second), 10.0)
        self.last = (loss.item(), plain.item(), self.saflex_solution)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.parametrize("engine", ["auto", "finite_difference", "forward_mode"])
def test_contrastive_scores_are_two_tasks_with_the_diagonal_as_target(engine):
    module = seeded(Contrastive)
    callback = SAflexCallback(make_loader(64, 16, seed=7), preset="gradient", engine=engine)
    with pytest.warns(UserWarning, match="more matched parameters than unknowns"):
        fit(module, callback)
    loss, plain, solutions = module.last
    assert len(solutions) == 2
    assert all(solution.soft_labels.shape == (16, 16) for solution in solutions)
    assert loss != plain


@pytest.mark.parametrize("settings", [{}, {**GRADIENT, "row_evidence": True}], ids=str)
@pytest.mark.parametrize("steering", ["pairs", "classes"])
def test_contrastive_scores_are_refused_where_evidence_is_gathered(settings, steering):
    module = seeded(Contrastive if steering == "pairs" else lambda: Captioned(0))
    before = state_of(module)
    match = r"Expected scores of classes, .* contrastive scores\. Pass preset='gradient'"
    with pytest.raises(MisconfigurationException, match=match):
        fit(module, SAflexCallback(make_loader(64, 16, seed=7), **settings))
    assert all(value.equal(before[name]) for name, value in state_of(module).items())


def test_contrastive_loss_with_plain_weights_is_info_nce():
    module = seeded(Contrastive)
    callback = SAflexCallback(
        make_loader(64, 8, seed=7), preset="gradient", weight_rule="ones", label_rule="keep"
    )
    fit(module, callback)  # few parameters, but no rows are told apart: no warning of that
    loss, plain, _ = module.last
    assert loss == pytest.approx(plain, rel=1e-5)


class Captioned(SAflexMixin, pl.LightningModule):
    """Match rows with embeddings of their class; steered by the classification they allow.

    Args:
        shift: Added to the labels of validation rows, to steer wrongly.
    """

    def __init__(self, shift):
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Embedding(NUM_CLASSES, 6)
        self.shift = shift
        self.mass, self.even = 0.0, 0.0

    def saflex_scores(self, rows, classes):
        first, second = self.first(rows), self.second(classes)
        if len(rows) != len(classes):
            return 10.0 * cosine_similarity(first.unsqueeze(1), second, dim=-1)
        return contrastive_scores(first, second, 10.0)

    def saflex_val_batch(self, batch):
        return (batch[0], torch.arange(NUM_CLASSES)), (batch[1] + self.shift) % NUM_CLASSES

    def training_step(self, batch, batch_idx):
        rows, classes = batch
        loss = self.saflex_loss(self.saflex_forward(rows, classes))
        beside = ~torch.eye(len(classes), dtype=torch.bool)
        same = beside & (classes.unsqueeze(1) == classes)
        for solution in self.saflex_solution:
            given_away = solution.soft_labels[beside].sum().item()
            self.mass += solution.soft_labels[same].sum().item()
            self.even += given_away * (same.sum() / beside.sum()).item()
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


@pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns")
@pytest.mark.parametrize(("preset", "least"), [("gradient", 1.1), ("paper", 1.5)])
def test_learned_labels_repair_false_negatives(preset, least):
    # Rows of one class have the same caption, yet the diagonal target calls them negatives. Of
    # what a learned label gives away, pairs of the row's class must get more than by chance.
    modules = [seeded(lambda shift=shift: Captioned(shift)) for shift in (0, 2)]
    for module in modules:
        callback = SAflexCallback(make_loader(64, 16, seed=7), preset, engine="forward_mode")
        fit(module, callback, max_epochs=5)
    share, share_steered_wrongly = (module.mass / module.even for module in modules)
    assert share > least
    assert share_steered_wrongly < 1


class Shifted(Ranks):
    """Two processes; what the other one adds is known."""

    def sum(self, tensor):
        return 2.0 * tensor + 1.0


@pytest.mark.parametrize("columns", [6, 12])
def test_pairs_of_one_process_are_solved_without_those_of_others(columns):
    # Six columns are the process's own pairs, twelve those of two processes.
    scores, jvp = torch.randn(2, 6, columns, generator=torch.Generator().manual_seed(0))
    solutions = []
    for ranks in (Ranks(), Shifted(0, 2)):
        fit = Fit(PRESETS["gradient"], Report())
        fit.ranks = ranks
        step = Step(fit, 0, None, torch.Generator())
        step.calls = [Call((scores,), (jvp,))]
        step.loss(scores, None if columns == 6 else torch.arange(6), NO_OPTIONS)
        solutions.append(step.tasks[0].solution)
    assert torch.equal(*(solution.weights for solution in solutions)) == (columns == 6)


def test_an_augmented_batch_of_pairs_needs_no_target():
    class Pairs(TwoTowers):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.weights = [solution.weights for solution in self.saflex_solution]
            return loss

    mask = torch.arange(8) >= 4

    def batch(samples):
        numbers = torch.arange(len(samples))
        inputs = torch.stack([sample[0] for sample in samples])
        return AugmentedBatch(inputs, None, mask, mask.long(), numbers)

    module = seeded(Pairs)
    train = DataLoader(TensorDataset(*make_rows(64)), 8, collate_fn=batch)
    fit(module, SAflexCallback(make_loader(40, 8, seed=7), **GRADIENT), train=train)
    for weights in module.weights:
        assert weights[~mask].eq(1).all()
        assert weights[mask].std() > 0


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_label_smoothing_may_change_from_step_to_step(settings):
    solutions = []

    class Annealed(Recording):
        def training_step(self, batch, batch_idx):
            self.options = {"label_smoothing": 0.1 / (1 + self.global_step)}
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs, batch, batch_idx):
            solutions.append(self.saflex_solution)

    fit(seeded(Annealed), SAflexCallback(make_loader(seed=7), **settings), max_epochs=2)
    assert solutions[0] is None  # the kind of loss is known from then on
    assert all(solution is not None for solution in solutions[1:])


@pytest.mark.parametrize("way", EVERY_WAY[:3], ids=str)
@pytest.mark.filterwarnings("ignore:Expected finite gradients")
def test_classes_that_the_model_rules_out_leave_the_plain_loss(way):
    class RuledOut(Recording):
        def forward(self, inputs):
            never = torch.tensor([False, False, False, True])
            return self.net(inputs).masked_fill(never, -torch.inf)

        def training_step(self, batch, batch_idx):
            inputs, target = batch[0], batch[1].clamp(max=2)
            logits = self.saflex_forward(inputs)
            loss = self.saflex_loss(logits, target)
            torch.testing.assert_close(loss, cross_entropy(logits, target))
            return loss

    val = [(inputs, target.clamp(max=2)) for inputs, target in make_loader(40, 8, seed=7)]
    module = seeded(lambda: RuledOut(plain=True))
    fit(module, SAflexCallback(val, **way), max_epochs=1)
    assert all(weight.isfinite().all() for weight in module.parameters())
