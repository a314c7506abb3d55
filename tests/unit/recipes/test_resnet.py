"""ResNet-18: stems and what they refuse."""

import pytest
import torch

from saflex_lightning.recipes import ResNet18


@pytest.mark.parametrize(
    ("stem", "in_channels", "feature_size"), [("7x7", 3, 7), ("7x7", 1, 7), ("3x3", 3, 28)]
)
def test_stem(stem, in_channels, feature_size):
    network = ResNet18(5, in_channels, stem=stem)
    images = torch.randn(2, in_channels, 28, 28)
    features = network.maxpool(network.conv1(images))
    assert features.shape == (2, 64, feature_size, feature_size)
    assert network(images).shape == (2, 5)
    deviation = (2.0 / (64 * network.conv1.kernel_size[0] ** 2)) ** 0.5
    assert network.conv1.weight.std().item() == pytest.approx(deviation, rel=0.1)


def test_unknown_stem():
    with pytest.raises(ValueError, match=r"`stem` to be one of \['3x3', '7x7'\], but got '5x5'"):
        ResNet18(5, 3, stem="5x5")
