"""Upstream augmentations by name: every one on grey and colour images, alone or below a batch."""

import pytest
import torch
import torch.nn.functional as F
from helpers.standins import write_medmnist
from torchvision.transforms import v2

from saflex_lightning.data.draws import seeded_draws
from saflex_lightning.data.union import group_names_of
from saflex_lightning.recipes import MedMNISTDataModule
from saflex_lightning.recipes.images import normalize

IMAGE_AUGMENTATIONS = (
    *("randaugment", "trivialaugment", "autoaugment", "augmix", "crop", "soft_crop"),
)
MIXINGS = ("mixup", "cutmix")
SETTINGS = {"crop": {"size": 28, "padding": 4}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("medmnist")
    write_medmnist(folder, "blood")
    write_medmnist(folder, "oct")
    return folder


def first_batch(folder, augmentation, *, dataset="blood", epoch=0, size=32, **settings):
    settings = {"augmentation_settings": SETTINGS.get(augmentation), **settings}
    data = MedMNISTDataModule(
        dataset,
        root=str(folder),
        check_md5=False,
        augmentation=augmentation,
        batch_size=size,
        **settings,
    )
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return next(iter(loader)), data


@pytest.mark.parametrize("dataset", ["blood", "oct"])
@pytest.mark.parametrize("augmentation", [*IMAGE_AUGMENTATIONS, *MIXINGS])
def test_rows_are_augmented_by_draws_of_seed_epoch_and_row_alone(folder, augmentation, dataset):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batch, data = first_batch(folder, augmentation, dataset=dataset)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    again, _ = first_batch(folder, augmentation, dataset=dataset, num_workers=1)
    assert all(one.equal(other) for one, other in zip(batch, again, strict=True))
    assert not batch.inputs[32:].equal(batch.inputs[:32])
    assert batch.inputs.min() >= -1
    assert batch.inputs.max() <= 1
    assert batch.group[32:].min() >= 1
    assert batch.group.max() < len(data.saflex_group_names())
    soft = augmentation in {"soft_crop", *MIXINGS}
    assert batch.target.ndim == (2 if soft else 1)
    if soft:
        torch.testing.assert_close(batch.target.sum(-1), torch.ones(64))
        assert batch.target[:32].max(-1).values.eq(1).all()


@pytest.mark.parametrize("augmentation", ["crop", "soft_crop", *MIXINGS])
def test_replace_holds_the_augmented_rows_of_the_union(folder, augmentation):
    union, _ = first_batch(folder, augmentation)
    batch, _ = first_batch(folder, augmentation, batch="replace")
    for name in ("inputs", "target", "augmented", "group", "index"):
        assert getattr(batch, name).equal(getattr(union, name)[32:]), name


def test_mixup_is_a_weighted_mean_of_neighbours(folder):
    shares = set()
    for epoch in range(3):
        batch, data = first_batch(folder, "mixup", epoch=epoch)
        clean, labels = batch.inputs[:32], batch.target[:32]
        differ = labels.argmax(-1) != labels.roll(1, 0).argmax(-1)
        share = batch.target[32:][differ].gather(-1, labels[differ].argmax(-1, keepdim=True))[0]
        shares.add(share.item())
        mixed = share * clean + (1 - share) * clean.roll(1, 0)
        torch.testing.assert_close(batch.inputs[32:], mixed)
        soft = share * labels + (1 - share) * labels.roll(1, 0)
        torch.testing.assert_close(batch.target[32:], soft)
        assert batch.group[32:].unique().tolist() == [int((1 - share) * 4) + 1]
        assert data.saflex_group_names()[1] == "mixup_0_25"
    assert len(shares) == 3  # every epoch draws anew


def test_cutmix_mixes_labels_by_area(folder):
    batch, _ = first_batch(folder, "cutmix")
    clean, cut = batch.inputs[:32], batch.inputs[32:]
    own = (cut == clean).all(1)
    foreign = (cut == clean.roll(1, 0)).all(1)
    assert (own | foreign).all()
    share = own.float().mean((1, 2))
    labels = batch.target[:32]
    expected = share[:, None] * labels + (1 - share[:, None]) * labels.roll(1, 0)
    torch.testing.assert_close(batch.target[32:], expected, atol=1e-3, rtol=0)
    foreign_share = 1 - share.min().item()  # one box for the whole batch
    assert batch.group[32:].unique().tolist() == [int(foreign_share * 4) + 1]


def test_one_row_is_mixed_with_itself(folder):
    batch, _ = first_batch(folder, "mixup", size=1)
    torch.testing.assert_close(batch.inputs[1], batch.inputs[0])
    torch.testing.assert_close(batch.target[1], batch.target[0])
    assert batch.group.tolist() == [0, 1]


def test_settings_reach_the_transform(folder):
    strong, _ = first_batch(folder, "randaugment", augmentation_settings={"magnitude": 30})
    weak, _ = first_batch(folder, "randaugment", augmentation_settings={"magnitude": 0})
    moved = [F.l1_loss(batch.inputs[32:], batch.inputs[:32]) for batch in (weak, strong)]
    assert moved[0] < moved[1]


@pytest.mark.parametrize("policy", ["imagenet", "cifar10", "svhn"])
def test_autoaugment_is_torchvisions_own_of_that_policy(folder, policy):
    settings = {"augmentation_settings": {"policy": policy}}
    batch, data = first_batch(folder, "autoaugment", **settings)
    plain = v2.AutoAugment(v2.AutoAugmentPolicy(policy))
    for row, image in zip(batch.index[:32].tolist(), batch.inputs[32:], strict=True):
        with seeded_draws(data.seed, 0, row):
            assert image.equal(normalize(plain(data._train.rows.images[row])))
    assert data.saflex_group_names() == group_names_of(plain)


def test_unknown_policy_is_named():
    with pytest.raises(ValueError, match="'food' is not a valid AutoAugmentPolicy"):
        MedMNISTDataModule(augmentation="autoaugment", augmentation_settings={"policy": "food"})


@pytest.mark.parametrize(
    ("augmentation", "setting", "message"),
    [
        (
            "randaugment",
            {"num_ops": "2"},
            r"\.num_ops` to be a non-negative integer, but got '2'",
        ),
        (
            "randaugment",
            {"num_ops": True},
            r"\.num_ops` to be a non-negative integer, but got True",
        ),
        ("randaugment", {"magnitude": 31}, "to fit 'randaugment', but got {'magnitude': 31}"),
        ("randaugment", {"magnitude": -1}, r"\.magnitude` to be a non-negative integer, but"),
        (
            "trivialaugment",
            {"num_magnitude_bins": 0.5},
            r"_bins` to be a non-neg.* integer, .* 0\.5",
        ),
        ("augmix", {"severity": 11}, "to fit 'augmix', but got {'severity': 11}"),
        ("augmix", {"all_ops": 1}, r"\.all_ops` to be True or False, but got 1"),
        ("mixup", {"alpha": float("nan")}, r"\.alpha` to be a positive number, but got nan"),
        ("cutmix", {"alpha": -1.0}, r"\.alpha` to be a positive number, but got -1\.0"),
        ("soft_crop", {"sigma": 0.0}, r"\.sigma` to be a positive number, but got 0\.0"),
        ("crop", {"padding": 4}, "to fit 'crop', but got {'padding': 4}"),
        ("none", [1], r"`augmentation_settings` to be a mapping .* but got \[1\]"),
    ],
)
def test_settings_are_refused_before_anything_is_read(augmentation, setting, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MedMNISTDataModule(path="nowhere", augmentation=augmentation, augmentation_settings=setting)


@pytest.mark.parametrize("augmentation", ["randaugment", "soft_crop", "mixup"])
def test_unknown_setting_is_named(augmentation):
    message = rf"`augmentation_settings` to fit '{augmentation}', but got {{'strength': 1}} \(.*"
    with pytest.raises(TypeError, match=message):
        MedMNISTDataModule(augmentation=augmentation, augmentation_settings={"strength": 1})


def test_names_of_groups(folder):
    assert MedMNISTDataModule(augmentation="none").saflex_group_names() == ("clean",)
    assert MedMNISTDataModule(augmentation="augmix").saflex_group_names() == ("clean", "AugMix")
    names = MedMNISTDataModule(augmentation="soft_crop").saflex_group_names()
    assert names == ("clean", "SoftCrop")


def test_augmentation_that_changes_the_size_is_refused(folder):
    with pytest.raises(ValueError, match=r"shape \(3, 28, 28\) .* made \(3, 14, 14\)\. Set `size`"):
        first_batch(folder, "crop", augmentation_settings={"size": 14})


def test_batches_of_another_kind_are_refused(folder):
    with pytest.raises(ValueError, match=r"`batch` to be one of \['replace', 'union'\], but got"):
        first_batch(folder, "crop", batch="replaced")
