"""The official sets: facts, checksums, and what is said when a file is missing or another one."""

import sys
from pathlib import Path

import pytest
from helpers.standins import write_medmnist

from saflex_lightning.recipes import MedMNISTDataModule
from saflex_lightning.recipes.medmnist_sets import MEDMNIST_SETS, download_medmnist, find_medmnist

REAL = Path(__file__).parents[4] / "shared" / "data" / "medmnist"


def test_facts_are_those_of_the_medmnist_package():
    info = pytest.importorskip("medmnist").INFO
    for name, facts in MEDMNIST_SETS.items():
        theirs = info[f"{name}mnist"]
        assert facts.md5 == theirs["MD5"]
        assert facts.num_classes == len(theirs["label"]) == len(facts.class_names)
        names = zip(facts.class_names, theirs["label"].values(), strict=True)
        assert all(whole.startswith(name) for name, whole in names)
        assert facts.in_channels == theirs["n_channels"]
        assert facts.rows == tuple(theirs["n_samples"].values())


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the official bloodmnist.npz")
def test_official_file_is_accepted():
    data = MedMNISTDataModule("blood", root=str(REAL), download=True)
    data.prepare_data()  # the file is there, so nothing is downloaded
    data.setup("fit")
    loaders = (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    assert tuple(len(loader.dataset) for loader in loaders) == MEDMNIST_SETS["blood"].rows


@pytest.mark.parametrize("name", MEDMNIST_SETS)
def test_every_set_has_its_channels_and_classes(tmp_path, name):
    write_medmnist(tmp_path, name)
    data = MedMNISTDataModule(name, root=str(tmp_path), check_md5=False, batch_size=32)
    data.setup("fit")
    facts = MEDMNIST_SETS[name]
    batch = next(iter(data.train_dataloader()))
    assert batch.inputs.shape == (64, facts.in_channels, 28, 28)
    assert len(data.class_counts()) == facts.num_classes == data.num_classes


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file at .*octmnist\.npz\. .*`download` to Tr"):
        find_medmnist("oct", str(tmp_path))


def test_other_checksum_is_refused_unless_it_is_not_asked_for(tmp_path):
    file = write_medmnist(tmp_path, "blood")
    message = r"bloodmnist\.npz to have the md5 7053d0359d.*, but got [0-9a-f]{32}\. Delete it"
    with pytest.raises(ValueError, match=message):
        find_medmnist("blood", str(tmp_path))
    assert find_medmnist("blood", str(tmp_path), check_md5=False) == file


def test_grey_file_under_the_name_of_a_colour_set(tmp_path):
    write_medmnist(tmp_path, "oct").rename(tmp_path / "bloodmnist.npz")
    data = MedMNISTDataModule("blood", root=str(tmp_path), check_md5=False)
    with pytest.raises(ValueError, match="`in_channels`=3, but got shape"):
        data.setup("fit")


def test_download_needs_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "medmnist", None)  # as if it were not installed
    with pytest.raises(ImportError, match=r"pip install 'saflex-lightning\[medmnist\]'"):
        download_medmnist("blood", str(tmp_path))


def test_failed_download_says_where_the_file_is(tmp_path, monkeypatch, capsys):
    pytest.importorskip("medmnist")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    data = MedMNISTDataModule("blood", root=str(tmp_path / "new"), download=True)
    with pytest.raises(RuntimeError, match=r"download bloodmnist\.npz into .*new.*zenodo"):
        data.prepare_data()
