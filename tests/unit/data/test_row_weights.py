"""`read_row_weights`: what a first run wrote reaches the second one; refusals."""

import pytest
import torch
from helpers.insight import grouped_run, visits
from helpers.training import NUM_CLASSES, Classifier, fit, make_rows, seeded, short_warm_up
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset, WeightedRandomSampler

from saflex_lightning import SAflexCallback, SAflexInsight
from saflex_lightning.data import read_row_weights, union_loader, with_index
from saflex_lightning.data.resumable import EpochSampler, ResumableSampler

ROWS, TRUSTED, BATCH = 192, 64, 32
HEADER = "index,given,belief,mean_weight\n"


@pytest.fixture(scope="module")
def first_run(tmp_path_factory):
    """A run on labels a third of which is wrong; returns its folder, its rows, which are wrong."""
    folder = tmp_path_factory.mktemp("first")
    inputs, target = make_rows(ROWS)
    wrong = torch.arange(ROWS) % 3 == 0
    given = torch.where(wrong, (target + 1) % NUM_CLASSES, target)
    rows = with_index(TensorDataset(inputs, given))
    loader = DataLoader(rows, BATCH, shuffle=True, collate_fn=rows.collate)
    steering = DataLoader(TensorDataset(*make_rows(TRUSTED, seed=1)), BATCH, shuffle=True)
    callbacks = SAflexCallback(steering), SAflexInsight(folder, figures=False)
    with short_warm_up():
        fit(seeded(Classifier), *callbacks, train=loader, max_epochs=25)
    return folder, (inputs, given), wrong


def test_wrong_labels_count_less_than_right_ones(first_run):
    folder, _, wrong = first_run
    weights = read_row_weights(folder / "saflex_rows.csv", ROWS)
    assert weights.shape == (ROWS,)
    assert weights[wrong].mean() < 0.7 * weights[~wrong].mean()


def test_a_second_run_without_the_callback_draws_by_them(first_run):
    folder, (inputs, given), _ = first_run
    weights = read_row_weights(folder / "saflex_rows.csv", ROWS)
    trusted = TensorDataset(*make_rows(TRUSTED, seed=1))
    rows = ConcatDataset([TensorDataset(inputs, given), trusted])
    weights = torch.cat([weights, torch.ones(TRUSTED)])
    drawn = torch.tensor(list(WeightedRandomSampler(weights, 20_000)))
    shares = torch.bincount(drawn, minlength=len(rows)).double() / len(drawn)
    expected = weights / weights.sum()
    assert (shares - expected).abs().max() < 6 * (expected.max() / len(drawn)).sqrt()
    losses = []
    for second in (weights, torch.ones_like(weights)):
        draws = torch.Generator().manual_seed(0)
        sampler = WeightedRandomSampler(second, len(rows), generator=draws)
        module = seeded(Classifier)
        fit(module, train=DataLoader(rows, BATCH, sampler=sampler), max_epochs=30)
        module.eval()
        test, target = make_rows(1000, seed=2)
        losses.append(torch.nn.functional.cross_entropy(module(test), target).item())
    assert losses[0] < losses[1] - 0.05


def test_what_union_batches_made_of_a_row_has_its_number(tmp_path):
    _, recorder, _ = grouped_run(tmp_path, max_epochs=12)
    expected, counts = torch.zeros(2100, dtype=torch.float64), torch.zeros(2100)
    for _, index, *_, weight in visits(recorder.steps):
        expected[index] = 0.7 * expected[index] + weight
        counts[index] = 0.7 * counts[index] + 1
    weights = read_row_weights(tmp_path / "saflex_rows.csv", 1100, first_index=1000)
    expected = torch.where(counts > 0, expected / counts, 1)  # 1 for rows not known to the file
    torch.testing.assert_close(weights, expected[1000:], rtol=1e-4, atol=1e-6)
    assert (counts > 0).sum() > 150


def drawn(epochs, **settings):
    sampler = ResumableSampler(range(6), weights=torch.tensor([0.0, 1, 2, 3, 0, 2]), **settings)
    found = []
    for epoch in epochs:
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def test_loaders_draw_rows_as_often_as_they_weigh():
    counts = torch.tensor(drawn(range(4000), seed=1)).flatten().bincount(minlength=6)
    assert counts[[0, 4]].tolist() == [0, 0]
    expected = 24_000 * torch.tensor([1.0, 2, 3, 2]) / 8
    assert (counts[[1, 2, 3, 5]] - expected).abs().max() < 5 * expected.max().sqrt()
    assert drawn([3], seed=1) == drawn([3], seed=1) != drawn([4], seed=1)


def test_processes_share_the_rows_that_are_drawn_and_a_pass_begins_anywhere():
    (whole,) = drawn([2], seed=1)
    parts = [drawn([2], seed=1, num_replicas=2, rank=rank)[0] for rank in range(2)]
    assert [row for pair in zip(*parts, strict=True) for row in pair] == whole
    sampler = ResumableSampler(range(6), seed=1, weights=torch.tensor([0.0, 1, 2, 3, 0, 2]))
    sampler.set_epoch(2)
    sampler.start = 4
    assert [list(sampler), list(sampler)] == [whole[4:], whole]


def keys(*, rank=0, num_replicas=1, start=0):
    found = []
    for epoch in range(3):
        weights = torch.tensor([0.0, 1, 2, 3, 0, 2])
        share = {"rank": rank, "num_replicas": num_replicas}
        sampler = EpochSampler(range(6), seed=1, weights=weights, **share)
        sampler.set_epoch(epoch)
        sampler.start = start
        found.append(list(sampler))
    return found


