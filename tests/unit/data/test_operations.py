"""Tagged augmentations: same pixels and draws as torchvision, and the operation that made them."""

import pickle

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import AutoAugmentPolicy

from saflex_lightning.data import TagOperations
from saflex_lightning.data.mixing import mixing_group, mixing_group_names
from saflex_lightning.data.union import group_names_of
from saflex_lightning.recipes import MedMNISTDataModule

TRANSFORMS = {
    "RandAugment, one operation": lambda: v2.RandAugment(num_ops=1),
    "RandAugment, two operations": lambda: v2.RandAugment(magnitude=14),
    "TrivialAugmentWide": v2.TrivialAugmentWide,
    "AutoAugment, ImageNet": v2.AutoAugment,
    "AutoAugment, CIFAR-10": lambda: v2.AutoAugment(AutoAugmentPolicy.CIFAR10),
    "AutoAugment, SVHN": lambda: v2.AutoAugment(AutoAugmentPolicy.SVHN),
}
DRAWS = 250


@pytest.fixture(scope="module")
def image():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 28, 28), dtype=torch.uint8, generator=generator)


def seeded(transform, image, seed):
    torch.manual_seed(seed)
    return transform(image), torch.get_rng_state()


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_pixels_and_random_state_are_those_of_the_plain_transform(make, image):
    plain, tagged = make(), TagOperations(make())
    for seed in range(DRAWS):
        expected, expected_state = seeded(plain, image, seed)
        found, state = seeded(tagged, image, seed)
        assert found.image.equal(expected)
        assert state.equal(expected_state)


@pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)
def test_every_group_but_clean_is_drawn(make, image):
    tagged = TagOperations(make())
    torch.manual_seed(0)
    seen = {tagged(image).group for _ in range(4 * DRAWS)}
    assert seen == set(range(1, len(tagged.group_names)))
    assert tagged.group_names[:2] == ("clean", "Identity")
    assert len(set(tagged.group_names)) == len(tagged.group_names)


@pytest.mark.parametrize("make", [v2.TrivialAugmentWide, lambda: v2.RandAugment(num_ops=1)])
def test_applying_the_tagged_operation_alone_gives_the_image(make, image):
    tagged = TagOperations(make())
    by_hand = {
        "Identity": lambda _: image,
        "Rotate": lambda degrees: v2.functional.rotate(image, degrees),
        "Brightness": lambda by: v2.functional.adjust_brightness(image, 1 + by),
        "Posterize": lambda bits: v2.functional.posterize(image, int(bits)),
        "Equalize": lambda _: v2.functional.equalize(image),
    }
    torch.manual_seed(0)
    checked = set()
    for _ in range(DRAWS):
        found = tagged(image)
        name = tagged.group_names[found.group]
        if name in by_hand:
            assert found.image.equal(by_hand[name](found.magnitude)), name
            checked.add(name)
    assert checked == set(by_hand)


def test_group_of_two_operations_is_either_but_not_the_identity(image):
    tagged = TagOperations(v2.RandAugment(num_ops=2))
    torch.manual_seed(0)
    first_chosen = both = 0
    for _ in range(600):
        found = tagged(image)
        first, last = found.operations
        chosen = (tagged.group_names[found.group], found.magnitude)
        if "Identity" in {first[0], last[0]}:
            assert chosen == (last if first[0] == "Identity" else first)
        else:
            assert chosen in found.operations
            both += first != last
            first_chosen += chosen == first != last
    assert first_chosen / both == pytest.approx(0.5, abs=0.08)


def test_autoaugment_that_applies_nothing_is_the_identity(image):
    tagged = TagOperations(v2.AutoAugment())
    torch.manual_seed(0)
    untouched = [found for found in (tagged(image) for _ in range(DRAWS)) if not found.operations]
    assert untouched
    assert all(found.image.equal(image) and found.group == 1 for found in untouched)


def test_a_used_transform_can_be_sent_to_loader_workers(image):
    tagged = TagOperations(v2.TrivialAugmentWide())
    tagged(image)
    copy = pickle.loads(pickle.dumps(tagged))
    torch.manual_seed(1)
    expected = tagged(image)
    torch.manual_seed(1)
    assert copy(image).image.equal(expected.image)


def test_an_error_inside_the_transform_leaves_it_usable(image):
    tagged = TagOperations(v2.TrivialAugmentWide())
    with pytest.raises(TypeError):
        tagged("not an image")
    assert tagged(image).group > 0


def test_other_transforms_are_refused():
    with pytest.raises(TypeError, match=r"'RandAugment', .* but got `AugMix`.*group 1"):
        TagOperations(v2.AugMix())


def test_names_of_augmentations_without_tags():
    assert group_names_of(None) == ("clean",)
    assert group_names_of(v2.RandomHorizontalFlip()) == ("clean", "RandomHorizontalFlip")


def test_batches_carry_the_operation_of_every_augmented_row():
    data = MedMNISTDataModule(batch_size=200, augmentation="trivialaugment")
    data.setup("fit")
    names = data.saflex_group_names()
    batch = next(iter(data.train_dataloader()))
    assert batch.group[~batch.augmented].eq(0).all()
    assert set(batch.group[batch.augmented].tolist()) == set(range(1, len(names)))
    same = (batch.inputs[200:] == batch.inputs[:200]).flatten(1).all(1)
    identity = batch.group[200:] == names.index("Identity")
    assert same[identity].all()
    assert identity.sum() > 5
    assert not same[batch.group[200:] == names.index("Rotate")].all()


class TestMixing:
    def test_groups_are_equal_bins_of_the_foreign_share(self):
        kept = torch.linspace(0, 1, 1001)
        groups = mixing_group(kept, 5)
        assert groups[kept == 1].tolist() == [1]
        assert groups[kept == 0].tolist() == [5]
        assert groups.diff().le(0).all()
        assert groups.bincount(minlength=6)[1:].tolist() == pytest.approx([200] * 5, abs=2)

    def test_names_fit_the_groups(self):
        assert mixing_group_names("cutmix", 3) == (
            "clean",
            "cutmix_0_33",
            "cutmix_33_67",
            "cutmix_67_100",
        )

    @pytest.mark.parametrize(
        "call", [lambda: mixing_group(torch.ones(2), 0), lambda: mixing_group_names("mixup", 0)]
    )
    def test_no_bins(self, call):
        with pytest.raises(ValueError, match="`num_bins` to be a positive integer, but got 0"):
            call()
