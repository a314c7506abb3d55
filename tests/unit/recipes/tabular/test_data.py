"""The data module: splits, batches, steering rows, reproducibility, bad settings."""

from types import SimpleNamespace

import pytest
import torch
from helpers.batches import batches
from helpers.tables import make_table, write_csv, write_npz
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from saflex_lightning.batch import AugmentedBatch
from saflex_lightning.recipes.tabular import TabularDataModule


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(write_npz(tmp_path_factory.mktemp("tables") / "small.npz", make_table(200)))


@pytest.fixture(scope="module")
def rare_file(tmp_path_factory):
    table = make_table(2000, positives=20)
    return str(write_npz(tmp_path_factory.mktemp("tables") / "rare.npz", table))


def set_up(path, **settings):
    data = TabularDataModule(None, path, **{"batch_size": 20, **settings})
    data.setup("fit")
    return data


def leaves(batch):
    _, *others = vars(batch).values()
    return [*batch.inputs, *others]


def all_rows(loader):
    parts = [torch.cat([inputs[0].double(), inputs[1].double()], 1) for inputs, _ in loader]
    return {tuple(row) for row in torch.cat(parts).tolist()}


def rows_of(dataset):
    return all_rows(DataLoader(dataset, 16))


class TestBatches:
    @pytest.mark.parametrize("augmentation", ["cutmix", "cutmix_columns"])
    def test_union_puts_one_augmented_row_behind_every_clean_one(self, file, augmentation):
        data = set_up(file, augmentation=augmentation, augmentation_settings={"probability": 1.0})
        batch = batches(data)[0]
        assert isinstance(batch, AugmentedBatch)
        numeric, categorical = batch.inputs
        assert (numeric.dtype, numeric.shape) == (torch.float32, (40, 2))
        assert (categorical.dtype, categorical.shape) == (torch.int64, (40, 2))
        assert batch.augmented.tolist() == [False] * 20 + [True] * 20
        assert batch.group[:20].eq(0).all()
        assert batch.group[20:].ge(1).all()
        assert batch.index[20:].equal(batch.index[:20] + 130)
        plain = batches(set_up(file, augmentation="none"))[0]
        assert numeric[:20].equal(plain.inputs.numeric)
        assert categorical[:20].equal(plain.inputs.categorical)
        assert not numeric[20:].equal(numeric[:20])
        clean = batch.target[:20]
        assert (clean if clean.ndim == 1 else clean.argmax(1)).equal(plain.target)

    @pytest.mark.parametrize("augmentation", ["cutmix", "cutmix_columns"])
    def test_replace_holds_the_augmented_rows_of_the_union(self, file, augmentation):
        settings = {
            "augmentation": augmentation,
            "augmentation_settings": {"probability": 0.7},
            "seed": 3,
        }
        union = batches(set_up(file, **settings))[1]
        batch = batches(set_up(file, **settings, batch="replace"))[1]
        for one, other in zip(leaves(batch), leaves(union), strict=True):
            assert one.equal(other[20:])

    @pytest.mark.parametrize("batch", ["union", "replace"])
    def test_without_augmentation_all_rows_are_clean(self, file, batch):
        first = batches(set_up(file, augmentation="none", batch=batch))[0]
        assert not first.augmented.any()
        assert first.group.eq(0).all()
        assert first.target.dtype == torch.int64

    def test_groups_are_bins_of_strength(self):
        data = TabularDataModule("qsar", augmentation_settings={"num_groups": 3}, batch_size=500)
        data.setup("fit")
        batch = batches(data)[0]
        clean, mixed = batch.inputs.numeric.chunk(2)
        share = (clean != mixed).float().mean(1)
        group = batch.group[500:]
        assert set(group.tolist()) == {1, 2, 3}
        for number in (1, 2):
            assert share[group == number].max() <= share[group == number + 1].min()
        assert share[group == 1].max() < 0.2 / 3 < share[group == 2].min()
        assert share[group == 2].max() < 0.4 / 3 <= share[group == 3].min()

    @pytest.mark.parametrize(
        ("augmentation", "expected"),
        [
            ("none", ("clean",)),
            ("cutmix", ("clean", "cutmix_0_10", "cutmix_10_100")),
            ("cutmix_columns", ("clean", "cutmix_0_50", "cutmix_50_100")),
        ],
    )
    def test_groups_have_names(self, augmentation, expected):
        settings = {"num_groups": 2} if augmentation != "none" else None
        data = TabularDataModule(augmentation=augmentation, augmentation_settings=settings)
        assert data.saflex_group_names() == expected

    def test_number_of_steps_depends_on_the_batch_size_alone(self, file):
        for settings in ({}, {"batch": "replace"}, {"augmentation": "none"}):
            assert len(batches(set_up(file, **settings))) == 130 // 20


