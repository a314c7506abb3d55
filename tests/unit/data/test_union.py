"""Union batches from any dataset and augmentation: rows, groups, draws, resuming, refusals."""

import random

import numpy as np
import pytest
import torch
from helpers.grouped import read_indices
from helpers.processes import run_in_processes
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchvision import transforms as v1
from torchvision.transforms import v2

from saflex_lightning import AugmentedBatch
from saflex_lightning.data import UnionDataset, union_loader

ROWS, CLASSES = 10, 3
GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randint(256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=GENERATOR)
LABELS = torch.arange(ROWS) % CLASSES
TENSORS = TensorDataset(PIXELS, LABELS)
PICTURES = [
    (Image.fromarray(pixels.permute(1, 2, 0).numpy()), int(label)) for pixels, label in TENSORS
]
AS_TENSOR = v1.ToTensor()
OPERATIONS = ("clean", "Identity", "ShearX", "ShearY")


def timm(name):
    augment = pytest.importorskip("timm.data.auto_augment")
    make = {
        "rand": lambda: augment.rand_augment_transform("rand-m9-mstd0.5", {}),
        "auto": lambda: augment.auto_augment_transform("original", {}),
        "mix": lambda: augment.augment_and_mix_transform("augmix-m3-w3", {}),
    }
    return make[name]()


def albumentations():
    library = pytest.importorskip("albumentations")
    return library.Compose([library.HorizontalFlip(), library.RandomBrightnessContrast()])


def jitter(image):
    """Draws from all three global generators."""
    shift = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
    return image.point(lambda value: int(value * shift / 3))


# Augmentation of pictures -> its first group names and their number.
PICTURE_AUGMENTATIONS = {
    "v2 RandAugment": (v2.RandAugment, OPERATIONS, 15),
    "v2 TrivialAugment": (v2.TrivialAugmentWide, OPERATIONS, 15),
    "v2 AutoAugment": (v2.AutoAugment, ("clean", "Identity", "ShearX", "Rotate"), 12),
    "v2 Compose": (
        lambda: v2.Compose([v2.RandomHorizontalFlip(), v2.RandAugment()]),
        OPERATIONS,
        15,
    ),
    "v2 AugMix": (v2.AugMix, ("clean", "AugMix"), 2),
    "v1 RandAugment": (v1.RandAugment, OPERATIONS, 15),
    "v1 TrivialAugment": (v1.TrivialAugmentWide, OPERATIONS, 15),
    "v1 AutoAugment": (v1.AutoAugment, ("clean", "Identity", "ShearX", "Rotate"), 12),
    "v1 Compose": (
        lambda: v1.Compose([v1.RandomHorizontalFlip(), v1.RandAugment()]),
        OPERATIONS,
        15,
    ),
    "v1 AugMix": (v1.AugMix, ("clean", "AugMix"), 2),
    "timm RandAugment": (lambda: timm("rand"), ("clean", "Identity", "AutoContrast"), 17),
    "timm AutoAugment": (lambda: timm("auto"), ("clean", "Identity", "PosterizeOriginal"), 12),
    "timm AugMix": (lambda: timm("mix"), ("clean", "AugMixAugment"), 2),
    "albumentations": (albumentations, ("clean", "Compose"), 2),
    "function": (lambda: jitter, ("clean", "jitter"), 2),
    "lambda": (lambda: lambda image: image.rotate(90), ("clean", "augmented"), 2),
}


