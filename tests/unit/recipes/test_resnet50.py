"""ResNet-50: weights from a file, the range of its inputs, and what is refused."""

import tarfile
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet50
from torchvision.transforms.v2 import functional as F

from saflex_lightning.recipes import ResNet50


@pytest.fixture(scope="module")
def imagenet():
    """torchvision's network with a thousand classes and, for want of theirs, random weights."""
    torch.manual_seed(1)
    return resnet50().double().eval()


@pytest.mark.parametrize("input_range", ["imagenet", "unit"])
def test_weights_of_a_file_serve_below_the_last_layer(imagenet, input_range, tmp_path):
    torch.save(imagenet.state_dict(), tmp_path / "resnet50.pth")
    weights = str(tmp_path / "resnet50.pth")
    network = ResNet50(1000, weights=weights, input_range=input_range).double().eval()
    assert not network.fc.weight.equal(imagenet.fc.weight)
    network.fc.load_state_dict(imagenet.fc.state_dict())
    images = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    expected = images
    if input_range == "imagenet":
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
        expected = F.normalize(images, mean.double().tolist(), std.double().tolist())
    with torch.no_grad():
        torch.testing.assert_close(network(2.0 * images - 1.0), imagenet(expected))
    assert network.state_dict().keys() == imagenet.state_dict().keys()


def test_file_of_another_network(tmp_path):
    torch.save({"conv1.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth' to be the state dict .* tensors differ"):
        ResNet50(2, weights=str(tmp_path / "other.pth"))


def test_file_of_a_wider_network(imagenet, tmp_path):
    state = imagenet.state_dict()
    torch.save({**state, "conv1.weight": torch.zeros(128, 3, 7, 7)}, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"1 tensors differ, 'conv1.weight' among them"):
        ResNet50(2, weights=str(tmp_path / "wide.pth"))


def write_tar(file):
    """The oldest format, in which torch before 2.6 runs what it finds whatever is asked for."""
    with tarfile.open(file, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))


class Call:
    """An object that would run something where it is unpickled."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize(
    "write",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"no weights"),
        lambda file: torch.save([1, 2], file),
        lambda file: torch.save({"conv1.weight": Call()}, file),
        lambda file: torch.save(Call(), file, _use_new_zipfile_serialization=False),
        write_tar,
    ],
)
def test_files_that_hold_no_tensors_are_named_and_nothing_in_them_runs(
    tmp_path, monkeypatch, write
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"^Expected `weights` to name .*odd\.pth cannot be"):
        ResNet50(2, weights=str(tmp_path / "odd.pth"))
    assert not (tmp_path / "ran").exists()


def test_a_file_cut_short(imagenet, tmp_path):
    torch.save(imagenet.state_dict(), tmp_path / "cut.pth")
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"cut\.pth cannot be read as one"):
        ResNet50(2, weights=str(tmp_path / "cut.pth"))


def test_neither_file_nor_name():
    with pytest.raises(ValueError, match=r"'IMAGENET1K_V2'.* or the path of a file, but got"):
        ResNet50(2, weights="absent")


def test_unknown_input_range():
    with pytest.raises(ValueError, match=r"`input_range` to be one of \['imagenet', 'unit'\]"):
        ResNet50(2, input_range="byte")