class TestReproducibility:
    @pytest.mark.parametrize("augmentation", ["cutmix", "cutmix_columns"])
    def test_batches_depend_on_seed_and_epoch_alone(self, file, augmentation):
        settings = {"augmentation": augmentation, "seed": 5}
        first = batches(set_up(file, **settings), epoch=2)
        torch.manual_seed(99)
        data = set_up(file, **settings)
        batches(data, epoch=1)
        again = batches(data, epoch=2)
        workers = batches(set_up(file, **settings, num_workers=1), epoch=2)
        for one, two, three in zip(first, again, workers, strict=True):
            for a, b, c in zip(leaves(one), leaves(two), leaves(three), strict=True):
                assert a.equal(b)
                assert a.equal(c)
        other = batches(data, epoch=3)[0]
        assert not first[0].index.equal(other.index)

    @pytest.mark.parametrize("augmentation", ["cutmix", "cutmix_columns"])
    def test_batches_go_on_in_the_middle_of_an_epoch(self, file, augmentation):
        whole = batches(set_up(file, augmentation=augmentation), epoch=1)
        first = set_up(file, augmentation=augmentation).train_dataloader()
        first.sampler.set_epoch(1)
        taken = [batch for batch, _ in zip(first, range(2), strict=False)]
        second = set_up(file, augmentation=augmentation).train_dataloader()
        second.load_state_dict({**first.state_dict(), "taken": 2})
        second.sampler.set_epoch(1)
        found = [*taken, *second]
        assert len(found) == len(whole)
        for batch, expected in zip(found, whole, strict=True):
            assert all(map(torch.equal, leaves(batch), leaves(expected)))

    def test_a_row_is_augmented_anew_in_every_epoch(self, file):
        data = set_up(file, batch_size=130)

        def by_index(epoch):
            (batch,) = batches(data, epoch)
            return batch.inputs.numeric[batch.index.argsort()]

        one, other = by_index(0), by_index(1)
        assert one[:130].equal(other[:130])
        assert not one[130:].equal(other[130:])

    def test_passes_leave_the_global_random_state_alone(self, rare_file):
        data = set_up(rare_file, stratified=True)
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        batches(data)
        list(data.saflex_dataloader())
        list(data.val_dataloader())
        assert torch.rand(3).equal(expected)

    def test_processes_share_the_rows(self, file):
        rows = []
        for rank in range(2):
            data = set_up(file, batch_size=13, augmentation="none")
            share = {"num_replicas": 2, "rank": rank}
            data.trainer = SimpleNamespace(distributed_sampler_kwargs=share)
            rows += [int(index) for batch in batches(data) for index in batch.index]
        assert sorted(rows) == list(range(130))


class TestSplit:
    def test_parts_share_no_row(self, file):
        data = set_up(file, steering="split", augmentation="none", batch_size=1)
        parts = [
            all_rows((batch.inputs, None) for batch in batches(data)),
            all_rows(data.saflex_dataloader()),
            all_rows(data.val_dataloader()),
            all_rows(data.test_dataloader()),
        ]
        assert [len(part) for part in parts] == pytest.approx([104, 26, 30, 40], abs=1)
        assert len(set().union(*parts)) == 200

    def test_duplicates_go_before_the_split_unless_they_are_wanted(self, tmp_path):
        table = make_table(100)
        twice = table.take(torch.arange(100).repeat(2).numpy())
        path = str(write_npz(tmp_path / "twice.npz", twice))
        data = set_up(path)
        train, test = (rows_of(part) for part in (data._train, data.test_dataloader().dataset))
        assert len(train) == 65
        assert not train & test
        data = set_up(path, deduplicate=False)
        train, test = (rows_of(part) for part in (data._train, data.test_dataloader().dataset))
        assert train & test

    def test_class_counts_are_those_of_the_training_rows(self, rare_file):
        assert set_up(rare_file, stratified=True).class_counts().tolist() == [1287, 13]


