"""The data module: batches, steering rows, reproducible augmentation, bad files."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.batches import batches
from lightning.fabric.utilities.exceptions import MisconfigurationException

from saflex_lightning.batch import AugmentedBatch
from saflex_lightning.recipes.data import MedMNISTDataModule
from saflex_lightning.recipes.datamodule import split_stratified
from saflex_lightning.recipes.images import normalize
from saflex_lightning.recipes.medmnist import read_medmnist


def set_up(**settings):
    data = MedMNISTDataModule(**settings)
    data.setup("fit")
    return data


def write_file(path, *, leave_out=(), **replaced):
    rows = {"train": 40, "val": 12, "test": 12}
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in rows.items():
        arrays[f"{split}_images"] = rng.integers(0, 256, (size, 8, 8, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = (np.arange(size, dtype=np.uint8) % 4)[:, None]
    arrays |= replaced
    np.savez(path, **{key: value for key, value in arrays.items() if key not in leave_out})
    return str(path)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    return write_file(tmp_path_factory.mktemp("medmnist") / "small.npz")


class TestShippedSubset:
    def test_holds_what_its_readme_says(self):
        splits = read_medmnist(num_classes=8)
        counts = {name: split.target.bincount().tolist() for name, split in splits.items()}
        assert counts == {
            "train": [85, 219, 109, 203, 85, 100, 234, 165],
            "val": [29, 73, 36, 68, 28, 33, 78, 55],
            "test": [71, 183, 91, 169, 71, 83, 195, 137],
        }
        assert splits["val"].images.shape == (400, 3, 28, 28)
        assert splits["val"].images.dtype == torch.uint8

    def test_no_image_is_in_two_splits(self):
        digests = {
            name: {hashlib.md5(image.numpy().tobytes()).digest() for image in split.images}
            for name, split in read_medmnist().items()
        }
        assert not digests["train"] & digests["val"]
        assert not digests["train"] & digests["test"]
        assert not digests["val"] & digests["test"]


class TestBatches:
    def test_union_puts_one_augmented_row_behind_every_clean_one(self):
        data = set_up(batch_size=16)
        batch = batches(data)[0]
        assert isinstance(batch, AugmentedBatch)
        assert batch.inputs.shape == (32, 3, 28, 28)
        assert batch.inputs.dtype == torch.float32
        assert batch.target.equal(batch.target[:16].repeat(2))
        assert batch.augmented.tolist() == [False] * 16 + [True] * 16
        assert batch.group[:16].tolist() == [0] * 16
        assert batch.group[16:].min() >= 1
        assert batch.index[16:].equal(batch.index[:16] + 1200)
        splits = read_medmnist()
        clean = splits["train"].images[batch.index[:16]]
        assert batch.inputs[:16].equal(normalize(clean))
        assert batch.target[:16].equal(splits["train"].target[batch.index[:16]])
        assert not batch.inputs[16:].equal(batch.inputs[:16])

    def test_replace_holds_the_augmented_rows_of_the_union(self):
        union = batches(set_up(batch_size=16, seed=3))[0]
        batch = batches(set_up(batch_size=16, seed=3, batch="replace"))[0]
        for name in ("inputs", "target", "augmented", "group", "index"):
            assert getattr(batch, name).equal(getattr(union, name)[16:]), name

    @pytest.mark.parametrize("batch", ["union", "replace"])
    def test_without_augmentation_all_rows_are_clean(self, batch):
        first = batches(set_up(batch_size=16, augmentation="none", batch=batch))[0]
        assert first.inputs.shape == (16, 3, 28, 28)
        assert not first.augmented.any()
        assert first.group.tolist() == [0] * 16
        assert first.index.max() < 1200

    @pytest.mark.parametrize(
        "settings",
        [{}, {"batch": "replace"}, {"augmentation": "none"}, {"augmentation": "trivialaugment"}],
    )
    def test_number_of_steps_depends_on_the_batch_size_alone(self, settings):
        assert len(set_up(**settings).train_dataloader()) == 18

    def test_normalize_maps_to_mean_and_deviation_one_half(self):
        values = torch.tensor([0, 51, 255], dtype=torch.uint8)
        torch.testing.assert_close(normalize(values), torch.tensor([-1.0, -0.6, 1.0]))


class TestReproducibility:
    def by_index(self, data, epoch=0):
        return {
            int(index): image
            for batch in batches(data, epoch)
            for index, image in zip(batch.index, batch.inputs, strict=True)
        }

    def test_augmented_images_do_not_depend_on_batch_size_or_random_state(self, small_file):
        one = self.by_index(set_up(path=small_file, batch_size=20, seed=5))
        torch.manual_seed(99)
        other = self.by_index(set_up(path=small_file, batch_size=8, seed=5))
        common = one.keys() & other.keys()
        assert len(common) == 80
        assert all(one[index].equal(other[index]) for index in common)

    def test_epochs_and_seeds_differ(self, small_file):
        settings = {"path": small_file, "batch_size": 20}
        first = batches(set_up(**settings, seed=1), epoch=0)[0]
        next_epoch = batches(set_up(**settings, seed=1), epoch=1)[0]
        other_seed = batches(set_up(**settings, seed=0), epoch=1)[0]
        assert not first.index.equal(next_epoch.index)
        assert not next_epoch.index.equal(other_seed.index)
        one = self.by_index(set_up(**settings, seed=1), epoch=0)
        two = self.by_index(set_up(**settings, seed=1), epoch=1)
        assert all(one[index].equal(two[index]) for index in range(40))
        assert sum(one[index].equal(two[index]) for index in range(40, 80)) < 10

    def test_a_pass_leaves_the_global_random_state_alone(self, small_file):
        data = set_up(path=small_file, batch_size=10)
        torch.manual_seed(0)
        expected = torch.rand(3)
        threads = torch.get_num_threads()
        torch.manual_seed(0)
        batches(data)
        list(data.val_dataloader())
        list(data.saflex_dataloader())
        assert torch.get_num_threads() == threads
        assert torch.rand(3).equal(expected)

    def test_loader_workers_give_the_same_batches(self, small_file):
        alone = batches(set_up(path=small_file, batch_size=10), epoch=2)
        workers = batches(set_up(path=small_file, batch_size=10, num_workers=1), epoch=2)
        assert len(alone) == len(workers) == 4
        for one, other in zip(alone, workers, strict=True):
            assert all(a.equal(b) for a, b in zip(one, other, strict=True))


def test_processes_share_the_rows(small_file):
    rows = []
    for rank in range(2):
        data = set_up(path=small_file, batch_size=10, augmentation="none")
        data.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": rank})
        assert len(batches(data, epoch=3)) == 2
        rows += [int(index) for batch in batches(data, epoch=3) for index in batch.index]
    assert sorted(rows) == list(range(40))


class TestSteering:
    def rows(self, loader):
        return torch.cat([inputs for inputs, _ in loader])

    def test_val_gives_the_dataset_that_validates(self):
        data = set_up()
        assert data.saflex_dataloader().dataset is data.val_dataloader().dataset
        assert len(data.saflex_dataloader().dataset) == 400

    def test_train_gives_the_clean_training_rows(self):
        rows = self.rows(set_up(steering="train").saflex_dataloader())
        assert rows.equal(normalize(read_medmnist()["train"].images))

    def test_split_takes_rows_out_of_training(self):
        data = set_up(steering="split", steering_fraction=0.25, augmentation="none", seed=2)
        steering = {row.numpy().tobytes() for row in self.rows(data.saflex_dataloader())}
        trained = {row.numpy().tobytes() for batch in batches(data) for row in batch.inputs}
        assert len(steering) == 299  # a quarter of each class, rounded
        assert not steering & trained

    def test_split_is_stratified_and_follows_its_seed(self):
        target = torch.tensor([0] * 40 + [1] * 10 + [2])
        kept, carved = split_stratified(target, 0.2, seed=0)
        assert target[carved].bincount().tolist() == [8, 2]
        assert sorted([*kept.tolist(), *carved.tolist()]) == list(range(51))
        assert not carved.equal(split_stratified(target, 0.2, seed=1)[1])
        assert carved.equal(split_stratified(target, 0.2, seed=0)[1])


class TestMergedValidationRows:
    def test_they_are_trained_on_and_neither_select_nor_steer(self):
        data = set_up(merge_val=True, augmentation="none")
        assert data.class_counts().sum() == 1200 + 400
        trained = {row.numpy().tobytes() for batch in batches(data) for row in batch.inputs}
        val = {normalize(image).numpy().tobytes() for image in read_medmnist()["val"].images}
        assert len(trained & val) > 350  # a last, smaller batch is left out
        assert data.val_dataloader() == []
        with pytest.raises(MisconfigurationException, match="`steering` other than 'val'"):
            data.saflex_dataloader()

    @pytest.mark.parametrize(("steering", "rows"), [("train", 1600), ("split", 320)])
    def test_merged_rows_may_steer(self, steering, rows):
        data = set_up(merge_val=True, steering=steering)
        assert len(data.saflex_dataloader().dataset) == pytest.approx(rows, abs=4)

    def test_the_others_are_trained_on_as_before(self):
        assert set_up().class_counts().tolist() == [85, 219, 109, 203, 85, 100, 234, 165]


class TestRowWeights:
    def test_rows_are_drawn_by_those_of_an_earlier_run_and_validation_rows_by_1(self, tmp_path):
        file = tmp_path / "saflex_rows.csv"
        lines = [f"{1200 + row},{0 if row % 2 else 2}" for row in range(1200)]
        file.write_text("\n".join(["index,mean_weight", *lines]))
        data = set_up(merge_val=True, row_weights=str(file), batch="replace")
        index = torch.cat([batch.index for epoch in range(5) for batch in batches(data, epoch)])
        rows = index - 1600
        trained = rows[rows < 1200]
        assert (trained % 2 == 0).all()
        assert len(trained) / len(rows) == pytest.approx(1200 / 1600, abs=0.03)

    def test_a_file_of_other_rows_is_refused(self, tmp_path):
        file = tmp_path / "saflex_rows.csv"
        file.write_text("index,mean_weight\n3,1\n")
        with pytest.raises(ValueError, match="indices from 1200 to 2399, but line 2 has 3"):
            set_up(row_weights=str(file)).train_dataloader()

    def test_a_file_of_a_run_with_other_planted_labels_is_refused(self, tmp_path):
        file = tmp_path / "saflex_rows.csv"
        planted = set_up(label_noise=0.4, seed=1).doubted_rows().target.tolist()
        lines = [f"{1200 + row},{label},1" for row, label in enumerate(planted)]
        file.write_text("\n".join(["index,given,mean_weight", *lines]))
        noisy = {"label_noise": 0.4, "row_weights": str(file)}
        set_up(**noisy, seed=1).train_dataloader()
        set_up(**noisy, seed=1, merge_val=True).train_dataloader()
        with pytest.raises(ValueError, match="with the same seed"):
            set_up(**noisy, seed=2).train_dataloader()
        with pytest.raises(ValueError, match="`steering` other than 'split'"):
            set_up(**noisy, seed=1, merge_val=True, steering="split").train_dataloader()
        # The labels that a mixed row was shown with are no longer those of the row.
        set_up(**noisy, seed=2, augmentation="mixup").train_dataloader()


class TestFiles:
    def test_grey_images_get_one_channel(self, tmp_path):
        grey = np.zeros((40, 8, 8), np.uint8)
        file = write_file(
            tmp_path / "grey.npz", train_images=grey, val_images=grey[:12], test_images=grey[:12]
        )
        grey_data = set_up(path=file, batch_size=8, in_channels=1)
        assert batches(grey_data)[0].inputs.shape == (16, 1, 8, 8)

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no file at .*absent\.npz.*10519652"):
            set_up(path=str(tmp_path / "absent.npz"))

    @pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04broken"])
    def test_unreadable_file(self, tmp_path, content):
        file = tmp_path / "broken.npz"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"broken\.npz to be a NumPy .npz archive"):
            set_up(path=str(file))

    @pytest.mark.parametrize("key", ["train_images", "val_labels", "test_images"])
    def test_a_broken_member_is_named(self, tmp_path, key):
        file = Path(write_file(tmp_path / "rot.npz"))
        content = bytearray(file.read_bytes())
        content[content.find(f"{key}.npy".encode()) + 160] ^= 255
        file.write_bytes(content)
        with pytest.raises(ValueError, match=rf"`{key}` of .*rot\.npz to be an array"):
            set_up(path=str(file))

    def test_pickled_objects_are_refused(self, tmp_path):
        file = write_file(tmp_path / "object.npz", val_labels=np.array([{}] * 40, object))
        with pytest.raises(ValueError, match=r"`val_labels` of .*object\.npz to be an array wit"):
            set_up(path=str(file))

    def test_single_array(self, tmp_path):
        np.save(tmp_path / "array.npy", np.zeros(3))
        with pytest.raises(ValueError, match=r"array\.npy to be a NumPy .npz archive"):
            set_up(path=str(tmp_path / "array.npy"))

    def test_missing_keys(self, tmp_path):
        file = write_file(tmp_path / "part.npz", leave_out=("val_labels", "test_images"))
        with pytest.raises(ValueError, match=r"part\.npz .*\['test_images', 'val_labels'\] are"):
            set_up(path=file)

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("train_images", np.zeros((40, 8, 8, 8), np.uint8), r"uint8 of shape \(40, 8, 8, 8\)"),
            ("train_images", np.zeros((40, 8, 8, 3), np.float32), "float32 of shape"),
            ("test_images", np.zeros((0, 8, 8, 3), np.uint8), "n > 0"),
            ("val_labels", np.zeros((12, 14), np.uint8), "multi-label sets"),
            ("val_labels", np.zeros((11, 1), np.uint8), r"shape \(12, 1\).*shape \(11, 1\)"),
            ("train_labels", np.full((40, 1), 4, np.uint8), "range from 4 to 4"),
            ("test_labels", np.full((12, 1), -1, np.int64), "range from -1 to -1"),
        ],
    )
    def test_bad_arrays_are_named(self, tmp_path, key, value, message):
        file = write_file(tmp_path / "bad.npz", **{key: value})
        with pytest.raises(ValueError, match=rf"`{key}` of .*bad\.npz .*{message}"):
            set_up(path=file, num_classes=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be a positive integer, but got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` to be a positive integer, but got 0"),
        ({"dataset": "chest"}, r"`dataset` to be one of \['blood', .* but got 'chest'"),
        ({"augmentation": "blur"}, r"`augmentation` to be one of \['augmix', .* but got 'blur'"),
        ({"steering_fraction": 1.0}, "`steering_fraction` to be a number between 0 and 1"),
        (
            {"steering": "late"},
            r"`steering` to be one of \['split', 'train', 'val'\], but got 'late'",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MedMNISTDataModule(**settings)


def test_batch_larger_than_the_training_rows():
    with pytest.raises(ValueError, match="`batch_size` to be at most 1200"):
        set_up(batch_size=1201).train_dataloader()


def test_sizes_are_those_of_the_file(small_file, tmp_path):
    assert set_up().sizes() == {"num_classes": 8, "in_channels": 3}
    assert set_up(path=small_file).sizes() == {"num_classes": 4, "in_channels": 3}
    assert set_up(path=small_file, num_classes=6).sizes()["num_classes"] == 6
    with pytest.raises(ValueError, match="below `num_classes`=3, but they range from 0 to 3"):
        set_up(path=small_file, num_classes=3)
    with pytest.raises(ValueError, match=r"`in_channels`=1, but got shape .* leave `in_channels`"):
        set_up(path=small_file, in_channels=1)
