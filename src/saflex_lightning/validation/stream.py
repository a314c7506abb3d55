"""Validation batches, drawn without end and seen as Lightning's own evaluation sees them.

Which rows a draw holds is a function of (seed, draw number, rank): every rank cuts its slice from
one endless sequence of permutations, so several processes together see the batch that one would
see, and a resumed run needs to remember nothing but how many batches were drawn.
"""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from saflex_lightning.engines.direction import whole_tensor
from saflex_lightning.engines.errors import UnsupportedModelError
from saflex_lightning.engines.untouched import untouched, untouched_generators
from saflex_lightning.functional.ranks import Ranks

from .source import is_plain

__all__ = ["EndlessBatchSampler", "ValidationStream", "evaluation", "mix_seed", "overrides"]

_CORE = ("lightning.pytorch.core", "pytorch_lightning.core")  # the package is published twice
_EVALUATION = 1  # keeps what an evaluation draws apart from what the loader draws


class ValidationStream:
    """Draw validation batches from one persistent dataloader, endlessly.

    A map-style dataset behind a plain sampler is drawn through `EndlessBatchSampler`, by a loader
    like the given one; any other loader (a weighted sampler, an iterable dataset, a list of
    batches) is repeated as it is, and what each rank sees is then up to that loader. From such a
    loader a resumed run first draws and drops what was drawn before. Drawing leaves the global
    random state alone.

    Args:
        loader: A dataloader, or any iterable of batches.
        batch_size: Rows per batch and process; None keeps the loader's own.
        seed: Seed of the order, the same on every rank.
        ranks: The processes that share a batch.
        start: Batches drawn before, by a run that this one resumes.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        *,
        batch_size: int | None = None,
        seed: int = 0,
        ranks: Ranks,
        start: int = 0,
    ) -> None:
        self.draws = start
        self.looks_at_parameters = True  # whether an evaluation compares them before and after
        self.ranks = ranks
        self._seed = seed
        self._loader: DataLoader[Any] | None = None
        if is_plain(loader):
            assert isinstance(loader, DataLoader)
            self._loader = _endless_loader(loader, batch_size, seed, ranks, start)
            with untouched_generators(mix_seed(seed, -1, ranks.rank)):
                self._iterator: Iterator[Any] | None = iter(self._loader)
            return
        if isinstance(loader, DataLoader):
            # Persistent workers serve one iterator at a time, and the Trainer's own is another.
            loader = self._loader = copy(loader)
            loader._iterator = None
        self._iterator = _repeat(loader)
        for number in range(start):  # only by going there can its place be found
            with untouched_generators(mix_seed(seed, number, ranks.rank)):
                next(self._iterator)

    def seed_of_draw(self, *numbers: int) -> int:
        """Return the seed of the next draw, or of something else that belongs to it."""
        return mix_seed(self._seed, self.draws, self.ranks.rank, *numbers)

    def draw(self) -> Any:
        """Return the next batch as the loader's collate function makes it."""
        if self._iterator is None:
            raise RuntimeError("Expected an open validation stream, but it was closed.")
        seed, self.draws = self.seed_of_draw(), self.draws + 1
        with untouched_generators(seed):
            return next(self._iterator)

    def close(self) -> None:
        """End the worker processes and let go of the loader."""
        if self._loader is not None:
            # Letting go is not enough: the traceback of a worker's error holds the iterator.
            CombinedLoader(self._loader).reset()
        self._loader = self._iterator = None


def _endless_loader(
    loader: DataLoader[Any], batch_size: int | None, seed: int, ranks: Ranks, start: int
) -> DataLoader[Any]:
    dataset: Any = loader.dataset
    sampler = EndlessBatchSampler(
        len(dataset), batch_size or loader.batch_size or 1, seed=seed, ranks=ranks, start=start
    )
    workers = loader.num_workers > 0
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=workers,
        generator=torch.Generator().manual_seed(mix_seed(seed, start)),
    )


def _repeat(loader: Iterable[Any]) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise MisconfigurationException(
                "Expected the validation dataloader of SAFLEX to yield batches, but it yielded "
                "none. Give it at least one row, and an iterable that can be iterated again."
            )


