"""SAFLEX for PyTorch Lightning: learned sample weights and soft labels for augmented data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

# Imported when it is asked for: `--help` of a command needs neither torch nor Lightning.
_HOMES = {
    "AugmentedBatch": ".batch",
    "SAflexCallback": ".callback",
    "SAflexInsight": ".insight.callback",
    "SAflexMixin": ".module",
    "SAflexSolution": ".functional.solve",
    "SAflexWarning": ".fit.report",
    "UnsupportedModelError": ".engines",
    "gather_rows": ".functional.contrastive",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
