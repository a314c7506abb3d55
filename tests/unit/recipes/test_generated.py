"""Real images with a pool of generated ones: layouts, batches, draws, and what is refused."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.batches import batches
from helpers.folders import make_image_folders, make_pool, write_image, write_manifest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2.functional import pil_to_tensor

from saflex_lightning import SAflexWarning
from saflex_lightning.recipes import GeneratedDataModule
from saflex_lightning.recipes.images import normalize

NUM_REAL, NUM_GENERATED = 12, 48  # 6 cats, 4 dogs, 2 eels; two edits of each by each prompt


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    make_image_folders(root / "real", splits=("val", "test", "extra"))
    make_pool(root / "pool")
    return root


@pytest.fixture
def own_folders(folders, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folders, tmp_path / "copy")


def set_up(folders, **settings):
    settings = {"image_size": None, "batch_size": 4, "generated": str(folders / "pool")} | settings
    data = GeneratedDataModule(str(folders / "real"), **settings)
    data.setup("fit")
    return data


def joined(data, name, epoch=0):
    return torch.cat([getattr(batch, name) for batch in batches(data, epoch)])


def generated_rows(data, epoch=0):
    return sorted(row for row in joined(data, "index", epoch).tolist() if row >= NUM_REAL)


def read(file):
    with Image.open(file) as image:
        return normalize(pil_to_tensor(image))


class TestBatches:
    def test_rows_are_what_their_files_hold(self, folders):
        data = set_up(folders, num_classes=3)
        assert data.saflex_group_names() == (
            "clean",
            "pool: at_night/strength-0.6_guidance-7.5",
            "pool: in_the_rain/strength-0.6_guidance-7.5",
        )
        real = ImageFolder(str(folders / "real" / "train"))
        pool = sorted((folders / "pool").rglob("*.png"))
        for inputs, target, augmented, group, index in (
            row for batch in batches(data) for row in zip(*vars(batch).values(), strict=True)
        ):
            assert bool(augmented) == (index >= NUM_REAL)
            if not augmented:
                file, label = real.samples[index]
                assert group == 0
            else:
                file = pool[index - NUM_REAL]
                label = real.class_to_idx[file.parent.name]
                assert group == 1 + ["at_night", "in_the_rain"].index(file.parents[2].name)
            assert inputs.equal(read(file))
            assert target == label

    def test_generated_rows_are_in_the_batch_of_their_source(self, folders):
        pool = sorted((folders / "pool").rglob("*.png"))
        for batch in batches(set_up(folders)):
            assert batch.augmented.tolist() == [False] * 4 + [True] * 16
            for row in batch.augmented.nonzero().flatten():
                file = pool[batch.index[row] - NUM_REAL]
                assert int(file.stem.split("-")[0]) in batch.index[~batch.augmented]

    def test_every_image_once_per_epoch(self, folders):
        index = joined(set_up(folders), "index")
        assert sorted(index.tolist()) == list(range(NUM_REAL + NUM_GENERATED))

    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"batch": "replace"},
            {"per_class": "real", "generated_per_real": 0.5},
            {"augmentation": "none"},
            {"augmentation": "randaugment"},
        ],
    )
    def test_number_of_steps_depends_on_the_batch_size_alone(self, folders, settings):
        data = set_up(folders, **settings)
        assert len(data.train_dataloader()) == len(batches(data)) == 3

    def test_clean_rows_are_those_of_a_run_without_augmentation(self, folders):
        for epoch in range(2):
            plain = batches(set_up(folders, augmentation="none", seed=3), epoch)
            mixed = batches(set_up(folders, seed=3), epoch)
            for one, other in zip(plain, mixed, strict=True):
                assert one.index.equal(other.index[:4])
                assert one.inputs.equal(other.inputs[:4])

    def test_replace_leaves_out_the_clean_rows_that_have_generated_ones(self, folders):
        assert joined(set_up(folders, batch="replace"), "augmented").all()
        settings = {"per_class": "real", "generated_per_real": 0.5}
        data = set_up(folders, batch="replace", **settings)
        assert all(len(batch.index) == 4 for batch in batches(data))
        assert joined(data, "augmented").sum() == 6

    @pytest.mark.parametrize("has_sources", [True, False])
    def test_a_pass_can_begin_at_any_batch(self, folders, has_sources):
        data = set_up(folders, has_sources=has_sources, per_class="real", redraw=True)
        sampler = data.train_dataloader().sampler
        sampler.set_epoch(2)
        whole = list(sampler)
        sampler.start = 1
        assert list(sampler) == whole[1:]
        assert list(sampler) == whole  # the pass after it begins at its beginning

    def test_sizes_are_those_of_the_folders(self, folders):
        assert set_up(folders).sizes() == {"num_classes": 3, "in_channels": 3}

    def test_images_are_resized(self, folders):
        batch = batches(set_up(folders, image_size=12))[0]
        assert batch.inputs.shape == (20, 3, 12, 12)

    def test_loader_workers_give_the_same_batches(self, folders):
        alone, workers = (batches(set_up(folders, num_workers=n), epoch=1) for n in (0, 1))
        for one, other in zip(alone, workers, strict=True):
            assert type(one) is type(other)
            assert all(a.equal(b) for a, b in zip(one, other, strict=True))

    def test_a_pass_leaves_the_global_random_state_alone(self, folders):
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        batches(set_up(folders))
        assert torch.rand(3).equal(expected)

    @pytest.mark.parametrize("has_sources", [True, False])
    def test_processes_share_the_rows(self, folders, has_sources):
        index = []
        for rank in range(2):
            data = set_up(folders, batch_size=3, has_sources=has_sources)
            kwargs = {"num_replicas": 2, "rank": rank}
            data.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)
            index += joined(data, "index").tolist()
        assert sorted(index) == list(range(NUM_REAL + NUM_GENERATED))

    @pytest.mark.parametrize("augmentation", ["randaugment", "mixup"])
    def test_ordinary_augmentations_serve_as_rivals(self, folders, augmentation):
        data = set_up(folders, augmentation=augmentation, generated=None)
        batch = batches(data)[0]
        assert batch.augmented.tolist() == [False] * 4 + [True] * 4
        assert batch.group.max() < len(data.saflex_group_names())


class TestDraws:
    @pytest.mark.parametrize(
        ("settings", "counts"),
        [
            ({"per_class": "all"}, [24, 16, 8]),
            ({"per_class": "extra"}, [2, 2, 2]),
            ({"per_class": "real", "generated_per_real": 1.0}, [6, 4, 2]),
            ({"per_class": "real", "generated_per_real": 1.5}, [9, 6, 3]),
        ],
    )
    def test_counts_of_each_class(self, folders, settings, counts):
        data = set_up(folders, **settings)
        target = joined(data, "target")[joined(data, "augmented")]
        assert target.bincount().tolist() == counts

    def test_one_edit_of_each_source_comes_first(self, folders):
        data = set_up(folders, per_class="real", generated_per_real=1.0)
        pool = sorted((folders / "pool").rglob("*.png"))
        sources = [int(pool[row - NUM_REAL].stem.split("-")[0]) for row in generated_rows(data)]
        assert sorted(sources) == list(range(NUM_REAL))

    def test_draw_is_fixed_unless_redrawn(self, folders):
        settings = {"per_class": "real", "generated_per_real": 1.0}
        fixed, redrawn = set_up(folders, **settings), set_up(folders, redraw=True, **settings)
        assert generated_rows(fixed, 0) == generated_rows(fixed, 1) == generated_rows(redrawn, 0)
        assert generated_rows(redrawn, 0) != generated_rows(redrawn, 1)
        assert generated_rows(fixed) != generated_rows(set_up(folders, seed=1, **settings))

    def test_too_few_images_are_all_used(self, folders):
        with pytest.warns(SAflexWarning, match=r"found only {'cat': '24 of 30', 'dog': '16 of 20'"):
            data = set_up(folders, per_class="real", generated_per_real=5.0)
        assert len(generated_rows(data)) == NUM_GENERATED


class TestLabelNoise:
    def test_labels_alone_change_and_the_changed_rows_are_told(self, folders):
        plain, data = set_up(folders), set_up(folders, label_noise=0.4)
        assert plain.wrong_rows() is None
        wrong = data.wrong_rows()
        assert wrong.shape == (NUM_REAL + NUM_GENERATED,)
        assert not wrong[:NUM_REAL].any()
        assert 10 < wrong.sum() < 30
        for one, other in zip(batches(plain), batches(data), strict=True):
            assert one.inputs.equal(other.inputs)
            assert one.target.ne(other.target).equal(wrong[other.index])
            for name in ("augmented", "group", "index"):
                assert getattr(one, name).equal(getattr(other, name)), name
        assert data.class_counts().equal(plain.class_counts())

    def test_draw_follows_the_seed(self, folders):
        rows = [set_up(folders, label_noise=0.4, seed=seed).wrong_rows() for seed in (0, 0, 1)]
        assert rows[0].equal(rows[1])
        assert not rows[0].equal(rows[2])

    def test_dropped_rows_are_the_wrong_ones(self, folders):
        data = set_up(folders, label_noise=0.4, drop_wrong=True)
        wrong = data.wrong_rows()
        kept = (~wrong).nonzero().flatten().tolist()
        assert generated_rows(data) == [row for row in kept if row >= NUM_REAL]
        # A ratio is drawn among the right ones alone.
        settings = {"per_class": "real", "generated_per_real": 1.0, "redraw": True}
        data = set_up(folders, label_noise=0.4, drop_wrong=True, **settings)
        for epoch in range(3):
            drawn = generated_rows(data, epoch)
            assert len(drawn) == NUM_REAL
            assert not wrong[drawn].any()


class TestSteering:
    def test_val_gives_the_dataset_that_validates(self, folders):
        data = set_up(folders)
        assert data.saflex_dataloader().dataset is data.val_dataloader().dataset
        assert len(data.test_dataloader().dataset) == 6

    def test_train_gives_the_clean_training_images(self, folders):
        images, target = next(iter(set_up(folders, steering="train").saflex_dataloader()))
        assert len(images) == NUM_REAL
        assert target.bincount().tolist() == [6, 4, 2]

    def test_split_takes_images_and_what_was_made_from_them_out_of_training(self, folders):
        data = set_up(folders, steering="split", steering_fraction=0.5, batch_size=6)
        assert data.class_counts().tolist() == [3, 2, 1]
        steering = torch.cat([images for images, _ in data.saflex_dataloader()])
        real = [read(file) for file, _ in ImageFolder(str(folders / "real" / "train")).samples]
        carved = {row for row in range(NUM_REAL) if any(real[row].equal(i) for i in steering)}
        assert len(carved) == len(steering) == 6
        pool = sorted((folders / "pool").rglob("*.png"))
        index = joined(data, "index").tolist()
        trained = {row for row in index if row < NUM_REAL}
        sources = {int(pool[i - NUM_REAL].stem.split("-")[0]) for i in index if i >= NUM_REAL}
        assert trained == sources == set(range(NUM_REAL)) - carved

    def test_validation_images_may_be_trained_on(self, folders):
        data = set_up(folders, merge_val=True, batch_size=6)
        assert data.class_counts().tolist() == [8, 6, 4]
        assert data.val_dataloader() == []
        index = joined(data, "index")
        assert sorted(index.tolist()) == list(range(NUM_REAL + 6 + NUM_GENERATED))
        with pytest.raises(MisconfigurationException, match=r"`steering` other than 'val'"):
            data.saflex_dataloader()


class TestRowWeights:
    @pytest.mark.parametrize("merge_val", [False, True])
    def test_generated_images_are_used_as_often_as_an_earlier_run_weighed_them(
        self, folders, tmp_path, merge_val
    ):
        file = tmp_path / "saflex_rows.csv"
        weights = [(0.0, 0.5, 1.0, 1.7)[row % 4] for row in range(NUM_GENERATED)]
        lines = [f"{NUM_REAL + row},{weight}" for row, weight in enumerate(weights)]
        file.write_text("\n".join(["index,mean_weight", *lines]))
        data = set_up(folders, row_weights=str(file), merge_val=merge_val, batch_size=6)
        first, epochs = NUM_REAL + (6 if merge_val else 0), 200
        used = torch.zeros(NUM_GENERATED)
        for epoch in range(epochs):
            index = joined(data, "index", epoch)
            used += torch.bincount(index[index >= first] - first, minlength=NUM_GENERATED)
        expected = torch.tensor(weights).clamp(max=1)
        assert (used / epochs - expected).abs().max() < 0.16
        assert used[expected == 0].sum() == 0
        assert (used[expected == 1] == epochs).all()

    def test_none_takes_the_place_of_those_that_are_left_out(self, folders, tmp_path):
        """Of as many generated images as there are real ones, half are turned down."""
        settings = {"per_class": "real", "redraw": False, "batch_size": 6}
        first = generated_rows(set_up(folders, **settings))
        file = tmp_path / "saflex_rows.csv"
        lines = [f"{row},{place % 2}" for place, row in enumerate(first)]
        file.write_text("\n".join(["index,mean_weight", *lines]))
        second = generated_rows(set_up(folders, row_weights=str(file), **settings))
        assert second == first[1::2]


class TestLayouts:
    def test_class_folders_without_sources(self, own_folders):
        shutil.rmtree(own_folders / "pool")
        for k in range(7):
            write_image(own_folders / "pool" / "dog" / f"photo_{k}.png", seed=k)
        data = set_up(own_folders, has_sources=False)
        assert data.saflex_group_names() == ("clean", "pool")
        sizes = [int(batch.augmented.sum()) for batch in batches(data)]
        assert sorted(sizes) == [2, 2, 3]
        assert generated_rows(data) == list(range(NUM_REAL, NUM_REAL + 7))
        orders = [
            [row for row in joined(data, "index", epoch).tolist() if row >= NUM_REAL]
            for epoch in range(2)
        ]
        assert orders[0] != orders[1]

    @pytest.mark.parametrize(
        ("group_by", "names", "groups"),
        [
            ("prompt", ("clean", "edit: at night", "edit: rain", "mix"), [1, 2, 3]),
            ("generator", ("clean", "edit", "mix"), [1, 1, 2]),
        ],
    )
    def test_manifest_tells_classes_sources_and_groups(self, own_folders, group_by, names, groups):
        pool = own_folders / "pool"
        for name in "abc":
            write_image(pool / f"{name}.png")
        rows = [
            ("a.png", "dog", "dog/01.png", "edit", "at night"),
            ("b.png", "eel", "11", "edit", "rain"),
            ("c.png", "cat", "cat/00.png", "mix", ""),
        ]
        write_manifest(pool, rows)
        data = set_up(own_folders, batch_size=12, group_by=group_by)
        (batch,) = batches(data)
        order = batch.index[12:].argsort()
        assert data.saflex_group_names() == names
        assert batch.index[12:][order].tolist() == [12, 13, 14]
        assert batch.target[12:][order].tolist() == [1, 2, 0]
        assert batch.group[12:][order].tolist() == groups
        assert data.train_dataloader().sampler.pool.source.tolist() == [7, 11, 0]

    def test_manifest_may_leave_sources_empty(self, own_folders):
        write_manifest(own_folders / "pool", [("x/cat/a.png", "cat", "", "text2img", "a {class}")])
        write_image(own_folders / "pool" / "x" / "cat" / "a.png")
        data = set_up(own_folders, has_sources=False)
        assert data.saflex_group_names() == ("clean", "text2img: a {class}")


def spoil_unknown_class(root):
    write_image(root / "pool" / "cow" / "0-0.png")


def spoil_size(root):
    write_image(root / "pool" / "cat" / "0-0.png", size=9)


def spoil_content(root):
    (root / "pool" / "cat").mkdir()
    (root / "pool" / "cat" / "0-0.png").write_bytes(b"not an image")


def spoil_name(root):
    write_image(root / "pool" / "cat" / "photo.png")


def spoil_number(root):
    write_image(root / "pool" / "eel" / "12-0.png")


def spoil_source_class(root):
    write_image(root / "pool" / "eel" / "3-0.png")


def spoil_place(root):
    write_image(root / "pool" / "3-0.png")


def spoil_columns(root):
    rows = [("a.png", "cat", "0")]
    write_manifest(root / "pool", rows, columns=("file", "label", "source"))


def spoil_listed_file(root):
    write_manifest(root / "pool", [("absent.png", "cat", "0", "edit", "")])


def spoil_listed_source(root):
    write_image(root / "pool" / "a.png")
    write_manifest(root / "pool", [("a.png", "cat", "cat/99.png", "edit", "")])


def spoil_empty_pool(root):
    shutil.rmtree(root / "pool")
    (root / "pool").mkdir()


def spoil_no_pool(root):
    shutil.rmtree(root / "pool")


def spoil_val(root):
    shutil.rmtree(root / "real" / "val" / "dog")


def spoil_test(root):
    write_image(root / "real" / "test" / "cow" / "0.png")


def spoil_train(root):
    (root / "real" / "train" / "ant").mkdir()


def spoil_split(root):
    shutil.rmtree(root / "real" / "test")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (spoil_unknown_class, ValueError, r"class of .*cow/0-0\.png to be one of .* got 'cow'"),
        (spoil_size, ValueError, r"8x8 pixels.* but .*pool/cat/0-0\.png has 9x9.*`image_size`"),
        (spoil_content, ValueError, r"cat/0-0\.png to be an image, but it cannot be read"),
        (spoil_name, ValueError, r"cat/photo\.png to say from which training image.*SOURCE-K"),
        (spoil_number, ValueError, r"eel/12-0\.png .* source '12' is neither .* its 12 images"),
        (
            spoil_source_class,
            ValueError,
            r"image 3 of .*, 03\.png, is of class 'cat' and not",
        ),
        (spoil_place, ValueError, r"class of .*pool/3-0\.png to be one of .* got ''"),
        (spoil_columns, ValueError, r"manifest\.csv .* \['class', 'generator', 'prompt'\] are mis"),
        (
            spoil_listed_file,
            FileNotFoundError,
            r"listed, but there is no .*absent\.png \(line 2 of .*manifest\.csv\)",
        ),
        (spoil_listed_source, ValueError, r"its source 'cat/99\.png' is neither a file below"),
        (spoil_empty_pool, ValueError, r"generated images in .*pool, but there are none"),
        (spoil_no_pool, FileNotFoundError, r"generated images at .*pool, but there is none"),
        (spoil_val, ValueError, r"real/val .* \['dog'\] are missing"),
        (spoil_test, ValueError, r"real/test .* \['cow'\] are unknown"),
        (spoil_train, ValueError, r"at least one image in .*train/ant"),
        (spoil_split, FileNotFoundError, r"class folders in .*real/test"),
    ],
)
def test_bad_folders_are_refused_by_name(own_folders, spoil, error, message):
    spoil(own_folders)
    with pytest.raises(error, match=message):
        set_up(own_folders)


def test_wrong_number_of_classes(folders):
    with pytest.raises(
        ValueError, match=r"Expected 4 class folders in .*train, but found 3.*leave `num_classes`"
    ):
        set_up(folders, num_classes=4)


def test_truncated_image_is_named_when_it_is_read(own_folders):
    (file, *_) = sorted((own_folders / "pool").rglob("*.png"))
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(ValueError, match=f"{file.name} to be an image, but it cannot be read"):
        batches(set_up(own_folders))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` to be a positive integer, but got 0"),
        ({"eval_batch_size": 0}, "`eval_batch_size` to be a positive integer, but got 0"),
        ({"steering_fraction": 1.0}, "`steering_fraction` to be a number between 0 and 1"),
        ({"label_noise": 1.0}, r"`label_noise` to be a number in \[0, 1\), but got 1\.0"),
        ({"generated_per_real": 0.0}, "`generated_per_real` to be a positive number, but got 0.0"),
        ({"augmentation": "rain"}, r"`augmentation` to be one of \['augmix'.*, but got 'rain'"),
        ({"per_class": "few"}, r"`per_class` to be one of \['all', 'extra', 'real'\]"),
        ({"generated": None}, "`generated` to name the folder .* but got None"),
        (
            {"has_sources": False, "batch": "replace"},
            "`batch`='union' for generated images",
        ),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GeneratedDataModule("real", **{"generated": "pool", **settings})


def test_batch_larger_than_the_training_images(folders):
    with pytest.raises(ValueError, match="`batch_size` to be at most 12, the training rows"):
        set_up(folders, batch_size=13).train_dataloader()