def all_batches(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_equal(one, other):
    assert len(one) == len(other)
    for first, second in zip(one, other, strict=True):
        for name in vars(first):
            assert getattr(first, name).equal(getattr(second, name)), name


@pytest.mark.parametrize("kind", PICTURE_AUGMENTATIONS)
def test_augmentations_of_pictures(kind):
    make, names, number = PICTURE_AUGMENTATIONS[kind]
    loader = union_loader(PICTURES, make(), AS_TENSOR, batch_size=5, seed=3)
    assert loader.group_names[: len(names)] == names
    assert len(loader.group_names) == number
    batches = all_batches(loader, epoch=1)
    for batch in batches:
        assert isinstance(batch, AugmentedBatch)
        rows = batch.index[:5]
        assert batch.inputs[:5].equal(torch.stack([AS_TENSOR(PICTURES[row][0]) for row in rows]))
        assert batch.inputs.shape == (10, 3, 16, 16)
        assert batch.target.equal(LABELS[rows].repeat(2))
        assert batch.augmented.tolist() == [False] * 5 + [True] * 5
        assert batch.index[5:].equal(rows + ROWS)
        assert batch.group[:5].eq(0).all()
        assert batch.group[5:].min() >= 1
        assert batch.group.max() < number
    # Whatever was drawn before, and in whatever process.
    for generator in (random.seed, np.random.seed, torch.manual_seed):
        generator(99)
    again = union_loader(PICTURES, make(), AS_TENSOR, batch_size=5, seed=3)
    assert_equal(batches, all_batches(again, epoch=1))
    other = union_loader(PICTURES, make(), AS_TENSOR, batch_size=5, seed=4)
    assert not batches[0].index.equal(all_batches(other, epoch=1)[0].index)


@pytest.mark.parametrize("kind", ["v1 RandAugment", "timm RandAugment", "function"])
def test_a_row_is_the_same_in_workers_and_in_batches_of_another_size(kind):
    make = PICTURE_AUGMENTATIONS[kind][0]
    rows = {}
    for settings in ({"batch_size": 5}, {"batch_size": 2, "num_workers": 2}):
        loader = union_loader(PICTURES, make(), AS_TENSOR, seed=1, **settings)
        for batch in all_batches(loader, epoch=2):
            for index, image, group in zip(batch.index, batch.inputs, batch.group, strict=True):
                row = (image, group)
                for one, other in zip(rows.setdefault(int(index), row), row, strict=True):
                    assert one.equal(other)
    assert len(rows) == 2 * ROWS


@pytest.mark.parametrize("name", ["MixUp", "CutMix", "RandomChoice", "timm"])
def test_mixing_mixes_the_rows_of_the_batch(name):
    mixings = [v2.MixUp(num_classes=CLASSES), v2.CutMix(num_classes=CLASSES)]
    make = {
        "MixUp": lambda: mixings[0],
        "CutMix": lambda: mixings[1],
        "RandomChoice": lambda: v2.RandomChoice(mixings),
        "timm": lambda: pytest.importorskip("timm.data").Mixup(
            num_classes=CLASSES, label_smoothing=0.0
        ),
    }[name]
    rows = TensorDataset(PIXELS.float(), LABELS)
    loader = union_loader(rows, make(), batch_size=4, drop_last=True)
    first = "mixup" if name == "timm" else name.lower()
    assert loader.group_names[:2] == ("clean", f"{first}_0_25")
    for batch in all_batches(loader):
        clean = batch.index[:4]
        assert batch.inputs[:4].equal(PIXELS[clean].float())
        assert batch.target[:4].argmax(1).equal(LABELS[clean])
        torch.testing.assert_close(batch.target.sum(1), torch.ones(8))
        kept = batch.target[4:].gather(1, LABELS[clean][:, None]).min()
        assert batch.group[4:].eq(1 + int(min(4 * (1 - kept), 3))).all()
    again = union_loader(rows, make(), batch_size=4, drop_last=True)
    assert_equal(all_batches(loader, epoch=3), all_batches(again, epoch=3))


def test_replace_keeps_the_augmented_rows_alone():
    union = all_batches(union_loader(TENSORS, v2.RandAugment(), batch_size=5))
    loader = union_loader(TENSORS, v2.RandAugment(), batch_size=5, replace=True)
    for both, batch in zip(union, all_batches(loader), strict=True):
        for name in ("inputs", "target", "augmented", "group", "index"):
            assert getattr(batch, name).equal(getattr(both, name)[5:]), name


@pytest.mark.parametrize("replace", [False, True])
def test_without_augmentation_all_rows_are_clean(replace):
    loader = union_loader(TENSORS, None, batch_size=5, replace=replace)
    assert loader.group_names == ("clean",)
    for batch in all_batches(loader):
        assert batch.inputs.equal(PIXELS[batch.index])
        assert not batch.augmented.any()


def test_clean_rows_do_not_depend_on_the_augmentation():
    """Also where the transform draws."""
    loaders = [
        union_loader(TENSORS, augment, v2.RandomCrop(8), batch_size=5)
        for augment in (None, v2.RandAugment())
    ]
    for plain, both in zip(*map(all_batches, loaders), strict=True):
        assert plain.inputs.equal(both.inputs[:5])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_it_goes_on_in_the_middle_of_an_epoch(num_workers):
    def make():
        return union_loader(TENSORS, v2.RandAugment(), batch_size=3, num_workers=num_workers)

    whole = all_batches(make(), epoch=2)
    loader = make()
    loader.sampler.set_epoch(2)
    taken = [batch for batch, _ in zip(loader, range(2), strict=False)]
    other = make()
    other.load_state_dict({**loader.state_dict(), "taken": 2})
    assert_equal(whole, [*taken, *all_batches(other, epoch=2)])


@pytest.mark.parametrize("state", [None, {}, {"epoch": 1}, {"epoch": 1, "taken": -1}])
def test_a_place_that_is_none_is_refused_and_not_half_taken(state):
    loader = union_loader(TENSORS, None, batch_size=3)
    with pytest.raises((TypeError, ValueError), match=r"^Expected `(state|epoch|taken)` to be a"):
        loader.load_state_dict(state)
    assert loader.state_dict() == {"epoch": 0, "taken": 0}


def test_processes_share_the_rows_once_there_is_a_group(monkeypatch):
    loaders = [union_loader(TENSORS, None, batch_size=5) for _ in range(2)]
    seen = []
    for rank, loader in enumerate(loaders):
        for name, value in (("is_initialized", True), ("get_world_size", 2), ("get_rank", rank)):
            monkeypatch.setattr(torch.distributed, name, lambda value=value: value)
        loader.sampler.set_epoch(1)
        assert len(loader) == 1
        seen += [row for batch in loader for row in batch.index.tolist()]
    assert sorted(seen) == list(range(ROWS))


class Jittered(Dataset):
    """Its own transform draws, as a dataset's usually does."""

    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return PIXELS[row] + torch.rand(()) + random.random(), LABELS[row]


@pytest.mark.parametrize("augment", [None, torch.fliplr, v2.MixUp(num_classes=CLASSES)])
def test_what_the_dataset_draws_is_a_function_of_the_row_and_the_epoch(augment):
    first = all_batches(union_loader(Jittered(), augment, batch_size=5), epoch=1)
    random.seed(7)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    again = all_batches(union_loader(Jittered(), augment, batch_size=5), epoch=1)
    assert_equal(first, again)
    assert torch.get_rng_state().equal(state)
    other = all_batches(union_loader(Jittered(), augment, batch_size=5, seed=1), epoch=1)
    assert not first[0].inputs.equal(other[0].inputs)


def test_rows_in_order():
    (batch,) = all_batches(union_loader(TENSORS, None, batch_size=ROWS, shuffle=False))
    assert batch.index.tolist() == list(range(ROWS))


class Softening:
    changes_label = True

    def __call__(self, image, label):
        return image.flip(-1), torch.nn.functional.one_hot(label, CLASSES) * 0.7 + 0.1


def test_an_augmentation_may_change_the_label():
    loader = union_loader(TENSORS, Softening(), batch_size=5)
    assert loader.group_names == ("clean", "Softening")
    for batch in all_batches(loader):
        own = torch.nn.functional.one_hot(LABELS[batch.index[:5]], CLASSES).float()
        assert batch.target[:5].equal(own)
        torch.testing.assert_close(batch.target[5:], 0.7 * own + 0.1)
        assert batch.inputs[5:].equal(batch.inputs[:5].flip(-1))


@pytest.mark.parametrize(
    "label", [lambda n: np.uint8(n), lambda n: np.array([n]), lambda n: torch.tensor(n), int]
)
def test_labels_of_any_integer_type_are_classes(label):
    rows = [(PIXELS[n], label(n % CLASSES)) for n in range(ROWS)]
    (batch,) = all_batches(union_loader(rows, torch.fliplr, batch_size=ROWS))
    assert batch.target.dtype == torch.int64
    assert batch.target.equal(LABELS[batch.index[:ROWS]].repeat(2))


def test_inputs_of_several_parts():
    rows = [({"image": PIXELS[n].float(), "ids": [n, n]}, n % CLASSES) for n in range(ROWS)]

    def darken(value):
        return {**value, "image": value["image"] / 2}

    (batch,) = all_batches(union_loader(rows, darken, batch_size=ROWS))
    clean, dark = batch.inputs["image"].chunk(2)
    assert dark.equal(clean / 2)
    assert [len(part) for part in batch.inputs["ids"]] == [2 * ROWS] * 2


def test_a_loader_of_ones_own():
    rows = UnionDataset(TENSORS, v2.RandAugment())
    batch = next(iter(DataLoader(rows, 5, collate_fn=rows.collate)))
    assert batch.augmented.tolist() == [False] * 5 + [True] * 5


class Endless(IterableDataset):
    def __iter__(self):
        return iter(TENSORS)


class Lone(Dataset):
    def __len__(self):
        return ROWS

    def __getitem__(self, row):
        return PIXELS[row]


@pytest.mark.parametrize(
    ("arguments", "settings", "error", "message"),
    [
        ((Endless(), None), {}, TypeError, "`dataset` to be map-style, .* but got Endless"),
        ((3, None), {}, TypeError, "`dataset` to be map-style, .* but got int"),
        ((TENSORS, "flip"), {}, TypeError, "`augment` to be a function or None, but got 'flip'"),
        ((TENSORS, None, 3), {}, TypeError, "`transform` to be a function or None, but got 3"),
        ((TENSORS, None), {"seed": -1}, ValueError, "`seed` to be a non-negative .* got -1"),
        ((TENSORS, None), {"seed": True}, TypeError, "`seed` to be a non-negative .* got True"),
        ((TENSORS, None), {"replace": 1}, TypeError, "`replace` to be True or False, but got 1"),
        ((TENSORS, None), {"sampler": []}, ValueError, r"no \['sampler'\] among the options"),
    ],
)
def test_wrong_arguments(arguments, settings, error, message):
    with pytest.raises(error, match=message):
        union_loader(*arguments, **settings)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((Lone(), None), TypeError, r"`dataset` to yield \(input, label\), but row \d is Tensor"),
        ((TENSORS, v2.CenterCrop(8)), ValueError, r"shape \(3, 16, 16\) .* made \(3, 8, 8\)"),
        (
            (PICTURES, None),
            ValueError,
            r"fit into one batch, but got tuple\(Image, int\) .*`transf",
        ),
        (
            ([({"a": PIXELS[0]}, 0)] * 2, v2.MixUp(num_classes=3)),
            ValueError,
            "one tensor for MixUp to mix, but got dict",
        ),
        (
            ([(PIXELS[0], torch.tensor([0, 1]))] * 2, None),
            ValueError,
            r"one class per row, .* but got Tensor of shape \(2, 2\) for 2 rows",
        ),
        (([(PIXELS[0], "cat")] * 2, None), ValueError, "one class per row, .* but got tuple"),
        (([(["a"], 0)] * 2, list), TypeError, "inputs to be tensors, .* but got str"),
    ],
)
def test_rows_that_make_no_batch(arguments, error, message):
    loader = union_loader(*arguments, batch_size=2)
    with pytest.raises(error, match=message):
        next(iter(loader))


@pytest.mark.distributed
def test_a_loader_can_be_given_to_processes():
    """As `ddp_spawn` does."""
    rows = [(row.float(), int(label)) for row, label in TENSORS]
    loader = union_loader(rows, torch.fliplr, batch_size=4)
    assert run_in_processes(read_indices, 1, loader) == [read_indices(0, loader)]
