"""The preset "paper" equals Algorithm 1 written by hand, step after step, in float64."""

import copy
import itertools

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from helpers.oracles import algorithm_1_step, make_problem
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback, SAflexMixin
from saflex_lightning.engines import descent_direction, make_engine
from saflex_lightning.functional import make_settings, solve, weighted_cross_entropy
from saflex_lightning.functional.losses import dense_target
from saflex_lightning.validation.stream import mix_seed

STEPS, ROWS, LEARNING_RATE = 5, 6, 0.3
GRADIENT = make_settings("gradient")


def make_batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(ROWS, 5, generator=generator, dtype=torch.float64),
            torch.randint(4, (ROWS,), generator=generator),
        )
        for _ in range(STEPS)
    ]


def make_model() -> nn.Module:
    return make_problem(3, hidden=9).model


def standard_gumbel(seed: int) -> Tensor:
    """Draw -log(-log(U)), with -log(U) from torch's own exponential."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.empty(ROWS, 4, dtype=torch.float64).exponential_(generator=generator)
    return -draws.log()


def assert_same_parameters(first: nn.Module, second: nn.Module) -> None:
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


# The documented example: SAFLEX in a plain PyTorch loop, without Lightning


def train_step(model, engine, optimizer, batch, val_batch, settings=GRADIENT, generator=None):
    """Take one step on (inputs, target, augmented), steered by (inputs, target)."""
    inputs, target, augmented = batch
    val_inputs, val_target = val_batch
    model.eval()
    val_gradient = engine.gradient(
        run=lambda: model(val_inputs),
        loss=lambda val_logits: F.cross_entropy(val_logits, val_target),
    )
    model.train()
    finish = engine.jvp(lambda: model(inputs), descent_direction(val_gradient))
    logits = model(inputs)
    solution = solve(
        finish.of(logits), logits.softmax(-1), target, augmented, settings, generator=generator
    )
    loss = weighted_cross_entropy(logits, solution.soft_labels, solution.weights)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return solution


def train(model, optimizer, batches, val_batches):
    engine = make_engine("finite_difference", model)
    return [
        train_step(model, engine, optimizer, batch, val_batch)
        for batch, val_batch in zip(batches, itertools.cycle(val_batches))
    ]


class Classifier(SAflexMixin, pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.solutions = []

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs)

    def training_step(self, batch, batch_idx) -> Tensor:
        inputs, target = batch
        loss = self.saflex_loss(self.saflex_forward(inputs), target)
        self.solutions.append(self.saflex_solution)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), LEARNING_RATE)


THEOREM_1 = {"label_rule": "argmax", "weight_rule": "sum", "gumbel": False}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize(
    ("keywords", "by_hand"),
    [
        ({}, {}),
        ({"gumbel": False}, {}),
        (THEOREM_1, {"theorem_1": True}),
    ],
    ids=["Algorithm 1", "without noise", "Theorem 1"],
)
def test_callback_and_trainer_equal_the_algorithm_by_hand(keywords, by_hand, tmp_path) -> None:
    train, validation = make_batches(0), make_batches(1)
    module = Classifier(make_model())
    by_hand_model = copy.deepcopy(module.model)
    callback = SAflexCallback(validation, preset="paper", seed=7, **keywords)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        precision="64-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    rows = TensorDataset(*(torch.cat(column) for column in zip(*train, strict=True)))
    trainer.fit(module, DataLoader(rows, ROWS))

    assert len(module.solutions) == STEPS
    changed = dropped = 0
    for number, solution in enumerate(module.solutions):
        noise = standard_gumbel(mix_seed(7, number, 0)) if callback.settings.gumbel else None
        weights, labels = algorithm_1_step(
            by_hand_model,
            train[number],
            validation[number],
            learning_rate=LEARNING_RATE,
            noise=noise,
            **by_hand,
        )
        torch.testing.assert_close(solution.weights, weights)
        torch.testing.assert_close(solution.soft_labels, labels)
        changed += int((labels.argmax(-1) != train[number][1]).sum())
        dropped += int((weights == 0).sum())
    assert_same_parameters(module.model, by_hand_model)
    assert changed > STEPS
    # without noise the best label never has a negative product, and no row is dropped
    assert (dropped == 0) == (keywords == {"gumbel": False})


@pytest.mark.parametrize(
    ("engine", "keywords", "by_hand"),
    [
        ("forward_mode", {}, {}),
        ("forward_mode", {"score_space": "probs"}, {"score_space": "probs"}),
        ("forward_mode", {"score_space": "logits"}, {"score_space": "logits"}),
        (
            "forward_mode",
            {"label_penalty": 0.8, "temperature": 0.3},
            {"label_penalty": 0.8, "temperature": 0.3},
        ),
        ("forward_mode", THEOREM_1, {"theorem_1": True}),
        (
            "forward_mode",
            {**THEOREM_1, "score_space": "logits"},
            {"theorem_1": True, "score_space": "logits"},
        ),
        # hard labels and weights of 0 or equal size: the approximate engine is exact as well
        ("finite_difference", THEOREM_1, {"theorem_1": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("union", [False, True], ids=["replaced", "union"])
def test_plain_loop_equals_the_algorithm_by_hand(engine, keywords, by_hand, union) -> None:
    settings = make_settings("paper", engine=engine, **keywords)
    model = make_model()
    by_hand_model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    augmented = torch.arange(ROWS) >= 3 if union else torch.ones(ROWS, dtype=torch.bool)
    solver = make_engine(settings.engine, model)
    generator = torch.Generator()

    for number, (batch, val_batch) in enumerate(zip(make_batches(0), make_batches(1), strict=True)):
        solution = train_step(
            model,
            solver,
            optimizer,
            (*batch, augmented),
            val_batch,
            settings,
            generator.manual_seed(number),
        )
        weights, labels = algorithm_1_step(
            by_hand_model,
            batch,
            val_batch,
            learning_rate=LEARNING_RATE,
            noise=standard_gumbel(number) if settings.gumbel else None,
            augmented=augmented,
            **by_hand,
        )
        torch.testing.assert_close(solution.weights, weights)
        torch.testing.assert_close(solution.soft_labels, labels)
    assert_same_parameters(model, by_hand_model)


def make_blobs(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    target = torch.randint(3, (rows,), generator=generator)
    centres = torch.tensor([[3.0, 0.0], [-1.5, 2.6], [-1.5, -2.6]])
    return centres[target] + torch.randn(rows, 2, generator=generator), target


def test_plain_loop_of_the_documentation() -> None:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    val_inputs, val_target = make_blobs(60, generator)
    batches, wrong = [], torch.arange(32) >= 24  # a quarter of each batch is wrongly augmented
    for _ in range(40):
        inputs, target = make_blobs(32, generator)
        target = torch.where(wrong, (target + 1) % 3, target)
        batches.append((inputs, target, torch.arange(32) >= 16))

    before = F.cross_entropy(model(val_inputs), val_target).item()
    solutions = train(model, optimizer, batches, [(val_inputs, val_target)])
    after = F.cross_entropy(model(val_inputs), val_target).item()

    assert len(solutions) == 40
    assert after < 0.5 * before
    for solution, (_, target, augmented) in zip(solutions, batches, strict=True):
        own = dense_target(target, 3, torch.float32)
        assert torch.equal(solution.weights[~augmented], torch.ones(16))
        assert torch.equal(solution.soft_labels[~augmented], own[~augmented])
        assert solution.weights[augmented].sum().item() == pytest.approx(16)
    weights = torch.stack([solution.weights for solution in solutions])
    right = ~wrong & (torch.arange(32) >= 16)
    assert weights[:, right].mean() > 1.2 * weights[:, wrong].mean()
