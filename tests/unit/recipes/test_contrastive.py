"""Fine-tuning two towers: captions, head, loss, steering, schedule and score."""

import math
from dataclasses import replace

import pytest
import torch
from helpers.clip import NAMES, TINY, make_images, make_tuner, union_batches
from helpers.training import fit, state_of
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import SAflexCallback
from saflex_lightning.recipes.contrastive import ContrastiveTuner, MacroF1, OpenClipEncoders
from saflex_lightning.recipes.contrastive.encoders import prepare_images
from saflex_lightning.recipes.contrastive.prompts import (
    make_prompts,
    template_of_rows,
    zero_shot_head,
)
from saflex_lightning.recipes.contrastive.schedule import warm_up_cosine_factor

pytestmark = pytest.mark.filterwarnings("ignore:Expected more matched parameters than unknowns")


def val_loader(rows=12, seed=7):
    return DataLoader(TensorDataset(*make_images(rows, seed=seed)), 6)


def looped_loss(module, batch, *, same_class=False):
    """The mean over both directions and all pairs, from listed cosines."""
    towers = module.encoders
    prompts = make_prompts(NAMES, module.templates)
    texts = [
        prompts[label * 2 + (index + module.current_epoch) % 2]
        for label, index in zip(batch.target.tolist(), batch.index.tolist(), strict=True)
    ]
    images = towers.encode_image(batch.inputs)
    captions = torch.cat([towers.encode_text(towers.tokenize([text])) for text in texts])
    cosines = torch.nn.functional.cosine_similarity(images.unsqueeze(1), captions, dim=-1)
    scores = towers.logit_scale.exp() * cosines
    labels, losses = batch.target.tolist(), []
    for direction in (scores, scores.T):
        for i, row in enumerate(direction.log_softmax(-1)):
            positives = [j for j, label in enumerate(labels) if label == labels[i]]
            positives = positives if same_class else [i]
            losses.append(-sum(row[j] for j in positives) / len(positives))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("target", ["diagonal", "same_class"])
@pytest.mark.parametrize("rows", [2, 6], ids=["fewer rows than captions", "more rows"])
def test_loss_without_the_callback_equals_loops_over_pairs(target, rows):
    module = make_tuner(target=target)
    batch = next(iter(union_batches(rows, 1)))
    module.log = lambda *args, **kwargs: None
    loss = module.training_step(batch, 0)
    expected = looped_loss(module, batch, same_class=target == "same_class")
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("preset", ["gradient", "paper"])
@pytest.mark.parametrize("steering_loss", ["classes", "pairs"])
def test_both_directions_are_refined_and_both_towers_learn(preset, steering_loss):
    module = make_tuner(steering_loss=steering_loss)
    before = state_of(module)
    callback = SAflexCallback(val_loader(), preset)
    fit(module, callback, train=union_batches(), max_epochs=1)
    per_image, per_text = module.saflex_solution
    for solution in (per_image, per_text):
        assert solution.soft_labels.shape == (12, 12)
        assert torch.equal(solution.weights[:6], torch.ones(6))  # clean rows
        assert torch.equal(solution.soft_labels[:6], torch.eye(12)[:6])
        assert not torch.equal(solution.soft_labels[6:], torch.eye(12)[6:])
    # Each direction has weights of its own: they answer different questions about a pair.
    assert not torch.equal(per_image.soft_labels, per_text.soft_labels)
    moved = {
        name for name, value in module.named_parameters() if not torch.equal(value, before[name])
    }
    assert {"encoders.model.logit_scale", "encoders.model.text_projection"} <= moved
    assert "encoders.model.visual.proj" in moved


def test_steering_by_pairs_uses_the_training_loss_on_validation_pairs():
    module = make_tuner(steering_loss="pairs", target="same_class")
    images, labels = make_images(6)
    inputs, target = module.saflex_val_batch((images, labels))
    assert torch.equal(inputs[0], images)
    assert inputs[1].tolist() == [2 * label + row % 2 for row, label in enumerate(labels.tolist())]
    assert target[0].tolist() == [0.5, 0, 0, 0.5, 0, 0]
    inputs, target = make_tuner().saflex_val_batch((images, labels))
    assert len(inputs) == 1
    assert torch.equal(target, labels)


def test_learned_scale_stays_at_most_100():
    module = make_tuner(lr=1.0)
    with torch.no_grad():
        module.encoders.logit_scale.fill_(math.log(99.9))
    fit(module, train=union_batches(), max_epochs=1)
    assert module.encoders.logit_scale.exp().item() <= 100.0 + 1e-3


