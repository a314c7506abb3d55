"""Soft Augmentation: a crop whose label is the less certain the less of the image it shows."""

import torch
from torch import Tensor

from saflex_lightning.data.checks import check

__all__ = ["SoftCrop", "crop_confidence"]

_TRIES = 100


def crop_confidence(visible: float, num_classes: int, *, power: float = 2.0) -> float:
    r"""Return the probability of the label when a share of the image is visible.

    .. math:: p(v) = 1 - (1 - 1/K) (1 - v)^k

    It is 1 for the whole image and chance, 1/K, for none of it.

    Args:
        visible: v, in [0, 1].
        num_classes: K.
        power: k, positive; the larger, the later the label fades.

    Returns:
        p, in [1/K, 1].

    Example:
        >>> crop_confidence(0.5, 4)
        0.8125

    References:
        Liu et al. 2023, "Soft Augmentation for Image Classification", section 3.
    """
    return 1.0 - (1.0 - 1.0 / num_classes) * (1.0 - visible) ** power


class SoftCrop:
    r"""Shift an image by a Gaussian offset and soften its label by the share that left the frame.

    Offsets are :math:`\mathrm{int}(\mathcal N(0, \sigma^2))` pixels in both directions, drawn
    again where they exceed the side of the image. What the shift uncovers becomes grey with a
    little noise. The other classes share what the label loses. Randomness comes from torch's
    global generator.

    Args:
        num_classes: K.
        sigma: Standard deviation of the offsets, fraction of the side; the authors' 12 pixels of
            32 are 0.375.
        power: k of `crop_confidence`.
        reweight: Scale the target by the label's probability, so that its entries sum to that and
            cross-entropy weighs the image by it, as the authors do. SAFLEX learns the weights
            itself and takes probabilities alone.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of range.

    References:
        Liu et al. 2023, "Soft Augmentation for Image Classification", section 3.
    """

    changes_label = True  # see `UnionDataset`

    def __init__(
        self,
        num_classes: int,
        *,
        sigma: float = 0.375,
        power: float = 2.0,
        reweight: bool = False,
    ) -> None:
        check("a positive integer", num_classes=num_classes)
        check("True or False", reweight=reweight)
        check("a positive number", sigma=sigma, power=power)
        self.num_classes = num_classes
        self.sigma = sigma
        self.power = power
        self.reweight = reweight

    def __call__(self, image: Tensor, label: int) -> tuple[Tensor, Tensor]:
        """Return the shifted image and its target.

        Args:
            image: ``(channels, height, width)`` uint8.
            label: Its class.

        Returns:
            The image, and ``(classes,)`` float32 that sums to 1, or to p with ``reweight``.
        """
        height, width = image.shape[-2:]
        down, right = self._draw_offset(height), self._draw_offset(width)
        visible = (height - abs(down)) * (width - abs(right)) / (height * width)
        return shift(image, down, right), self.target(label, visible)

    def target(self, label: int, visible: float) -> Tensor:
        """Return the target of an image of which a share is visible.

        Args:
            label: Class of the image.
            visible: v, in [0, 1].

        Returns:
            ``(classes,)`` float32.
        """
        confidence = crop_confidence(visible, self.num_classes, power=self.power)
        rest = (1.0 - confidence) / max(self.num_classes - 1, 1)
        target = torch.full((self.num_classes,), rest)
        target[label] = confidence
        return target * confidence if self.reweight else target

    def _draw_offset(self, side: int) -> int:
        draws = (torch.randn(_TRIES) * self.sigma * side).trunc().long()
        inside = draws[draws.abs() <= side]
        return int(inside[0]) if len(inside) else 0


def shift(image: Tensor, down: int, right: int) -> Tensor:
    """Return an image moved over a grey background.

    Args:
        image: ``(channels, height, width)`` uint8.
        down: Pixels, at most the height; negative moves it up.
        right: Pixels, at most the width; negative moves it left.

    Returns:
        An image of the same shape.
    """
    height, width = image.shape[-2:]
    moved = (127.5 * (1.0 + 0.01 * torch.randn(image.shape))).round().to(torch.uint8)
    rows = slice(max(down, 0), height + min(down, 0))
    columns = slice(max(right, 0), width + min(right, 0))
    from_rows = slice(max(-down, 0), height - max(down, 0))
    from_columns = slice(max(-right, 0), width - max(right, 0))
    moved[..., rows, columns] = image[..., from_rows, from_columns]
    return moved
