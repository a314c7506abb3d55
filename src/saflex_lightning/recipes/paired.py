"""Batches of real images and of the generated ones that were made from them."""

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from saflex_lightning import AugmentedBatch
from saflex_lightning.data import ResumableLoader
from saflex_lightning.data.draws import mix_seeds
from saflex_lightning.data.resumable import ResumableSampler
from saflex_lightning.recipes.datamodule import check_batch_size, process_share
from saflex_lightning.recipes.folders import FileImages
from saflex_lightning.recipes.images import Split, normalize
from saflex_lightning.recipes.pool import Pool, draw_pool

__all__ = ["MixedImages", "PairedBatches", "make_paired_loader"]


class MixedImages(Dataset[AugmentedBatch]):
    """Real and generated images; an item is a whole batch, addressed by a list of rows.

    Row numbers below the number of training images are those; the generated ones follow. They are
    ``AugmentedBatch.index``, so they name an image across epochs and whatever subset was drawn.

    Args:
        real: Training images.
        pool: Generated images.
        image_size: See `FileImages`.
    """

    def __init__(self, real: Split, pool: Pool, image_size: int | None) -> None:
        self.images = real.images.join(FileImages(pool.files, image_size))
        self.group_names = pool.group_names
        self.num_real = len(real.target)
        clean = torch.zeros(self.num_real, dtype=torch.int64)
        self.target = torch.cat([real.target, pool.target])
        self.group = torch.cat([clean, pool.group])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: list[int]) -> AugmentedBatch:
        index = torch.tensor(rows)
        return AugmentedBatch(
            inputs=normalize(torch.stack([self.images[row] for row in rows])),
            target=self.target[index],
            augmented=index >= self.num_real,
            group=self.group[index],
            index=index,
        )


class PairedBatches(ResumableSampler):
    """Rows of training batches: shuffled clean rows, and behind them generated ones.

    A generated row is in the batch of the clean row it was made from; those without a source are
    shared out evenly. So the number of batches is that of the clean rows alone. A pass can begin at
    any of its batches.

    Args:
        rows: Numbers of the training images in use.
        num_real: Number of all training images, where the numbers of generated ones begin.
        pool: Generated images.
        wanted: See `draw_pool`.
        usable: See `draw_pool`; images whose source is not in use are left out too.
        shares: Share of its draws from the pool that use each generated image, ``(n,)``; 1 and
            more is all of them. None uses all alike.
        redraw: Draw from the pool in each epoch anew.
        batch: ``"union"`` keeps the clean rows; ``"replace"`` leaves out those that a generated
            row was made from.
        batch_size: Clean rows per batch and process.
        trainer: As for `make_train_loader`.
        seed: Seed of the order and of the draw.

    Raises:
        ValueError: If a process has fewer clean rows than a batch.
    """

    def __init__(
        self,
        rows: list[int],
        num_real: int,
        pool: Pool,
        wanted: Tensor,
        *,
        usable: Tensor,
        shares: Tensor | None = None,
        redraw: bool,
        batch: Literal["union", "replace"],
        batch_size: int,
        trainer: L.Trainer | None,
        seed: int,
    ) -> None:
        share = process_share(trainer)
        check_batch_size(batch_size, len(rows) // share["num_replicas"])
        super().__init__(
            rows,
            num_replicas=share["num_replicas"],
            rank=share["rank"],
            seed=mix_seeds(seed),  # it adds the epoch: keep neighbouring seeds' orders apart
        )
        self.rows = rows
        self.num_real = num_real
        self.pool = pool
        self.wanted = wanted
        self.redraw = redraw
        self.batch = batch
        self.batch_size = batch_size
        used = set(rows)
        sources = pool.source.tolist()
        known = torch.tensor([source < 0 or source in used for source in sources])
        self.usable = usable & known
        self.shares = shares

    def __len__(self) -> int:
        return self.num_samples // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the batches of one pass but the first `start`, which counts for this pass only."""
        start, self.start = self.start, 0
        rows = [self.rows[place] for place in super().__iter__()]
        pairs, free = self._share_out()
        steps = len(self)
        for step in range(start, steps):
            clean = rows[step * self.batch_size : (step + 1) * self.batch_size]
            made = [generated for row in clean for generated in pairs.get(row, ())]
            made += free[step * len(free) // steps : (step + 1) * len(free) // steps]
            if self.batch == "replace":
                clean = [row for row in clean if row not in pairs]
            yield [*clean, *made]

    def _share_out(self) -> tuple[dict[int, list[int]], list[int]]:
        """Return this epoch's generated rows by source, and this process's rows without one."""
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, self.epoch))
        drawn = draw_pool(
            self.pool,
            self.wanted,
            usable=self.usable,
            seed=mix_seeds(self.seed, self.epoch if self.redraw else 0),
        )
        if self.shares is not None:  # none takes the place of those that are left out
            drawn = drawn[torch.rand(len(drawn), generator=generator) < self.shares[drawn]]
        sources = self.pool.source[drawn]
        pairs: dict[int, list[int]] = defaultdict(list)
        for source, place in zip(sources.tolist(), drawn.tolist(), strict=True):
            pairs[source].append(self.num_real + place)
        free = pairs.pop(-1, [])
        order = torch.randperm(len(free), generator=generator)
        mine = order[self.rank :: self.num_replicas].tolist()
        return pairs, [free[place] for place in mine]


def make_paired_loader(
    images: MixedImages, batches: PairedBatches, *, trainer: L.Trainer | None, **options: Any
) -> DataLoader[AugmentedBatch]:
    """Return a loader of training images with those that were generated from them.

    An item of the sampler is a list of rows, and an item of the dataset their batch. With
    ``overfit_batches`` the first batches come again in every epoch.
    """
    if getattr(trainer, "overfit_batches", 0):
        # Lightning then takes items 0, 1, ... in every epoch: let those be batches.
        return DataLoader(Subset(images, cast("list[int]", list(batches))), None, **options)
    return ResumableLoader(images, None, sampler=batches, **options)