class TestSteering:
    def test_val_gives_the_dataset_that_validates(self, file):
        data = set_up(file)
        assert data.saflex_dataloader().dataset is data.val_dataloader().dataset

    def test_train_gives_the_clean_training_rows(self, file):
        data = set_up(file, steering="train", augmentation="none", batch_size=1)
        trained = all_rows((batch.inputs, None) for batch in batches(data))
        assert all_rows(data.saflex_dataloader()) == trained

    def test_merged_rows_train_and_none_are_left_to_steer_or_select(self, file):
        data = set_up(file, merge_val=True, augmentation="none", batch_size=1)
        parts = set_up(file, augmentation="none", batch_size=1)
        assert len(batches(data)) == 130 + 30 == len(data._train)
        assert len(parts._train) == 130
        assert data.val_dataloader() == []
        with pytest.raises(MisconfigurationException, match="`steering` other than 'val'"):
            data.saflex_dataloader()
        assert (
            len(rows_of(data.test_dataloader().dataset))
            == len(rows_of(parts.test_dataloader().dataset))
            == 40
        )
        steered = set_up(file, merge_val=True, steering="train").saflex_dataloader()
        assert len(steered.dataset) == 160


def test_a_csv_of_ones_own(tmp_path):
    file = str(write_csv(tmp_path / "mine.csv", make_table(200)))
    roles = {"target": "answer", "categorical": ["colour", "size"]}
    data = set_up(file, **roles, num_numeric=2, cardinalities=[5, 4], num_classes=2)
    assert data.classes == ("no", "yes")
    assert data.sizes() == {"num_numeric": 2, "cardinalities": [5, 4], "num_classes": 2}
    assert all_rows(data.test_dataloader())
    data = set_up(file, target="answer", numeric=["height"])
    assert batches(data)[0].inputs.numeric.shape == (40, 1)


def cutmix(name="cutmix", **settings):
    return {"augmentation": name, "augmentation_settings": settings}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be a positive integer, but got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` to be a positive integer, but got 0"),
        ({"batch": "both"}, r"`batch` to be one of \['replace', 'union'\], but got 'both'"),
        (cutmix(num_groups=0), "`num_groups` to be a positive integer, but got 0"),
        ({"steering_fraction": 1.0}, "`steering_fraction` to be a number between 0 and 1"),
        (cutmix(probability=0.0), r"`probability` to be a number in \(0, 1\], but got 0.0"),
        (cutmix("cutmix_columns", alpha=0.0), "`alpha` to be a positive number, but got 0.0"),
        (cutmix(alpha=1.0), r"of 'cutmix' to be among \['num_groups', .* but got \['alpha'\]"),
        (cutmix("none", probability=0.1), r"of 'none' to be among \[\], but got"),
        (cutmix("mixup"), r"`augmentation` to be one of \['cutmix', .* but got 'mixup'"),
        ({"num_numeric": 3}, "`num_numeric` to be 2, as in the file, but got 3"),
        ({"cardinalities": [3, 2]}, r"`cardinalities` to be \[5, 4\], .* but got \[3, 2\]"),
        ({"num_classes": 3}, "`num_classes` to be 2, as in the file, but got 3"),
        ({"batch_size": 131}, "`batch_size` to be at most 130"),
        ({"categorical": ["colour"]}, "Expected `target` beside `categorical` and `numeric`"),
    ],
)
def test_bad_settings(file, settings, message):
    with pytest.raises(ValueError, match=message):
        set_up(file, **settings).train_dataloader()
