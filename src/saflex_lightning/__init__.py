"""SAFLEX for PyTorch Lightning: learned sample weights and soft labels for augmented data."""

from .batch import AugmentedBatch
from .callback import SAflexCallback, SAflexWarning
from .engines import UnsupportedModelError
from .functional import SAflexSolution
from .gather import gather_rows
from .mixin import SAflexMixin

__all__ = [
    "AugmentedBatch",
    "SAflexCallback",
    "SAflexMixin",
    "SAflexSolution",
    "SAflexWarning",
    "UnsupportedModelError",
    "gather_rows",
]
