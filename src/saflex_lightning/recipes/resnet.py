"""ResNet-18 with a stem for ordinary or for small images."""

from typing import Literal, get_args

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from saflex_lightning.data.checks import check

__all__ = ["ResNet18"]

Stem = Literal["7x7", "3x3"]


class ResNet18(ResNet):
    """torchvision's ResNet-18 without pretrained weights.

    Args:
        num_classes: Number of logits.
        in_channels: 1 for grey images, 3 for colour.
        stem: ``"7x7"`` is torchvision's own (convolution of stride 2 and a max-pool: a 28-pixel
            image is 7x7 before the first block); ``"3x3"`` has a convolution of stride 1 and no
            max-pool, as the MedMNIST protocol has it, and costs about seven times as much.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If the stem is unknown, or a size is not positive.
    """

    def __init__(self, num_classes: int, in_channels: int, *, stem: Stem = "7x7") -> None:
        check("a positive integer", num_classes=num_classes, in_channels=in_channels)
        check(get_args(Stem), stem=stem)
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        if stem == "3x3":
            self.conv1 = nn.Conv2d(in_channels, 64, 3, stride=1, padding=1, bias=False)
            self.maxpool = nn.Identity()  # type: ignore[assignment] (any module serves)
        else:
            self.conv1 = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        # Convolutions follow the layout of their weights; on a CPU this halves the forward pass.
        self.to(memory_format=torch.channels_last)
