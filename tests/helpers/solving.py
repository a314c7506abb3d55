"""The parts of a step as tests call them: settings as keywords, and ranks that are threads."""

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from saflex_lightning.engines import make_engine
from saflex_lightning.engines.direction import Direction
from saflex_lightning.engines.engine import Engine
from saflex_lightning.engines.untouched import untouched
from saflex_lightning.functional import solve as solve_with_settings
from saflex_lightning.functional import weighted_cross_entropy
from saflex_lightning.functional.losses import LossOptions, Scores
from saflex_lightning.functional.ranks import Ranks
from saflex_lightning.functional.settings import make_settings
from saflex_lightning.functional.solve import SAflexSolution

ALONE = Ranks()


def solve(
    jvp: Tensor,
    probs: Tensor,
    target: Tensor,
    augmented: Tensor | None = None,
    *,
    balance_classes: bool = True,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    generator: torch.Generator | None = None,
    ranks: Ranks = ALONE,
    **settings: Any,
) -> SAflexSolution:
    """Call `functional.solve` with fields of `Settings` and `LossOptions` as keywords.

    Other settings are those of the preset ``"gradient"``.
    """
    return solve_with_settings(
        jvp,
        probs,
        target,
        augmented,
        make_settings("gradient", **settings),
        balance_classes=balance_classes,
        options=LossOptions(class_weight, label_smoothing),
        generator=generator,
        ranks=ranks,
    )


def row_losses(logits: Tensor, soft_labels: Tensor, **options: Any) -> Tensor:
    """Return the loss of each row by itself, ``(batch,)``."""
    alone = torch.eye(len(logits), dtype=soft_labels.dtype)
    return torch.stack(
        [weighted_cross_entropy(logits, soft_labels, one, **options) for one in alone]
    )


def build_engine(name: str, model: nn.Module, run: Callable[[], Scores], **options: Any) -> Engine:
    """Build an engine by a pass in evaluation mode, and leave the model as it was."""
    with untouched(model):
        model.eval()
        return make_engine(name, model, run, **options)  # type: ignore[arg-type]


def val_gradient(
    engine: Engine,
    model: nn.Module,
    run: Callable[[], Scores],
    loss: Callable[[Scores], Tensor],
) -> tuple[Tensor, ...]:
    """Return the gradient of a loss in evaluation mode, and leave the model as it was."""
    with untouched(model):
        model.eval()
        return engine.gradient(run, loss)


def measure(
    engine: Engine, run: Callable[[], Scores], direction: Direction
) -> tuple[Scores, Scores]:
    """Do both halves of `Engine.jvp` around a training forward; return its scores and Z."""
    finish = engine.jvp(run, direction)
    try:
        scores = run()
    except BaseException:
        finish.close()
        raise
    return scores, finish.of(scores)


class Threads:
    """Ranks that are threads of this process and sum in lock-step."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=20)
        self.slots: list[Any] = [None] * size

    def run(self, work: Callable[[Ranks], Any]) -> list[Any]:
        """Return what ``work`` returns on each rank."""
        results: list[Any] = [None] * self.size

        def run(rank: int) -> None:
            try:
                results[rank] = work(ThreadRanks(self, rank))
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


class ThreadRanks(Ranks):
    """One of `Threads`."""

    def __init__(self, threads: Threads, rank: int) -> None:
        super().__init__(rank, threads.size)
        self.threads = threads

    def sum(self, tensor: Tensor) -> Tensor:
        threads = self.threads
        threads.slots[self.rank] = tensor
        threads.barrier.wait()
        total = torch.stack(threads.slots).sum(0)
        threads.barrier.wait()
        return total


def in_parts(sizes: Sequence[int], work: Callable[[slice, Ranks], Any]) -> list[Any]:
    """Let each rank work on its own rows of a batch; return the results in order."""
    edges = [slice(*edge) for edge in pairwise([0, *torch.tensor(sizes).cumsum(0).tolist()])]
    return Threads(len(sizes)).run(lambda ranks: work(edges[ranks.rank], ranks))
