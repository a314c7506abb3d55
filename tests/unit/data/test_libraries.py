"""Union batches of augmentations that libraries have, and the pixels of a seed."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision.transforms import v2

from saflex_lightning.data import UnionDataset, group_names_of, union_batch, union_loader
from saflex_lightning.data.mixing import group_of_mixed

ROWS, CLASSES = 8, 3
PIXELS = torch.rand(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(ROWS) % CLASSES
TENSORS = TensorDataset(PIXELS, LABELS)

GOLDEN_ORDER = [[1, 3], [2, 0]]
GOLDEN_DRAWS = [
    [0.8817031, 0.2711192, 0.4065080],
    [0.0098233, 0.0886598, 0.6969178],
    [0.7627428, 0.0871408, 0.3080465],
    [0.4194292, 0.1683485, 0.0972061],
]


def from_three_generators(value):
    """What the three global generators draw next, as one number each."""
    return torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])  # noqa: NPY002


def test_pixels_of_a_seed_stay_what_they_are():
    """Also in later versions: pools and checkpoints refer to them."""
    rows = [(torch.zeros(3), label) for label in range(4)]
    loader = union_loader(rows, from_three_generators, batch_size=2, seed=3)
    loader.sampler.set_epoch(1)
    batches = list(loader)
    assert [batch.index[:2].tolist() for batch in batches] == GOLDEN_ORDER
    drawn = torch.cat([batch.inputs[2:] for batch in batches])
    torch.testing.assert_close(drawn, torch.tensor(GOLDEN_DRAWS), rtol=0, atol=1e-6)


@pytest.mark.parametrize("in_batches", [False, True])
def test_kornia(in_batches):
    augmentation = pytest.importorskip("kornia.augmentation")
    augment = augmentation.AugmentationSequential(
        augmentation.RandomHorizontalFlip(p=0.5), augmentation.ColorJiggle(0.2, 0.2, 0.2, 0.2)
    )
    if in_batches:
        batch = union_batch(PIXELS, LABELS, augment)
    else:
        batch, again = (
            next(iter(union_loader(TENSORS, augment, batch_size=ROWS))) for _ in range(2)
        )
        assert batch.inputs.equal(again.inputs)
        assert batch.inputs[:ROWS].equal(PIXELS[batch.index[:ROWS]])
    assert group_names_of(augment) == ("clean", "AugmentationSequential")
    assert batch.group.tolist() == [0] * ROWS + [1] * ROWS
    assert (batch.inputs[ROWS:] != batch.inputs[:ROWS]).flatten(1).any(1).all()


@pytest.mark.parametrize("name", ["RandomMixUpV2", "RandomMosaic"])
def test_rows_mixed_by_kornia_are_refused(name):
    augmentation = pytest.importorskip("kornia.augmentation")
    augment = augmentation.AugmentationSequential(getattr(augmentation, name)())
    for use in (
        lambda: union_batch(PIXELS, LABELS, augment),
        lambda: union_loader(TENSORS, augment),
    ):
        with pytest.raises(ValueError, match=f"but {name} of kornia mixes rows .*of torchvision"):
            use()


def test_arrays_for_albumentations():
    library = pytest.importorskip("albumentations")
    rows = [((PIXELS[n].permute(1, 2, 0) * 255).byte().numpy(), n % CLASSES) for n in range(ROWS)]
    (batch,) = union_loader(rows, library.VerticalFlip(p=1.0), v2.ToImage(), batch_size=ROWS)
    assert batch.inputs[ROWS:].equal(batch.inputs[:ROWS].flip(2))


@pytest.mark.parametrize("augment", [torch.fliplr, v2.MixUp(num_classes=CLASSES), v2.RandAugment()])
def test_a_batch_that_is_there_becomes_a_union_batch(augment):
    names = group_names_of(augment)
    for _ in range(20):
        index = torch.randperm(100)[:ROWS]
        batch = union_batch(PIXELS, LABELS, augment, index=index)
        assert batch.inputs[:ROWS].equal(PIXELS)
        assert batch.target[:ROWS].equal(
            torch.eye(CLASSES)[LABELS] if isinstance(augment, v2.MixUp) else LABELS
        )
        assert batch.augmented.tolist() == [False] * ROWS + [True] * ROWS
        assert batch.group[:ROWS].eq(0).all()
        assert 1 <= batch.group[ROWS:].unique().item() < len(names)
        assert batch.index.unique().numel() == 2 * ROWS
    assert union_batch(PIXELS, LABELS, augment).index is None


def test_an_augmentation_of_a_batch_may_change_labels():
    def relabel(images, target):
        return images.flip(-1), (target + 1) % CLASSES

    relabel.changes_label = True
    batch = union_batch(PIXELS, LABELS, relabel)
    assert batch.inputs[ROWS:].equal(PIXELS.flip(-1))
    assert batch.target[ROWS:].equal((LABELS + 1) % CLASSES)


def test_a_batch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(8, 3, 16, 16\) of the rows, but of inputs it made"):
        union_batch(PIXELS, LABELS, v2.CenterCrop(8))


def mixing_collate(name):
    if name == "timm":
        return pytest.importorskip("timm.data.mixup").FastCollateMixup(num_classes=CLASSES)
    mix = {"MixUp": v2.MixUp, "CutMix": v2.CutMix}[name](num_classes=CLASSES)
    return lambda rows: mix(*default_collate(rows))


@pytest.mark.parametrize("name", ["MixUp", "CutMix", "timm"])
def test_a_collate_function_that_mixes_clean_rows_is_refused(name):
    rows = TENSORS
    if name == "timm":
        rows = [(np.zeros((3, 16, 16), np.uint8), n % CLASSES) for n in range(ROWS)]
    loader = union_loader(rows, None, batch_size=ROWS, collate_fn=mixing_collate(name))
    with pytest.raises(ValueError, match=r"`collate_fn` to keep the labels .* as `augment`"):
        next(iter(loader))


def test_a_collate_function_may_make_a_union_batch_by_mixing():
    mix = v2.MixUp(num_classes=CLASSES)
    loader = DataLoader(
        TENSORS, ROWS, collate_fn=lambda rows: union_batch(*default_collate(rows), mix)
    )
    (batch,) = loader
    assert batch.inputs[:ROWS].equal(PIXELS)
    kept = batch.target[ROWS:].gather(1, LABELS[:, None]).min()
    torch.testing.assert_close(
        batch.inputs[ROWS:], kept * PIXELS + (1 - kept) * PIXELS.roll(1, 0), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("mode", ["elem", "pair"])
def test_shares_that_timm_draws_for_each_row(mode):
    mixup = pytest.importorskip("timm.data").Mixup(
        mode=mode, num_classes=ROWS, label_smoothing=0.0, cutmix_alpha=0.0
    )
    target = torch.arange(ROWS)
    np.random.seed(0)  # noqa: NPY002
    batch = union_batch(PIXELS, target, mixup)
    kept = batch.target[ROWS:].gather(1, target[:, None]).squeeze(1)
    assert batch.group[ROWS:].tolist() == [1 + int(min(4 * (1 - k), 3)) for k in kept]
    assert batch.group[ROWS:].unique().numel() > 1


def test_a_share_of_the_batch_shows_in_rows_of_two_classes_alone():
    mixed = torch.tensor([[1.0, 0.0], [0.4, 0.6]])
    assert group_of_mixed(mixed, torch.tensor([0, 1])).tolist() == [2, 2]
    assert group_of_mixed(mixed, torch.tensor([0, 1]), per_row=True).tolist() == [1, 2]


def test_a_dataset_tells_the_names_that_its_loader_lacks():
    rows = UnionDataset(TENSORS, v2.RandAugment())
    assert rows.group_names == group_names_of(v2.RandAugment())
