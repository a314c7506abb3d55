"""Keep the few images that are doubted most."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saflex_lightning.batch import read_batch
from saflex_lightning.step import StepRows

from .collect import RowTable

__all__ = ["DoubtedImage", "DoubtedImages"]

_MOST_KEPT, _MOST_SHOWN = 64, 16


@dataclass(frozen=True)
class DoubtedImage:
    """An image and its row."""

    image: Tensor
    belief: float
    index: int
    given: int
    suggested: int


class DoubtedImages:
    """Images of the rows that are believed least: of every step one, of these at most 64.

    Images of this rank alone are kept; what is thought of their rows comes from all ranks.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._kept: dict[int, Tensor] = {}

    def add(self, batch: Any, rows: StepRows) -> None:
        """Take in a step, where its inputs are images of one or three channels."""
        if rows.beliefs is None or rows.index is None or rows.suggested is None:
            return
        images = _images_of(batch, len(rows.beliefs))
        if images is not None:
            beliefs = torch.where(rows.shown & (rows.suggested >= 0), rows.beliefs, torch.inf)
            row = beliefs.argmin().unsqueeze(0)  # stays on its device
            self._waiting.append((images[row][0], rows.index[row]))

    def flush(self, table: RowTable) -> None:
        """Choose among what waits; waits for the device."""
        for image, index in self._waiting:
            self._kept[int(index)] = image.float().cpu()
        self._waiting.clear()
        self._kept = {doubted.index: doubted.image for doubted in self.read(table, _MOST_KEPT)}

    def read(self, table: RowTable, most: int = _MOST_SHOWN) -> list[DoubtedImage]:
        """Return images whose newest label is doubted, the most doubted ones first."""
        found = [
            DoubtedImage(image, float(table.beliefs[place]), index, given, suggested)
            for index, image in self._kept.items()
            if (place := table.find(index)) is not None
            and (given := int(table.facts["label"][place]))
            != (suggested := int(table.facts["suggested"][place]))
        ]
        return sorted(found, key=lambda doubted: doubted.belief)[:most]


def _images_of(batch: Any, size: int) -> Tensor | None:
    try:
        inputs = read_batch(batch)[0]
    except TypeError:
        return None
    fits = isinstance(inputs, Tensor) and inputs.ndim == 4 and len(inputs) == size
    return inputs.detach() if fits and inputs.shape[1] in {1, 3} else None
