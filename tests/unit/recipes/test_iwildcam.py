"""iWildCam from its files: splits, names, batches, and files that are missing or broken."""

import pytest
import torch
from helpers.standins import write_iwildcam
from lightning.fabric.utilities.exceptions import MisconfigurationException

from saflex_lightning.recipes.contrastive import IWildCamDataModule


@pytest.fixture
def root(tmp_path):
    write_iwildcam(tmp_path)
    return tmp_path


def set_up(root, **settings):
    data = IWildCamDataModule(str(root), image_size=28, batch_size=4, **settings)
    data.setup("fit")
    return data


def test_splits_names_and_batches(root):
    data = set_up(root)
    assert data.class_names() == ["animal 0", "animal 1", "animal 2"]
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs.shape == (8, 3, 28, 28)
    assert batch.augmented.tolist() == [False] * 4 + [True] * 4
    assert torch.equal(batch.target[:4], batch.target[4:])
    assert data.saflex_group_names()[0] == "clean"
    images, labels = next(iter(data.val_dataloader()))
    assert images.min() >= -1
    assert images.max() <= 1
    assert labels.tolist() == [row % 3 for row in range(8)]
    in_distribution, out = (loader.dataset.rows.images.files for loader in data.test_dataloader())
    assert {file.name[:7] for file in in_distribution} == {"id_test"}
    assert {file.name[:4] for file in out} == {"test"}
    assert data.saflex_dataloader().dataset is data.val_dataloader().dataset
    steering = set_up(root, steering="train").saflex_dataloader().dataset
    assert {file.name[:5] for file in steering.rows.images.files} == {"train"}
    assert data.sizes() == {"num_classes": 3, "in_channels": 3}


def test_validation_rows_may_be_trained_on(root):
    data = set_up(root, merge_val=True, steering="train")
    rows = data.train_dataloader().dataset
    assert len(rows) == 16
    assert data.saflex_dataloader().dataset.rows.images.files == rows.dataset.rows.images.files
    assert data.val_dataloader() == []
    with pytest.raises(MisconfigurationException, match="`steering` other than 'val' with"):
        set_up(root, merge_val=True).saflex_dataloader()


def test_labels_without_a_name_are_numbered(root):
    (root / "categories.csv").write_text("y,name\n0,empty\n2,impala\n")
    assert set_up(root).class_names() == ["empty", "unknown animal 1", "impala"]


def test_names_are_those_of_the_file_as_it_is_downloaded(root):
    unused = "99999,domestic dog\n99999,bos taurus\n"  # occur in no split
    (root / "categories.csv").write_text("y,name\n0,empty\n1,mazama\n2,mazama\n" + unused)
    assert set_up(root, num_classes=3).class_names() == ["empty", "mazama", "mazama"]
    english = "y,name,english\n0,empty,empty\n1,mazama,brocket\n2,puma,\n"
    (root / "categories.csv").write_text(english)
    assert set_up(root).class_names() == ["empty", "brocket", "puma"]


def test_another_number_of_classes_is_refused(root):
    assert len(set_up(root, num_classes=3).class_names()) == 3
    with pytest.raises(ValueError, match=r"182 classes in .*categories\.csv.* end at 2\. Take"):
        set_up(root, num_classes=182)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y,name\n", r"one class or more in .*categories\.csv, but its labels `y` end at -1"),
        ("y,name\n99999,ox\n", r"one class or more in .*categories\.csv"),
        ("y,name\n0,cat\n1,dog\n1,ox\n", r"categories\.csv, but line 4 has 1 again"),
        ("y,name\n0,cat\nx,dog\n", r"categories\.csv, but line 3 has 'x'"),
        (f"y,name\n{'9' * 5000},cat\n", r"categories\.csv, but line 2 has '99"),
        ("y,name\n100000,cat\n", r"categories\.csv, but line 2 has '100000'"),
        ('y,name\n0,"cat\n', r"categories\.csv .* line 2 cannot be read"),
    ],
)
def test_broken_categories_are_refused(root, text, message):
    (root / "categories.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        set_up(root)


@pytest.mark.parametrize("name", ["metadata.csv", "categories.csv"])
def test_missing_table_is_named(root, name):
    (root / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"there is no {name} in it. Download the set"):
        set_up(root)


def test_missing_image_is_named(root):
    (root / "train" / "id_test0.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*id_test0\.png"):
        set_up(root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("split,filename\n", r"\['y'\] are missing"),
        ("split,filename,y\ntrain,a.png,3\n", r"labels `y` in \[0, 2\].*line 2 has '3'"),
        ("split,filename,y\ntrain,a.png,1\n", r"\['id_test', 'id_val', 'test'\] have none"),
        ("split,filename,y\ntrain,a.png\n", r"3 cells in every row .* line 2 has 2"),
        ("split,filename,y\ntrain,a.png,\n", r"labels `y` in .* line 2 has ''"),
        ("split,filename,y\ntrain,a.png,1.0\n", r"labels `y` in .* line 2 has '1\.0'"),
        ("split,filename,y\ntrain,a.png,-1\n", r"labels `y` in .* line 2 has '-1'"),
        ("split,filename,y,y\ntrain,a.png,1,1\n", r"\['y'\] come twice"),
        ("split,filename,y\ntrain,../../a.png,1\n", r"own folder .* line 2 has '\.\./\.\./a"),
        ("split,filename,y\n\ntrain,/a.png,1\n", r"own folder .* line 3 has '/a\.png'"),
    ],
)
def test_broken_table_is_refused(root, text, message):
    (root / "metadata.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        set_up(root)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"batch": "both"}, r"`batch` to be one of \['replace', 'union'\]"),
        ({"steering": "test"}, r"`steering` to be one of \['split', 'train', 'val'\]"),
        ({"image_size": 0}, "`image_size` to be a positive integer, but got 0"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(ValueError, match=message):
        IWildCamDataModule("nowhere", **setting)


def test_augmentations_that_mix_labels_are_refused():
    with pytest.raises(ValueError, match="a caption names one class, but got 'mixup'"):
        IWildCamDataModule("nowhere", augmentation="mixup")
