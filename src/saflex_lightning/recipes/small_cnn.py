"""A small convolutional network for images of about 28 pixels, for few rows and little time."""

from itertools import pairwise

from torch import nn

__all__ = ["SmallCNN", "make_small_encoder"]


def make_small_encoder(width: int = 32, in_channels: int = 3) -> nn.Sequential:
    """Return a small convolutional encoder for images of about 28 pixels.

    Args:
        width: Channels of the first of three convolutions; features are four times as many.
        in_channels: 1 for grey images, 3 for colour.
    """
    layers: list[nn.Module] = []
    sizes = (in_channels, width, 2 * width, 4 * width)
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
        layers += [nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class SmallCNN(nn.Sequential):
    """Three strided convolutions with batch normalisation, average pooling and a linear layer.

    Args:
        num_classes: Number of logits.
        in_channels: 1 for grey images, 3 for colour.
        width: Channels of the first convolution.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, *, width: int = 32) -> None:
        super().__init__(make_small_encoder(width, in_channels), nn.Linear(4 * width, num_classes))