class EndlessBatchSampler(Sampler[list[int]]):
    """Yield this rank's rows of one shuffled pass after another, without end, from a draw on."""

    def __init__(
        self, num_rows: int, batch_size: int, *, seed: int, ranks: Ranks, start: int = 0
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.ranks = ranks
        self.start = start
        self._pass = -1
        self._order: list[int] = []

    def rows(self, draw: int) -> list[int]:
        """Return the rows of one draw; where one pass ends in it, it may hold a row twice."""
        first = (draw * self.ranks.size + self.ranks.rank) * self.batch_size
        return [self._row(position) for position in range(first, first + self.batch_size)]

    def __iter__(self) -> Iterator[list[int]]:
        return (self.rows(draw) for draw in itertools.count(self.start))

    def _row(self, position: int) -> int:
        number, place = divmod(position, self.num_rows)
        if number != self._pass:
            generator = torch.Generator().manual_seed(mix_seed(self.seed, number))
            self._order = torch.randperm(self.num_rows, generator=generator).tolist()
            self._pass = number
        return self._order[place]


def mix_seed(*numbers: int) -> int:
    """Return one seed in [0, 2**63), made from several numbers, such as (seed, step, rank)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return mixed


@contextmanager
def evaluation(
    trainer: pl.Trainer, module: pl.LightningModule, stream: ValidationStream
) -> Iterator[Any]:
    """Yield the next batch of a stream, where Lightning's own validation has it; then all is back.

    That is the stage, the module's mode by its own hooks, the default dtype and autocast of the
    precision plugin, and the batch on its device; random numbers come from the stream's seed.
    """
    seed, batch = stream.seed_of_draw(_EVALUATION), stream.draw()
    trainer.validating = True
    try:
        with untouched(module, seed), trainer.precision_plugin.val_step_context():
            # Each process has running statistics of its own until the next forward of `ddp`.
            stream.ranks.share_first(module.buffers())
            changed = _evaluate(module, look=stream.looks_at_parameters)
            stream.looks_at_parameters = bool(changed)
            try:
                yield move_batch(trainer, module, batch)
            finally:
                if overrides(module, "on_validation_model_train"):
                    module.on_validation_model_train()
                for part, name, value in changed:
                    vars(part)[name] = value
    finally:
        trainer.training = True


def _evaluate(module: pl.LightningModule, *, look: bool) -> list[tuple[nn.Module, str, Any]]:
    """Put a module in evaluation and return the attributes, with their values, that this changed.

    Raises:
        UnsupportedModelError: If a ``look`` shows that it changed a parameter.
    """
    parts = [(part, dict(vars(part))) for part in module.modules()] if look else []
    params = dict(module.named_parameters()) if look else {}
    before = [_size(parameter) for parameter in params.values()]
    module.on_validation_model_eval()
    for (name, parameter), size in zip(params.items(), before, strict=True):
        if _size(parameter) != size:
            module.train()
            raise UnsupportedModelError(
                f"Expected `eval()` to leave parameters as they are, but it changed `{name}`, as "
                "adapters do that merge their weights. The validation gradient would be that of "
                "others than the ones that are trained; switch merging off."
            )
    return [
        (part, name, value)
        for part, values in parts
        for name, value in values.items()
        if name != "training" and vars(part).get(name, values) is not value
    ]


def _size(parameter: Tensor) -> str:
    """Return the norm of a parameter in words, where NaN equals NaN."""
    return repr(whole_tensor(torch.linalg.vector_norm(parameter.detach())).item())


def move_batch(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Any:
    """Return a batch on the device, after the transfer hooks."""
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    hook = "on_before_batch_transfer"
    owner = datamodule if datamodule and overrides(datamodule, hook) else module
    batch = owner.on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), 0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def overrides(instance: object, name: str) -> bool:
    """Say whether a module or datamodule brings a method of its own in place of Lightning's."""
    if name in vars(instance):
        return True
    owners = (cls for cls in type(instance).__mro__ if name in vars(cls))
    owner = next(owners, None)
    return owner is not None and not owner.__module__.startswith(_CORE)