def test_evaluation_classifies_by_the_captions_of_the_moment():
    module = make_tuner()
    trainer = fit(module, train=union_batches(), val_dataloaders=val_loader(), max_epochs=2)
    images, labels = make_images(12, seed=7)
    with torch.no_grad():
        features = module.encoders.encode_image(images)
        by_hand = []
        for name in NAMES:
            parts = [
                module.encoders.encode_text(module.encoders.tokenize([text]))[0]
                for text in (f"a photo of {name}.", f"{name} in the wild.")
            ]
            mean = sum(part / part.norm() for part in parts) / 2
            by_hand.append(torch.nn.functional.cosine_similarity(features, mean, dim=-1))
        predicted = torch.stack(by_hand, -1).argmax(-1)
    accuracy = (predicted == labels).float().mean()
    assert trainer.callback_metrics["val/accuracy"] == pytest.approx(accuracy.item())
    in_distribution, out = trainer.test(module, [val_loader(), val_loader(seed=8)], verbose=False)
    assert in_distribution.keys() == {"test/accuracy", "test/f1"}
    assert out.keys() == {"test_ood/accuracy", "test_ood/f1"}
    assert in_distribution["test/accuracy"] == pytest.approx(accuracy.item())


def test_class_names_may_come_from_the_datamodule():
    module = ContrastiveTuner(OpenClipEncoders(config=TINY), warmup_steps=0)
    with pytest.raises(Exception, match="Expected `class_names` or a datamodule with a method"):
        fit(module, train=union_batches())


@pytest.mark.parametrize(
    ("names", "templates", "message"),
    [
        ([], ["{}"], "one name per class, but it is empty"),
        (["cat"], ["a photo"], "captions with {} for the class name, but got \\['a photo'\\]"),
    ],
)
def test_unusable_names_and_templates_are_refused(names, templates, message):
    with pytest.raises(ValueError, match=message):
        make_prompts(names, templates)


def test_unusable_settings_are_refused():
    with pytest.raises(ValueError, match="`steering_loss` to be one of"):
        make_tuner(steering_loss="captions")
    with pytest.raises(TypeError, match=r"`encode_text`, but got Linear\. Wrap the towers"):
        ContrastiveTuner(torch.nn.Linear(2, 2), NAMES)


def test_mixed_labels_are_refused():
    batch = next(iter(union_batches()))
    mixed = replace(batch, target=torch.full((12, 3), 1 / 3))
    with pytest.raises(TypeError, match=r"float32 of shape \(12, 3\)\. No caption says a mixture"):
        make_tuner().training_step(mixed, 0)


def test_rows_go_through_all_templates():
    index = torch.arange(4)
    assert [template_of_rows(index, epoch, 3).tolist() for epoch in (0, 1)] == [
        [0, 1, 2, 0],
        [1, 2, 0, 1],
    ]


def test_head_averages_directions_and_not_lengths():
    features = torch.tensor([[3.0, 4.0], [30.0, -40.0], [0.0, 2.0], [0.0, 7.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(zero_shot_head(features, 2), expected)


def test_schedule_rises_then_falls_to_zero():
    factors = [warm_up_cosine_factor(step, 4, 12) for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[8] == pytest.approx(0.5)
    assert warm_up_cosine_factor(12, 4, 12) == pytest.approx(0.0)
    assert warm_up_cosine_factor(2, 500, 3) == 3 / 500
    optimizer_factors = []
    module = make_tuner(warmup_steps=2)
    module.on_before_zero_grad = lambda optimizer: optimizer_factors.append(
        optimizer.param_groups[0]["lr"] / module.lr
    )
    fit(module, train=union_batches(batches=4), max_epochs=1)
    assert optimizer_factors == pytest.approx([warm_up_cosine_factor(s, 2, 4) for s in range(4)])


def test_images_get_the_size_and_the_statistics_of_the_tower():
    black = prepare_images(-torch.ones(1, 1, 4, 4), (8, 8), (0.5, 0.2, 0.1), (0.5, 0.1, 0.2))
    assert black.shape == (1, 3, 8, 8)
    expected = torch.tensor([-1.0, -2.0, -0.5])
    torch.testing.assert_close(black.mean((0, 2, 3)), expected)
    torch.testing.assert_close(black.std((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)


def test_macro_f1_averages_over_classes_that_occur():
    target = torch.tensor([0, 0, 1, 1, 1, 3])
    predicted = torch.tensor([0, 1, 1, 1, 2, 0])
    metric = MacroF1(5)
    for rows in (slice(0, 4), slice(4, 6)):
        metric.update(predicted[rows], target[rows])
    # Class 0: TP 1, FP 1, FN 1; class 1: TP 2, FP 1, FN 1; class 3: never found; 2 and 4 are out.
    assert metric.compute().item() == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    scores = torch.nn.functional.one_hot(predicted, 5).float()
    metric.reset()
    metric.update(scores, target)
    assert metric.compute().item() == pytest.approx((1 / 2 + 2 / 3) / 3)
