"""Keep the few images that are doubted most."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saflex_lightning.batch import read_batch
from saflex_lightning.step import StepRows

__all__ = ["DoubtedImage", "DoubtedImages"]

_MOST = 16


@dataclass(frozen=True)
class DoubtedImage:
    """An image and its row."""

    image: Tensor
    belief: float
    index: int
    given: int
    suggested: int


class DoubtedImages:
    """Of every step the row that is believed least; of these the 16 that are believed least.

    The newest visit of a row counts. Images of this rank alone are kept.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._kept: dict[int, DoubtedImage] = {}

    def add(self, batch: Any, rows: StepRows) -> None:
        """Take in a step, where its inputs are images of one or three channels."""
        target = rows.target
        if rows.beliefs is None or rows.index is None or rows.suggested is None or target is None:
            return
        images = _images_of(batch, len(rows.beliefs))
        if images is None:
            return
        beliefs = torch.where(rows.kept & (rows.suggested >= 0), rows.beliefs, torch.inf)
        row = beliefs.argmin().unsqueeze(0)  # stays on its device
        given = target.argmax(-1) if target.ndim == 2 else target
        labels = torch.cat([rows.index[row], given[row].long(), rows.suggested[row]])
        self._waiting.append((images[row][0], beliefs[row], labels))

    def flush(self) -> None:
        """Choose among what waits; waits for the device."""
        for image, belief, labels in self._waiting:
            index, given, suggested = labels.tolist()
            self._kept.pop(index, None)  # an older visit
            if given != suggested and belief.isfinite():
                image = image.float().cpu()
                self._kept[index] = DoubtedImage(image, belief.item(), index, given, suggested)
        self._waiting.clear()
        self._kept = {image.index: image for image in self.read()}

    def read(self) -> list[DoubtedImage]:
        """Return what is kept, the most doubted ones first."""
        return sorted(self._kept.values(), key=lambda image: image.belief)[:_MOST]


def _images_of(batch: Any, size: int) -> Tensor | None:
    try:
        inputs = read_batch(batch)[0]
    except TypeError:
        return None
    fits = isinstance(inputs, Tensor) and inputs.ndim == 4 and len(inputs) == size
    return inputs.detach() if fits and inputs.shape[1] in {1, 3} else None
