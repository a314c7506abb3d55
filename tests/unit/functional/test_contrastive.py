"""The contrastive loss against loops over listed pairs, and the refined contrastive task."""

import math

import pytest
import torch
from helpers.solving import row_losses, solve
from torch import Tensor

from saflex_lightning.functional import contrastive_scores, same_class_target
from saflex_lightning.functional.contrastive import contrastive_target, gather_rows
from saflex_lightning.functional.losses import (
    NO_OPTIONS,
    dense_target,
    mean_cross_entropy,
)
from saflex_lightning.functional.ranks import Ranks


def make_features(rows: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
    return draw[0], draw[1]


def cosine(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum() / (first.square().sum() * second.square().sum()).sqrt()


def info_nce(first: Tensor, second: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Return the loss of each pair, the mean of its two directions (Ding et al. 2024, Eq. 12)."""
    both = contrastive_scores(first, second, scale)
    targets = [dense_target(contrastive_target(part), len(part), part.dtype) for part in both]
    return sum(map(row_losses, both, targets)) / 2


def looped_info_nce(first: Tensor, second: Tensor, scale: float) -> Tensor:
    losses = []
    for i in range(len(first)):
        positive = scale * cosine(first[i], second[i])
        by_row = sum(torch.exp(scale * cosine(first[i], second[j])) for j in range(len(first)))
        by_column = sum(torch.exp(scale * cosine(first[j], second[i])) for j in range(len(first)))
        losses.append(-(positive - by_row.log() + positive - by_column.log()) / 2)
    return torch.stack(losses)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("scale", [1.0, 14.0])
def test_loss_and_gradient_equal_loops_over_pairs(rows, scale) -> None:
    first, second = (part.requires_grad_() for part in make_features(rows))
    loss, expected = info_nce(first, second, scale), looped_info_nce(first, second, scale)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    for part in (first, second):
        (gradient,) = torch.autograd.grad(loss.sum(), part, retain_graph=True)
        (expected_gradient,) = torch.autograd.grad(expected.sum(), part, retain_graph=True)
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-11, atol=1e-11)


def test_the_mean_over_both_directions_is_the_contrastive_loss() -> None:
    first, second = make_features()
    found = mean_cross_entropy(contrastive_scores(first, second, 5.0), None, NO_OPTIONS)
    torch.testing.assert_close(found, looped_info_nce(first, second, 5.0).mean())


def test_a_learned_scale_gets_its_gradient() -> None:
    first, second = make_features()
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(info_nce(first, second, scale).sum(), scale)
    step = 1e-6
    ahead = looped_info_nce(first, second, 2.0 + step).sum()
    behind = looped_info_nce(first, second, 2.0 - step).sum()
    assert gradient.item() == pytest.approx(((ahead - behind) / (2 * step)).item(), rel=1e-7)


def test_scores_are_scaled_cosines_once_per_direction() -> None:
    first, second = torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([[0.0, 1.0], [5.0, 0.0]])
    per_first, per_second = contrastive_scores(first, second, 10.0)
    torch.testing.assert_close(per_first, torch.tensor([[8.0, 6.0], [10.0, 0.0]]))
    assert torch.equal(per_second, per_first.T)


def test_loss_does_not_depend_on_the_length_of_features() -> None:
    first, second = make_features()
    torch.testing.assert_close(info_nce(3.0 * first, 0.2 * second), info_nce(first, second))


def test_one_pair_has_no_loss() -> None:
    assert info_nce(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, -1.0]])).tolist() == [0.0]


def test_uninformative_features_lose_log_of_the_batch() -> None:
    assert info_nce(torch.ones(7, 2), torch.ones(7, 2)).tolist() == pytest.approx(
        [math.log(7)] * 7, abs=1e-6
    )


def test_target_is_the_diagonal() -> None:
    target = contrastive_target(torch.zeros(3, 3))
    assert target.tolist() == [0, 1, 2]
    assert target.dtype == torch.int64


def test_target_of_gathered_scores_is_the_block_of_the_rank(monkeypatch) -> None:
    monkeypatch.setattr(Ranks, "current", classmethod(lambda _: Ranks(2, 3)))
    assert contrastive_target(torch.zeros(2, 6)).tolist() == [4, 5]
    assert contrastive_target(torch.zeros(2, 2)).tolist() == [0, 1]  # of this process alone
    with pytest.raises(ValueError, match=r"or one 3 times as wide as high.*got shape \(2, 4\)"):
        contrastive_target(torch.zeros(2, 4))


def test_one_process_gathers_its_own_rows() -> None:
    rows, _ = make_features()
    assert gather_rows(rows) is rows


def test_scores_against_gathered_rows_are_those_of_the_whole_batch() -> None:
    whole = contrastive_scores(*make_features(6), 5.0)
    normalized = [torch.nn.functional.normalize(part, dim=-1) for part in make_features(6)]
    first, second = (part[2:4] for part in make_features(6))

    def gather(rows: Tensor) -> Tensor:
        return next(full for full in normalized if torch.equal(full[2:4], rows))

    for found, expected in zip(
        contrastive_scores(first, second, 5.0, gather=gather), whole, strict=True
    ):
        torch.testing.assert_close(found, expected[2:4])


def test_same_class_target_equals_loops() -> None:
    labels, pair_labels = torch.tensor([3, 0, 3]), torch.tensor([0, 3, 7, 3, 0])
    target = same_class_target(labels, pair_labels)
    for i, label in enumerate(labels.tolist()):
        share = 1 / pair_labels.tolist().count(label)
        for j, pair_label in enumerate(pair_labels.tolist()):
            assert target[i, j].item() == (share if label == pair_label else 0)
    square = same_class_target(pair_labels)
    assert torch.equal(square, square.T)  # so that one target serves both directions


@pytest.mark.parametrize("shape", [(3, 4), (3,), (2, 2, 2)])
def test_target_of_other_shapes_is_refused(shape) -> None:
    with pytest.raises(ValueError, match=r"square similarity matrix.*Pass `target`") as caught:
        contrastive_target(torch.zeros(shape))
    assert str(shape) in str(caught.value)


def test_pairs_are_weighed_without_renormalising_classes() -> None:
    # Every class has one row, so renormalising classes would pull the weights together.
    per_first, _ = contrastive_scores(*make_features(6), 5.0)
    jvp = make_features(6, seed=1)[0] @ make_features(6, seed=2)[0].T
    target = contrastive_target(per_first)
    solution = solve(jvp, per_first.softmax(-1), target, balance_classes=False)
    keep = torch.sigmoid(solution.inner_products.diagonal())
    torch.testing.assert_close(solution.weights, 6 * keep / keep.sum())
    balanced = solve(jvp, per_first.softmax(-1), target)
    assert balanced.weights.std() < 0.95 * solution.weights.std()