def test_a_row_that_comes_again_is_augmented_anew():
    found = [key for epoch in keys() for key in epoch]
    assert len(set(found)) == len(found) == 18 > len({row for _, row in found})
    assert keys(start=4) == [epoch[4:] for epoch in keys()]
    for first, second, whole in zip(
        *(keys(rank=rank, num_replicas=2) for rank in range(2)), keys(), strict=True
    ):
        assert [key for pair in zip(first, second, strict=True) for key in pair] == whole

    rows = [(torch.zeros(4), 0)] * 2
    loader = union_loader(rows, noise, batch_size=2, weights=torch.tensor([1.0, 0]), replace=True)
    (batch,) = loader
    assert batch.index.tolist() == [2, 2]
    assert not torch.equal(*batch.inputs)


def noise(inputs):
    return inputs + torch.rand(4)


def test_union_batches_of_rows_by_weight():
    rows = [(torch.full((2,), float(row)), row % 2) for row in range(6)]
    weights = torch.tensor([0.0, 0, 0, 1, 0, 1])
    loader = union_loader(rows, torch.neg, replace=True, batch_size=3, weights=weights)
    batches = list(loader)
    assert set(torch.cat([batch.index for batch in batches]).tolist()) == {9, 11}
    assert sum(len(batch.index) for batch in batches) == 6


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ([1.0] * 6, TypeError, "a tensor of 6 numbers.*got list"),
        (torch.ones(5), ValueError, r"shape \(6,\).*got \(5,\)"),
        (torch.ones(6, 1), ValueError, r"got \(6, 1\)"),
        (torch.zeros(6), ValueError, "one of them positive, but got 0 to 0"),
        (torch.tensor([1, 1, 1, 1, 1, -1.0]), ValueError, "got -1 to 1"),
        (torch.tensor([1, 1, 1, 1, 1, torch.nan]), ValueError, "finite"),
    ],
)
def test_weights_that_no_row_can_be_drawn_by(weights, error, message):
    rows = [(torch.ones(2), 0)] * 6
    with pytest.raises(error, match=message):
        union_loader(rows, torch.neg, weights=weights)


def test_an_order_that_is_kept_has_no_weights():
    with pytest.raises(ValueError, match="`shuffle`=True"):
        union_loader([(torch.ones(2), 0)] * 6, torch.neg, weights=torch.ones(6), shuffle=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("index,given\n1,2\n", r"\['mean_weight'\] are missing"),
        ("", r"\['index', 'mean_weight'\] are missing"),
        (HEADER + "0,a,,0.5\n3,a,,1\n", "indices from 0 to 2, but line 3 has 3.*`first_index`"),
        (HEADER + "-1,a,,1\n", "line 2 has -1"),
        (HEADER + "1,a,,1\n1,a,,1\n", "line 3 has 1 again"),
        (HEADER + "1.5,a,,1\n", r"integer.*line 2.*got '1\.5' and '1'"),
        (HEADER + "1,a,,\n", "finite weight of 0 or more in line 2.*got '1' and ''"),
        (HEADER + "1,a,,nan\n", "got '1' and 'nan'"),
        (HEADER + "1,a,,inf\n", "got '1' and 'inf'"),
        (HEADER + "1,a,,-0.1\n", r"got '1' and '-0\.1'"),
        (HEADER + "1,a,\n", "Expected 4 cells in every row"),
        (HEADER + "1,\0,,1\n", "line 2 is not"),
    ],
)
def test_a_file_that_is_none_of_these_rows_is_refused(tmp_path, content, message):
    file = tmp_path / "saflex_rows.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_row_weights(file, 3)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("0,cat,,1\n2,dog,,1\n1,dog,,1\n", "line 4 has 'dog' for row 1, which is of class 0"),
        ("0,cat,,1\n2,cat,,1\n", "line 3 has 'cat' for row 2, which is of class 1"),
        ("2,0,,1\n0,1,,1\n1,0,,1\n", "line 4 has '0' for row 1"),
    ],
)
def test_a_file_of_rows_with_other_labels_is_refused(tmp_path, lines, message):
    file = tmp_path / "saflex_rows.csv"
    file.write_text(HEADER + lines)
    with pytest.raises(ValueError, match=message):
        read_row_weights(file, 3, labels=torch.tensor([0, 0, 1]))


def test_labels_may_have_names_and_rows_none(first_run, tmp_path):
    folder, (_, given), _ = first_run
    read_row_weights(folder / "saflex_rows.csv", ROWS, labels=given)
    file = tmp_path / "saflex_rows.csv"
    file.write_text(HEADER + "0,cat,,0.5\n2,dog,,1\n1,,,1\n")
    weights = read_row_weights(file, 3, labels=torch.tensor([1, 1, 0], dtype=torch.uint8))
    assert weights.tolist() == [0.5, 1, 1]


@pytest.mark.parametrize("folder", [True, False])
def test_a_file_that_is_not_there_is_told(tmp_path, folder):
    file = tmp_path if folder else tmp_path / "rows.csv"
    found = "a folder" if folder else "nothing"
    with pytest.raises(FileNotFoundError, match=f"{found}. Pass the saflex_rows.csv"):
        read_row_weights(file, 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("file", 1),
        ("num_rows", 0),
        ("num_rows", 1.0),
        ("first_index", -1),
        ("labels", [0, 1]),
        ("labels", torch.ones(2)),
        ("labels", torch.tensor([0])),
    ],
    ids=str,
)
def test_arguments_are_checked(name, value):
    arguments = {"file": "f", "num_rows": 2, name: value}
    with pytest.raises((TypeError, ValueError), match=f"Expected `{name}"):
        read_row_weights(**arguments)
