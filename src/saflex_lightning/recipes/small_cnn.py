"""A small convolutional network for images of about 28 pixels, for few rows and little time."""

from itertools import pairwise

from torch import nn

from saflex_lightning.data.checks import check

__all__ = ["SmallCNN"]


class SmallCNN(nn.Sequential):
    """Three strided convolutions with batch normalisation, average pooling and a linear layer.

    Args:
        num_classes: Number of logits.
        in_channels: 1 for grey images, 3 for colour.
        width: Channels of the first convolution; each one has twice those of the one before.

    Raises:
        TypeError: If a size is no integer.
        ValueError: If it is not positive.
    """

    def __init__(self, num_classes: int, in_channels: int, *, width: int = 32) -> None:
        check("a positive integer", num_classes=num_classes, in_channels=in_channels, width=width)
        layers: list[nn.Module] = []
        for before, after in pairwise((in_channels, width, 2 * width, 4 * width)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(after), nn.ReLU()]
        encoder = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(encoder, nn.Linear(4 * width, num_classes))
