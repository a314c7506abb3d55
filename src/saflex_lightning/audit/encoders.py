"""What makes scores of items where no network was trained: nothing here is learned from labels."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PatchEncoder", "TableEncoder"]

_SIDE, _PATCHES, _FILTERS, _POOLED = 6, 20_000, 64, 2
_AT_ONCE = 16  # images whose patches stay in the cache of a processor
_CONTRAST, _WHITENING, _THRESHOLD = 0.01, 0.1, 0.25


class PatchEncoder(nn.Module):
    """Features of small images: which patches and which colours their quarters have.

    Patches of the trusted images, normalised and whitened, are the filters; what they find is
    rectified and averaged over the quarters of an image, and so are the pixels.

    Args:
        images: Some of the trusted items, ``(n, channels, height, width)`` float, of 6 pixels or
            more.

    References:
        Coates, Lee and Ng 2011, "An analysis of single-layer networks in unsupervised feature
        learning"; Coates and Ng 2011, "The importance of encoding versus training".
    """

    filters: Tensor
    center: Tensor

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        patches = _patches(images).flatten(0, 1)
        patches = patches[torch.randint(len(patches), (_PATCHES,), generator=draws)]
        center = patches.mean(0)
        values, axes = torch.linalg.eigh(torch.cov(patches.T))
        whitening = axes * (values.clamp(min=0) + _WHITENING).rsqrt() @ axes.T
        filters = F.normalize((patches[:_FILTERS] - center) @ whitening, dim=1)
        self.register_buffer("center", center)
        self.register_buffer("filters", whitening @ filters.T)

    def forward(self, images: Tensor) -> Tensor:
        """Return features, ``(batch, 512 + 4 channels)``."""
        return torch.cat([self._encode(part) for part in images.split(_AT_ONCE)])

    def _encode(self, images: Tensor) -> Tensor:
        found = (_patches(images) - self.center) @ self.filters
        both = torch.cat([found - _THRESHOLD, -found - _THRESHOLD], 2).relu()
        height = images.shape[2] - _SIDE + 1
        maps = both.transpose(1, 2).unflatten(2, (height, -1))
        pooled = (F.adaptive_avg_pool2d(part, _POOLED).flatten(1) for part in (maps, images))
        return torch.cat(list(pooled), 1)


class TableEncoder(nn.Module):
    """Standardised numbers, and a column of 0 and 1 for each level.

    Args:
        cardinalities: Codes of each categorical column.
    """

    def __init__(self, cardinalities: list[int]) -> None:
        super().__init__()
        self.cardinalities = cardinalities

    def forward(self, numeric: Tensor, categorical: Tensor) -> Tensor:
        """Return features, ``(batch, columns)``."""
        codes = zip(categorical.unbind(1), self.cardinalities, strict=True)
        return torch.cat([numeric, *(F.one_hot(column, size) for column, size in codes)], 1)


def _patches(images: Tensor) -> Tensor:
    """Return all patches, of mean 0 and about the same contrast, ``(n, places, pixels)``."""
    patches = F.unfold(images, _SIDE).transpose(1, 2)
    patches = patches - patches.mean(2, keepdim=True)
    return patches * (patches.square().mean(2, keepdim=True) + _CONTRAST).rsqrt()
