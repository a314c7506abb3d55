"""Image folders and a pool of generated images as a Lightning datamodule."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from saflex_lightning import AugmentedBatch, SAflexWarning
from saflex_lightning.data.checks import check
from saflex_lightning.data.draws import mix_seeds
from saflex_lightning.recipes.augment import AugmentationName
from saflex_lightning.recipes.datamodule import Splits
from saflex_lightning.recipes.folders import (
    ClassFolders,
    FileImages,
    check_images,
    read_class_folders,
)
from saflex_lightning.recipes.image_data import ImageDataModule
from saflex_lightning.recipes.images import ImageRows, Split
from saflex_lightning.recipes.label_noise import plant_wrong_labels
from saflex_lightning.recipes.paired import MixedImages, PairedBatches, make_paired_loader
from saflex_lightning.recipes.pool import Pool, read_pool

__all__ = ["GeneratedDataModule"]

_NOISE = 1  # keeps the draw of wrong labels apart from the others of the same seed
GroupBy = Literal["prompt", "generator"]
PerClass = Literal["all", "extra", "real"]


class GeneratedDataModule(ImageDataModule):
    """Image folders with a pool of generated images as the upstream augmentation.

    ``{root}/train``, ``{root}/val`` and ``{root}/test`` hold one folder per class. For the layout
    of the pool see `read_pool`; ``saflex-generate`` makes one. A generated image is in the batch of
    the training image it was made from; in place of it with ``batch="replace"``, and what was made
    from images that steer is not trained on either.

    Args:
        root: Folder of the real images.
        generated: Folder of the generated ones; needed for ``augmentation="generated"``.
        num_classes: Number of class folders there must be; None skips the check.
        image_size: Side in pixels to resize all images to; None asks for one size.
        has_sources: Whether generated images were made from training images; see `read_pool`.
        group_by: What a group is; see `read_pool`.
        allow_outside: Whether files of the pool may lie outside of its folder; see `read_pool`.
        per_class: How many generated images of a class are used: ``"all"``, as many as
            ``{root}/extra`` holds (the images a generator is to stand in for), or
            ``generated_per_real`` for each training image (``"real"``).
        generated_per_real: For ``per_class="real"``: generated images per training image.
        redraw: Draw them anew in each epoch; otherwise they are the same in all.
        label_noise: Share of the generated images that get a wrong label on purpose, in [0, 1), to
            measure how well it is found; see `plant_wrong_labels`.
        drop_wrong: Leave those out, as a perfect filter would.
        augmentation: ``"generated"``, or an upstream augmentation that needs no pool.
        augmentation_settings: Keyword values of the transform of that one; None keeps its
            defaults.
        batch_size: As for `UnionDataModule`.
        **shared: As for `UnionDataModule`.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range, or settings contradict each other.
    """

    def __init__(
        self,
        root: str,
        generated: str | None = None,
        *,
        num_classes: int | None = None,
        image_size: int | None = 224,
        has_sources: bool = True,
        group_by: GroupBy = "prompt",
        allow_outside: bool = False,
        per_class: PerClass = "all",
        generated_per_real: float = 1.0,
        redraw: bool = False,
        label_noise: float = 0.0,
        drop_wrong: bool = False,
        augmentation: Literal["generated"] | AugmentationName = "generated",
        augmentation_settings: dict[str, Any] | None = None,
        batch_size: int = 128,
        **shared: Any,
    ) -> None:
        pooled = augmentation == "generated"
        super().__init__(
            augmentation="none" if pooled else augmentation,
            augmentation_settings=augmentation_settings,
            batch_size=batch_size,
            **shared,
        )
        check("a path", root=root)
        check("a path", optional=True, generated=generated)
        check(get_args(GroupBy), group_by=group_by)
        check(get_args(PerClass), per_class=per_class)
        check("True or False", has_sources=has_sources, allow_outside=allow_outside)
        check("True or False", redraw=redraw, drop_wrong=drop_wrong)
        check("a positive integer", optional=True, num_classes=num_classes, image_size=image_size)
        check("a positive number", generated_per_real=generated_per_real)
        check("a number in [0, 1)", label_noise=label_noise)
        if pooled and generated is None:
            raise ValueError(
                "Expected `generated` to name the folder of generated images, but got None. Make "
                "one with `saflex-generate`, or set `augmentation` to none."
            )
        if pooled and self.batch == "replace" and not has_sources:
            raise ValueError(
                "Expected `batch`='union' for generated images without sources, but got "
                "'replace': there is no telling which clean rows they replace. Choose union."
            )
        self.root = root
        self.generated = generated
        self.num_classes = num_classes
        self.image_size = image_size
        self.has_sources = has_sources
        self.group_by: GroupBy = group_by
        self.allow_outside = allow_outside
        self.per_class = per_class
        self.generated_per_real = generated_per_real
        self.redraw = redraw
        self.label_noise = label_noise
        self.drop_wrong = drop_wrong
        self.pooled = pooled

    def make_splits(self) -> Splits:
        """List all images and look at their heads."""
        root = Path(self.root).expanduser()
        real = read_class_folders(root / "train", num_classes=self.num_classes)
        val, test = (read_class_folders(root / name, real.classes) for name in ("val", "test"))
        self.classes = real.classes
        files = [*real.files, *val.files, *test.files]
        if self.pooled:
            self._pool = self._read_pool(real)
            files += self._pool.files
        check_images(files, same_size=self.image_size is None)
        train, *others = (
            Split(FileImages(folders.files, self.image_size), folders.target)
            for folders in (real, val, test)
        )
        return Splits(train, others[0], others[1:])

    def setup(self, stage: str) -> None:
        """Read the files once and count the generated images that are wanted."""
        first = not self._is_set_up
        super().setup(stage)
        if first and self.pooled:
            self._wanted = self._count_wanted()

    def sizes(self) -> dict[str, int]:
        """Return the number of classes and of channels; needs `setup`."""
        return {"num_classes": len(self.classes), "in_channels": 3}

    def saflex_class_names(self) -> Sequence[str]:
        """Return the names of the class folders, for `SAflexInsight`; needs `setup`."""
        return self.classes

    def _read_pool(self, real: ClassFolders) -> Pool:
        assert self.generated is not None
        pool = read_pool(
            Path(self.generated).expanduser(),
            real,
            has_sources=self.has_sources,
            group_by=self.group_by,
            allow_outside=self.allow_outside,
        )
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, _NOISE))
        given = plant_wrong_labels(pool.target, len(real.classes), self.label_noise, generator)
        self._wrong = given != pool.target
        return pool._replace(target=given)

    def _count_wanted(self) -> Tensor:
        found = self._pool.target[self._usable()].bincount(minlength=len(self.classes))
        if self.per_class == "all":
            return found
        if self.per_class == "extra":
            folder = Path(self.root).expanduser() / "extra"
            wanted = read_class_folders(folder, self.classes).target.bincount()
        else:
            wanted = self.class_counts().mul(self.generated_per_real).round().long()
        if (found < wanted).any():
            lacking = {
                self.classes[label]: f"{found[label]} of {wanted[label]}"
                for label in (found < wanted).nonzero().flatten().tolist()
            }
            rank_zero_warn(
                f"Expected as many generated images in {self.generated} as `per_class`="
                f"'{self.per_class}' asks for, but found only {lacking}. All there are will be "
                "used; make more with `saflex-generate`.",
                category=SAflexWarning,
            )
        return wanted

    def _usable(self) -> Tensor:
        return ~self._wrong if self.drop_wrong else torch.ones_like(self._wrong)

    def wrong_rows(self) -> Tensor | None:
        """Return which rows carry a planted label, by ``AugmentedBatch.index``; needs `setup`.

        Returns:
            ``(rows,)`` bool; None where no label was planted.
        """
        if not self.pooled or not self.label_noise:
            return None
        return torch.cat([torch.zeros(len(self._whole.target), dtype=torch.bool), self._wrong])

    def doubted_rows(self) -> ImageRows:
        """Return the images of the pool, or the training images where there is none."""
        if not self.pooled:
            return super().doubted_rows()
        return ImageRows(Split(FileImages(self._pool.files, self.image_size), self._pool.target))

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch.

        Raises:
            ValueError: If a batch asks for more images than a process has.
        """
        if not self.pooled:
            return super().train_dataloader()
        batches = PairedBatches(
            self._kept.tolist(),
            len(self._whole.target),
            self._pool,
            self._wanted,
            usable=self._usable(),
            shares=self.read_weights(
                len(self._pool.target),
                first_index=len(self._whole.target) - self.num_merged(),
                labels=self._pool.target,
            ),
            redraw=self.redraw,
            batch=self.batch,
            batch_size=self.batch_size,
            trainer=self.trainer,
            seed=self.seed,
        )
        images = MixedImages(cast("Split", self._whole), self._pool, self.image_size)
        return make_paired_loader(images, batches, trainer=self.trainer, **self.loader_options())

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for; needs `setup`."""
        return self._pool.group_names if self.pooled else super().saflex_group_names()
