"""The per-sample losses against `F.cross_entropy` in every option, and the checks of targets."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.solving import row_losses
from torch import Tensor

from saflex_lightning.functional.losses import (
    LossOptions,
    check_target,
    dense_target,
    mean_cross_entropy,
    weighted_cross_entropy,
    widen,
)

CLASSES = 4
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0], dtype=torch.float64)
HARD = torch.tensor([0, 3, 3, 1, 2, 0])
SOFT = torch.tensor(
    [
        [1.0, 0.0, 0.0, 0.0],
        [0.25, 0.25, 0.25, 0.25],
        [0.0, 0.3, 0.0, 0.7],
        [0.1, 0.2, 0.3, 0.4],
        [0.5, 0.5, 0.0, 0.0],
        [0.0, 0.0, 0.9, 0.1],
    ],
    dtype=torch.float64,
)


def make_logits(dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(6, CLASSES, generator=generator, dtype=torch.float64)).to(dtype)


def value_and_gradient(loss, logits: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    value = loss(logits)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    return value.detach(), gradient


def test_one_loss_by_hand() -> None:
    # p = (1/4, 3/4); loss = -(0.5 log 1/4 + 0.5 log 3/4)
    logits = torch.tensor([[0.0, math.log(3.0)]])
    loss = row_losses(logits, torch.tensor([[0.5, 0.5]]))
    assert loss.tolist() == pytest.approx([0.5 * math.log(4) + 0.5 * math.log(4 / 3)])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("target", [HARD, SOFT], ids=["hard", "soft"])
def test_rows_equal_cross_entropy(target, class_weight, label_smoothing) -> None:
    options = {"label_smoothing": label_smoothing}
    value, gradient = value_and_gradient(
        lambda logits: row_losses(
            logits,
            dense_target(target, CLASSES, logits.dtype),
            class_weight=class_weight,
            **options,
        ),
        make_logits(),
    )
    expected, expected_gradient = value_and_gradient(
        lambda logits: F.cross_entropy(
            logits, target, weight=class_weight, reduction="none", **options
        ),
        make_logits(),
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("class_weight", [None, CLASS_WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    ("target", "given"),
    [(HARD, HARD), (HARD, dense_target(HARD, CLASSES, torch.float64)), (SOFT, SOFT)],
    ids=["classes", "hard", "soft"],
)
def test_mean_equals_cross_entropy(target, given, class_weight, label_smoothing) -> None:
    # F.cross_entropy divides by the class weights of hard targets, and by the rows of soft ones.
    total = torch.tensor(6.0, dtype=torch.float64)
    if target.ndim == 1 and class_weight is not None:
        total = class_weight[target].sum()
    options = {"label_smoothing": label_smoothing}
    value, gradient = value_and_gradient(
        lambda logits: weighted_cross_entropy(
            logits,
            given,
            torch.ones(6, dtype=torch.float64),
            class_weight=class_weight,
            total=total,
            **options,
        ),
        make_logits(),
    )
    expected, expected_gradient = value_and_gradient(
        lambda logits: F.cross_entropy(logits, target, weight=class_weight, **options),
        make_logits(),
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_losses_of_half_precision_are_computed_in_float32(dtype) -> None:
    logits = make_logits(dtype)
    loss = row_losses(logits, SOFT.to(dtype))
    expected = row_losses(logits.float(), SOFT.to(dtype).float())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_a_class_that_is_ruled_out_costs_nothing_where_no_label_is_on_it() -> None:
    logits = make_logits().index_fill(1, torch.tensor([1]), -torch.inf)
    possible = SOFT[:, [0, 2, 3]] / SOFT[:, [0, 2, 3]].sum(-1, keepdim=True)
    value, gradient = value_and_gradient(
        lambda scores: row_losses(scores, F.pad(possible, (1, 0))[:, [1, 0, 2, 3]]), logits
    )
    expected, expected_gradient = value_and_gradient(
        lambda scores: F.cross_entropy(scores, possible, reduction="none"), logits[:, [0, 2, 3]]
    )
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient[:, [0, 2, 3]], expected_gradient)
    assert not gradient[:, 1].any()
    assert row_losses(logits[1:2], SOFT[1:2]).item() == torch.inf


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_widen_narrows_nothing(dtype, wide) -> None:
    assert widen(torch.zeros(1, dtype=dtype)).dtype == wide


def test_mean_of_several_tasks_is_the_mean_of_their_means() -> None:
    first, second = make_logits(), make_logits().flip(0)
    options = LossOptions(CLASS_WEIGHT.float(), 0.1)
    found = mean_cross_entropy((first, second), HARD, options)
    expected = [
        F.cross_entropy(scores, HARD, weight=CLASS_WEIGHT, label_smoothing=0.1)
        for scores in (first, second)
    ]
    torch.testing.assert_close(found, sum(expected) / 2)
    torch.testing.assert_close(mean_cross_entropy(first, HARD, options), expected[0])
    pairs = make_logits()[:4]  # without a target, row i belongs to column i
    torch.testing.assert_close(
        mean_cross_entropy(pairs, None, LossOptions()), F.cross_entropy(pairs, torch.arange(4))
    )


def test_options_of_another_kind_need_another_gradient() -> None:
    plain, weighted = LossOptions(), LossOptions(CLASS_WEIGHT)
    assert weighted.same_kind(LossOptions(2 * CLASS_WEIGHT))
    assert LossOptions(None, 0.1).same_kind(LossOptions(None, 0.2))
    assert not plain.same_kind(weighted)
    assert not plain.same_kind(LossOptions(None, 0.1))


def test_large_logits_of_float16_stay_finite() -> None:
    logits = torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)
    loss = row_losses(logits, torch.tensor([[0.0, 1.0]], dtype=torch.float16))
    # float16 holds neither the loss nor the difference of the logits
    assert loss.item() == pytest.approx(120000, rel=1e-3)


def test_float64_stays_float64() -> None:
    assert row_losses(make_logits(), SOFT.float()).dtype == torch.float64


def test_dense_target_of_labels_and_of_probabilities() -> None:
    dense = dense_target(torch.tensor([2, 0], dtype=torch.int32), 3, torch.float64)
    assert dense.tolist() == [[0, 0, 1], [1, 0, 0]]
    assert dense.dtype == torch.float64
    kept = dense_target(torch.tensor([[0.25, 0.75]]), 2, torch.float64)
    assert kept.tolist() == [[0.25, 0.75]]
    assert kept.dtype == torch.float64


def test_weighted_mean_by_hand() -> None:
    losses, weights = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 0.0, 1.0])
    logits = torch.stack([losses.expm1().log(), torch.zeros(3)], 1)  # of class 1
    labels = torch.tensor([[0.0, 1.0]]).expand(3, 2)
    torch.testing.assert_close(row_losses(logits, labels), losses)
    assert weighted_cross_entropy(logits, labels, weights).item() == pytest.approx(7 / 3)
    # `total` counts all ranks, so one rank's part is smaller than its own mean
    found = weighted_cross_entropy(logits, labels, weights, total=torch.tensor(14.0))
    assert found.item() == pytest.approx(0.5)


@pytest.mark.parametrize("labels", [HARD, SOFT], ids=["hard", "soft"])
def test_weighted_mean_of_no_weight_is_zero_and_connected(labels) -> None:
    logits = make_logits().requires_grad_()
    loss = weighted_cross_entropy(logits, labels, torch.zeros(6, dtype=torch.float64))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("target", [HARD, SOFT, SOFT.float(), HARD.to(torch.int32)])
def test_good_targets_pass(target) -> None:
    check_target(target, make_logits())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probabilities_rounded_to_half_precision_pass(dtype) -> None:
    target = torch.tensor([[0.1, 0.9, 0.0], [0.3, 0.3, 0.4]], dtype=dtype)
    check_target(target, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="sum to 1"):
        check_target(target * 0.98, torch.zeros(2, 3))


def test_empty_batch_passes() -> None:
    check_target(torch.empty(0, dtype=torch.int64), torch.empty(0, CLASSES))


@pytest.mark.parametrize(
    ("target", "logits", "error", "message"),
    [
        (HARD, torch.zeros(6), ValueError, r"got shape \(6,\), as of a binary .* two logits"),
        (HARD % 2, torch.zeros(6, 1), ValueError, r"got shape \(6, 1\), as of a binary .* two log"),
        (HARD, torch.zeros(6, 4, 2, 2), ValueError, r"got \(6, 4, 2, 2\).*dense targets"),
        (HARD, torch.zeros(6, 0), ValueError, r"\(batch, classes\), but got \(6, 0\)"),
        (HARD.float(), torch.zeros(6, 4), TypeError, r"torch.float32.*Binary cross-entropy"),
        (SOFT.round().long(), torch.zeros(6, 4), TypeError, r"hold probabilities.*torch.int64"),
        (HARD[:5], torch.zeros(6, 4), ValueError, r"\(6,\) or \(6, 4\).*got \(5,\)"),
        (SOFT, torch.zeros(6, 5), ValueError, r"\(6, 5\).*got \(6, 4\).*same classes"),
        (HARD, torch.zeros(6, 3), ValueError, r"labels in \[0, 2\].*from 0 to 3"),
        (HARD - 1, torch.zeros(6, 4), ValueError, r"labels in \[0, 3\].*from -1 to 2"),
        (HARD - 100, torch.zeros(6, 4), ValueError, r"`ignore_index` is not supported"),
        (SOFT / 2, torch.zeros(6, 4), ValueError, r"row sums from 0.5 to 0.5"),
        (SOFT - SOFT.roll(1, 0), torch.zeros(6, 4), ValueError, r"probabilities.*values from -"),
        (SOFT.new_full((6, 4), torch.nan), torch.zeros(6, 4), ValueError, r"probabilities"),
    ],
)
def test_bad_targets_are_refused_with_what_was_found(target, logits, error, message) -> None:
    with pytest.raises(error, match=message):
        check_target(target, logits)


def test_values_are_looked_at_only_when_asked() -> None:
    check_target(HARD + 50, torch.zeros(6, 4), values=False)
    with pytest.raises(ValueError, match="labels in"):
        check_target(HARD + 50, torch.zeros(6, 4))
