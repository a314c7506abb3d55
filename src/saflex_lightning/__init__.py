"""SAFLEX for PyTorch Lightning: learned sample weights and soft labels for augmented data."""

from .batch import AugmentedBatch
from .callback import SAflexCallback
from .engines import UnsupportedModelError
from .fit.report import SAflexWarning
from .functional.contrastive import gather_rows
from .functional.solve import SAflexSolution
from .insight.callback import SAflexInsight
from .module import SAflexMixin

__all__ = [
    "AugmentedBatch",
    "SAflexCallback",
    "SAflexInsight",
    "SAflexMixin",
    "SAflexSolution",
    "SAflexWarning",
    "UnsupportedModelError",
    "gather_rows",
]
