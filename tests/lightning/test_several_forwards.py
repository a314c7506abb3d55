"""Several calls of `saflex_forward` in one training step, each with its own loss."""

import pytest
import torch
from helpers.grouped import Grouped, grouped_loader, steering
from helpers.training import (
    ENGINES,
    EVERY_WAY,
    GRADIENT,
    Classifier,
    assert_same_state,
    callback,
    fit,
    seeded,
    state_of,
)

from saflex_lightning import SAflexCallback


class TwoViews(Classifier):
    """Trains on the rows and on a second view of them, in one of several orders."""

    def __init__(self, order, **kwargs):
        super().__init__(**kwargs)
        self.order, self.weights = order, []

    def loss(self, logits, target):
        loss = self.saflex_loss(logits, target)
        self.weights.append(self.saflex_solution.weights)
        return loss

    def training_step(self, batch, batch_idx):
        inputs, target = batch
        second = inputs.roll(1, -1)
        if self.order == "alternating":
            first_loss = self.loss(self.saflex_forward(inputs), target)
            return first_loss + self.loss(self.saflex_forward(second), target)
        if self.order == "first alone":
            return self.loss(self.saflex_forward(inputs), target)
        first_logits, second_logits = self.saflex_forward(inputs), self.saflex_forward(second)
        if self.order == "copied":
            first_logits = first_logits.clone()
        if self.order == "backwards":
            second_loss = self.loss(second_logits, target)
            return second_loss + self.loss(first_logits, target)
        return self.loss(first_logits, target) + self.loss(second_logits, target)


@pytest.mark.parametrize("settings", ENGINES, ids=str)
@pytest.mark.parametrize("order", ["forwards first", "backwards"])
def test_each_loss_takes_the_tangent_of_its_own_scores(settings, order):
    runs = [seeded(lambda order=o: TwoViews(order, plain=True)) for o in ("alternating", order)]
    for module in runs:
        fit(module, callback(**settings), max_epochs=1)
    alternating, other = (module.weights for module in runs)
    if order == "backwards":
        other = [other[place ^ 1] for place in range(len(other))]
    for ours, theirs in zip(alternating, other, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(alternating[0], alternating[1])
    alone = seeded(lambda: TwoViews("first alone", plain=True))
    fit(alone, callback(**settings), max_epochs=1, max_steps=1)
    torch.testing.assert_close(alone.weights[0], alternating[0])


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
@pytest.mark.parametrize("order", ["forwards first", "alternating"])
def test_the_graph_of_the_first_forward_outlives_the_second_extra_pass(settings, order):
    """Batch normalization keeps its running statistics for the backward pass."""
    module = seeded(lambda: TwoViews(order))
    start = state_of(module)
    fit(module, callback(**settings), max_epochs=1)
    assert all((state_of(module)[name] != value).any() for name, value in start.items())


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_the_order_of_the_calls_changes_no_bit(settings):
    first, second = (
        seeded(lambda order=order: TwoViews(order, plain=True))
        for order in ("alternating", "forwards first")
    )
    fit(first, callback(**settings))
    fit(second, callback(**settings))
    assert_same_state(state_of(first), state_of(second))


@pytest.mark.parametrize("settings", EVERY_WAY, ids=str)
@pytest.mark.parametrize(
    "change",
    ["permuted", "sliced", "of another forward", "scaled", "scaled in place", "detached"],
)
def test_logits_that_no_forward_returned_are_refused(change, settings):
    class Changing(Classifier):
        def training_step(self, batch, batch_idx):
            inputs, target = batch
            logits = self.saflex_forward(inputs)
            if change == "permuted":
                logits, target = logits.flip(0), target.flip(0)
            if change == "sliced":
                logits, target = logits[:8], target[:8]
            if change == "of another forward":
                logits = self.net(inputs)
            if change == "scaled":
                logits = 1.0 * logits
            if change == "scaled in place":
                logits.mul_(2.0)
            if change == "detached":
                logits = logits.detach()
            return self.saflex_loss(logits, target)

    with pytest.raises(ValueError, match=r"one of the 1 calls of `saflex_forward`.*unchanged\."):
        fit(seeded(lambda: Changing(plain=True)), callback(**settings))


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_a_copy_of_logits_is_that_of_its_own_forward(settings):
    plain, copied = (
        seeded(lambda order=order: TwoViews(order, plain=True))
        for order in ("forwards first", "copied")
    )
    fit(plain, callback(**settings))
    fit(copied, callback(**settings))
    assert_same_state(state_of(plain), state_of(copied))


@pytest.mark.parametrize("settings", [{}, GRADIENT], ids=str)
def test_a_copy_of_the_only_logits_is_taken_for_them(settings):
    class Copied(Classifier):
        def training_step(self, batch, batch_idx):
            return self.saflex_loss(self.saflex_forward(batch[0]).clone(), batch[1])

    plain, copied = seeded(lambda: Classifier(plain=True)), seeded(lambda: Copied(plain=True))
    fit(plain, callback(**settings))
    fit(copied, callback(**settings))
    assert_same_state(state_of(plain), state_of(copied))


@pytest.mark.parametrize("settings", [{}, {**GRADIENT, "row_evidence": True}], ids=str)
def test_a_forward_before_that_of_the_loss_changes_nothing(settings):
    class Twice(Grouped):
        times = 2

        def training_step(self, batch, batch_idx):
            scores = [self.saflex_forward(batch.inputs) for _ in range(self.times)]
            loss = self.saflex_loss(scores[-1], batch.target)
            self.steps.append(self.saflex_solution.weights.tolist())
            return loss

    class Once(Twice):
        times = 1

    once, twice = (seeded(lambda make=make: make(plain=True)) for make in (Once, Twice))
    for module in (once, twice):
        fit(module, SAflexCallback(steering(), **settings), train=grouped_loader(), max_epochs=8)
    assert len(set(once.steps[-1])) > 1
    assert once.steps == twice.steps
    assert_same_state(state_of(once), state_of(twice))
