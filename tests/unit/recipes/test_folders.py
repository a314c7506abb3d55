"""Images in folders: those that torchvision finds, to scale, and named where they are broken."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.folders import make_image_folders, write_image
from PIL import Image, PngImagePlugin
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms.v2.functional import pil_to_tensor

from saflex_lightning.recipes import GeneratedDataModule
from saflex_lightning.recipes.folders import FileImages, check_images, read_class_folders

RAMP = np.linspace(0.0, 1.0, 4096).reshape(64, 64)


def save(pixels, file, mode=None):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(file)


# Name of a file -> how it is written; none of them has a scale that all such files share.
DEEP = {
    "u16.png": lambda file: save((RAMP * 65535).astype(np.uint16), file),
    "u16.tif": lambda file: save((RAMP * 65535).astype(np.uint16), file),
    "u12.tif": lambda file: save((RAMP * 4095).astype(np.uint16), file),
    "i32.tif": lambda file: save((RAMP * 2**30).astype(np.int32), file),
    "float.tif": lambda file: save(RAMP.astype(np.float32), file),
    "u16.pgm": lambda file: file.write_bytes(
        b"P5 64 64 65535\n" + (RAMP * 65535).astype(">u2").tobytes()
    ),
    "lab.tif": lambda file: Image.new("LAB", (8, 8)).save(file),
}
PLAIN = {
    "L.png": "L",
    "1.png": "1",
    "LA.png": "LA",
    "P.png": "P",
    "RGB.png": "RGB",
    "RGBA.png": "RGBA",
    "CMYK.jpg": "CMYK",
    "RGB.bmp": "RGB",
    "P.gif": "P",
    "L.tif": "L",
}


@pytest.mark.parametrize("name", DEEP)
def test_images_without_a_scale_are_refused_by_name(tmp_path, name):
    file = tmp_path / name
    DEEP[name](file)
    message = rf"Expected .*{name} to be an image, but .*of 8 bits: scale it"
    with pytest.raises(ValueError, match=message):
        check_images([file], same_size=False)
    with pytest.raises(ValueError, match=message):
        FileImages([file], None)[0]


def test_an_image_of_16_bits_in_three_channels_is_read_in_proportion(tmp_path):
    """Pillow reads it but does not write it: the chunks of a PNG by hand."""
    pixels = (RAMP * 65535).astype(">u2").repeat(3).reshape(64, -1)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)

    size = struct.pack(">IIBBBBB", 64, 64, 16, 2, 0, 0, 0)
    with (tmp_path / "deep.png").open("wb") as stream:
        stream.write(b"\x89PNG\r\n\x1a\n")
        for kind, content in ((b"IHDR", size), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
            PngImagePlugin.putchunk(stream, kind, content)
    check_images([tmp_path / "deep.png"], same_size=False)
    image = FileImages([tmp_path / "deep.png"], None)[0].double()
    assert (image - torch.from_numpy(RAMP * 255)).abs().max() <= 1.0


@pytest.mark.parametrize("name", PLAIN)
def test_images_of_8_bits_are_what_torchvision_reads(tmp_path, name):
    file = tmp_path / name
    save((RAMP * 255).astype(np.uint8), file, PLAIN[name])
    check_images([file], same_size=False)
    assert FileImages([file], None)[0].equal(pil_to_tensor(default_loader(str(file))))


def text_of_2_mib(file):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("workflow", "x" * 2**21, zip=True)
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)


# What is found by the head of a file.
BROKEN = {
    "empty.png": lambda file: file.write_bytes(b""),
    "text.jpg": lambda file: file.write_text("<html>404</html>"),
    "head.png": lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n\0\0"),
    "huge.png": lambda file: Image.new("1", (20000, 20000)).save(file),
    "workflow.png": text_of_2_mib,
    "folder.png": lambda file: file.mkdir(),
    "dangling.png": lambda file: file.symlink_to("nowhere.png"),
    "missing.png": lambda file: None,
}


@pytest.mark.parametrize("name", BROKEN)
def test_unreadable_files_are_named(tmp_path, name):
    BROKEN[name](tmp_path / name)
    for read in (
        lambda file: check_images([file], same_size=False),
        lambda f: FileImages([f], 8)[0],
    ):
        with pytest.raises(ValueError, match=rf"^Expected .*{name} to be an image, but it cannot"):
            read(tmp_path / name)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif", "a.gif", "a.bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_files_are_named_when_they_are_read(tmp_path, name, kept):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    save(noise, tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f"{name} to be an image, but it cannot be read"):
        FileImages([tmp_path / name], None)[0]


def test_a_truncated_file_is_named_by_a_loader_with_workers(tmp_path):
    make_image_folders(tmp_path)
    file = tmp_path / "train" / "eel" / "01.png"
    file.write_bytes(file.read_bytes()[:-60])
    data = GeneratedDataModule(
        str(tmp_path), augmentation="none", image_size=None, batch_size=12, num_workers=1
    )
    data.setup("fit")
    with pytest.raises(ValueError, match=r"eel/01\.png to be an image, but it cannot be read"):
        list(data.train_dataloader())


class TestSameFilesAsTorchvision:
    def assert_same(self, root):
        expected = ImageFolder(str(root))
        found = read_class_folders(root)
        assert found.classes == expected.classes
        pairs = zip(map(str, found.files), found.target.tolist(), strict=True)
        assert list(pairs) == expected.samples
        assert len(found.files) > 0

    def test_nested_upper_case_hidden_and_others(self, tmp_path):
        names = [
            "cat/b.PNG",
            "cat/a.Jpeg",
            "cat/deep/er/c.png",
            "cat/deep.png",
            "cat/Z.webp",
            "cat/.hidden.png",
            "cat/.folder/d.png",
            "cat/.png",
            "Dog/a-b.png",
            "Dog/a/b.png",
            "Dog/a.b/c.png",
            ".hidden_class/a.png",
            "10/x.tif",
            "9/x.bmp",
            "straße/ü.png",
        ]
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        for name in ("cat/notes.txt", "cat/a.png.part", "loose.png", "Dog/labels.csv"):
            (tmp_path / name).touch()
        (tmp_path / "cat" / "no_file.png").mkdir()
        self.assert_same(tmp_path)
        assert len(read_class_folders(tmp_path).files) == len(names)

    def test_links_are_followed(self, tmp_path):
        store = tmp_path / "store"
        for name in ("one.png", "sub/two.png", "three.png"):
            (store / name).parent.mkdir(parents=True, exist_ok=True)
            (store / name).touch()
        root = tmp_path / "root"
        (root / "cat").mkdir(parents=True)
        (root / "cat" / "linked.png").symlink_to(store / "one.png")
        (root / "cat" / "folder").symlink_to(store / "sub")
        other = tmp_path / "other"
        other.mkdir()
        (other / "x.png").touch()
        (root / "dog").symlink_to(other)
        self.assert_same(root)
        assert len(read_class_folders(root).files) == 3

    def test_a_split_by_a_relative_path(self, tmp_path, monkeypatch):
        make_image_folders(tmp_path)
        monkeypatch.chdir(tmp_path / "train")
        assert read_class_folders(Path(".")).classes == ["cat", "dog", "eel"]


def test_a_file_stands_in_one_class(tmp_path):
    write_image(tmp_path / "cat" / "a.png")
    write_image(tmp_path / "dog" / "b.png", seed=1)
    (tmp_path / "dog" / "c.png").symlink_to(tmp_path / "cat" / "a.png")
    message = r"one class, but .*dog/c\.png is an image of class 'cat' too"
    with pytest.raises(ValueError, match=message):
        read_class_folders(tmp_path)
    (tmp_path / "dog" / "c.png").unlink()
    os.symlink(tmp_path / "dog", tmp_path / "fox")
    with pytest.raises(ValueError, match=r"fox/b\.png is an image of class 'dog' too"):
        read_class_folders(tmp_path)
