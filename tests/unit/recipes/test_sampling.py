"""Steering batches in which no class is missing."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning.recipes.sampling import ClassBatchSampler, rows_per_class


@pytest.mark.parametrize(
    ("class_counts", "batch_size", "balanced", "expected"),
    [
        ([9983, 17], 128, False, [127, 1]),
        ([9983, 17], 128, True, [64, 64]),
        ([50, 30, 20], 10, False, [5, 3, 2]),
        ([50, 30, 20], 10, True, [4, 3, 3]),
        ([5, 3, 1], 7, False, [4, 2, 1]),
        ([1000, 1, 1, 1], 4, False, [1, 1, 1, 1]),
        ([1000, 1, 1, 1], 6, False, [3, 1, 1, 1]),
    ],
)
def test_rows_of_each_class(class_counts, batch_size, balanced, expected):
    found = rows_per_class(torch.tensor(class_counts), batch_size, balanced=balanced)
    assert found.tolist() == expected


def make_target(rows=1000, positives=3):
    return (torch.arange(rows) % (rows // positives) == 7).long()


def draw_all(target, size, count, **settings):
    sampler = ClassBatchSampler(target, size, **{"balanced": False, "seed": 0, **settings})
    return [sampler.rows(draw) for draw in range(count)]


def test_every_batch_has_positives_where_most_plain_draws_have_none():
    target = make_target()
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    plain = [int(target[rows].sum()) for rows in order.split(50)]
    assert plain.count(0) >= 17  # of 20: there are three positives
    found = [int(target[rows].sum()) for rows in draw_all(target, 50, 20)]
    assert found == [1] * 20


def test_each_class_is_passed_through_before_a_row_comes_again():
    target = make_target(90, 30)
    batches = draw_all(target, 9, 10)
    assert sorted(row for rows in batches for row in rows) == list(range(90))
    again = draw_all(target, 9, 20)
    assert again[:10] == batches
    assert sorted(row for rows in again[10:] for row in rows) == list(range(90))
    assert again[10:] != batches


def test_ranks_share_the_rows():
    target = make_target(90, 30)
    ranks = [draw_all(target, 9, 5, rank=rank, world_size=2) for rank in range(2)]
    assert sorted(row for batches in ranks for rows in batches for row in rows) == list(range(90))


def test_seeds_differ():
    assert draw_all(make_target(), 9, 5) != draw_all(make_target(), 9, 5, seed=1)


def test_a_loader_goes_on_where_its_last_pass_stopped():
    target = make_target(100, 10)
    sampler = ClassBatchSampler(target, 20, balanced=True, seed=4)
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_sampler=sampler)
    assert len(loader) == 5
    passes = [[rows.tolist() for (rows,) in loader] for _ in range(2)]
    assert passes[0] + passes[1] == draw_all(target, 20, 10, balanced=True, seed=4)


@pytest.mark.parametrize(("target", "size"), [([0, 1, 2], 2), ([0, 2, 2], 3)])
def test_impossible_batches(target, size):
    match = "`steering_batch_size` to be at least the number of classes and"
    with pytest.raises(ValueError, match=match):
        ClassBatchSampler(torch.tensor(target), size, balanced=False, seed=0)
