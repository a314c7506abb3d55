"""Soft Augmentation: shifts, what they leave to see, and what that makes of the label."""

import pytest
import torch

from saflex_lightning.recipes import MedMNISTDataModule
from saflex_lightning.recipes.soft_crop import SoftCrop, crop_confidence, shift


@pytest.mark.parametrize(
    ("visible", "num_classes", "power", "expected"),
    [
        (1.0, 8, 2.0, 1.0),  # nothing is lost
        (0.0, 8, 2.0, 0.125),  # chance
        (0.5, 2, 1.0, 0.75),  # 1 - 1/2 * 1/2
        (0.5, 4, 2.0, 0.8125),  # 1 - 3/4 * 1/4
        (0.75, 5, 2.0, 0.95),  # 1 - 4/5 * 1/16
        (0.3, 1, 2.0, 1.0),  # one class is certain
    ],
)
def test_confidence_by_hand(visible, num_classes, power, expected):
    assert crop_confidence(visible, num_classes, power=power) == pytest.approx(expected)


def test_target_by_hand():
    target = SoftCrop(4).target(2, 0.5)
    assert target.tolist() == pytest.approx([0.0625, 0.0625, 0.8125, 0.0625])
    weighted = SoftCrop(4, reweight=True).target(2, 0.5)
    assert weighted.tolist() == pytest.approx([0.8125 * value for value in target.tolist()])
    assert SoftCrop(1).target(0, 0.2).tolist() == [1.0]


@pytest.mark.parametrize(("down", "right"), [(2, 1), (-2, 1), (2, -1), (-1, -3), (0, 0), (5, 4)])
def test_shift_pixel_by_pixel(down, right):
    image = torch.arange(2 * 5 * 4, dtype=torch.uint8).reshape(2, 5, 4)
    moved = shift(image, down, right)
    for row in range(5):
        for column in range(4):
            pixel = moved[:, row, column]
            if 0 <= row - down < 5 and 0 <= column - right < 4:
                assert pixel.equal(image[:, row - down, column - right])
            else:
                assert (pixel.float() - 127.5).abs().max() < 10  # grey, deviation 1.3


def test_offsets_are_gaussian_inside_the_image_and_the_label_follows():
    crop = SoftCrop(3, sigma=0.375)
    image = torch.full((1, 28, 28), 255, dtype=torch.uint8)
    offsets = torch.tensor([crop._draw_offset(28) for _ in range(2000)]).float()
    assert offsets.abs().max() <= 28
    assert offsets.mean().item() == pytest.approx(0.0, abs=0.7)
    # A normal of deviation 10.5 cut at 28 and rounded towards zero.
    assert offsets.std().item() == pytest.approx(9.85, abs=0.5)
    for _ in range(50):
        moved, target = crop(image, 1)
        visible = (moved > 200).float().mean().item()
        assert target[1].item() == pytest.approx(crop_confidence(visible, 3))
        assert target.sum().item() == pytest.approx(1.0)


def test_small_sigma_never_leaves_the_image():
    assert SoftCrop(3, sigma=1e-3)._draw_offset(28) == 0


@pytest.mark.parametrize("setting", ["sigma", "power"])
def test_settings_must_be_positive(setting):
    with pytest.raises(ValueError, match=f"`{setting}` to be a positive number, but got 0.0"):
        SoftCrop(3, **{setting: 0.0})


@pytest.mark.parametrize("batch", ["union", "replace"])
def test_rows_of_a_batch(batch):
    data = MedMNISTDataModule(
        augmentation="soft_crop",
        augmentation_settings={"reweight": True},
        batch=batch,
        batch_size=16,
    )
    data.setup("fit")
    rows = next(iter(data.train_dataloader()))
    soft = rows.target[rows.augmented]
    label_probability = soft.max(-1).values / soft.sum(-1)
    torch.testing.assert_close(soft.sum(-1), label_probability)  # p weighs a row of sum 1
    clean = rows.target[~rows.augmented]
    assert clean.sum(-1).eq(1).all()
    assert clean.max(-1).values.eq(1).all()
