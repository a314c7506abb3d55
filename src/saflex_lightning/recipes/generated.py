"""Image folders and a pool of generated images as a Lightning datamodule."""

from pathlib import Path
from typing import Any, Literal, cast, get_args

import lightning as L
import torch
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from saflex_lightning import AugmentedBatch, SAflexWarning
from saflex_lightning.recipes.augment import (
    AugmentationName,
    augmentation_group_names,
    make_image_augmentation,
    make_mixing,
)
from saflex_lightning.recipes.batches import CleanImages
from saflex_lightning.recipes.data import split_stratified
from saflex_lightning.recipes.data_checks import (
    check_shares,
    check_sizes,
    check_steering,
)
from saflex_lightning.recipes.folders import (
    ClassFolders,
    FileImages,
    check_images,
    read_class_folders,
)
from saflex_lightning.recipes.label_noise import plant_wrong_labels
from saflex_lightning.recipes.loaders import (
    SteeringName,
    loader_options,
    make_image_loader,
    mix_seeds,
)
from saflex_lightning.recipes.medmnist import Split
from saflex_lightning.recipes.options import check_choice
from saflex_lightning.recipes.paired import MixedImages, PairedBatches, make_paired_loader
from saflex_lightning.recipes.pool import Pool, read_pool

__all__ = ["GeneratedDataModule"]

_NOISE = 1  # keeps the draw of wrong labels apart from the others of the same seed


class GeneratedDataModule(L.LightningDataModule):
    """Image folders with a pool of generated images as the upstream augmentation.

    ``{root}/train``, ``{root}/val`` and ``{root}/test`` hold one folder per class. For the layout
    of the pool see `read_pool`; ``saflex-generate`` makes one.

    Args:
        root: Folder of the real images.
        generated: Folder of the generated ones; needed for ``augmentation="generated"``.
        num_classes: Number of class folders there must be; None skips the check.
        image_size: Side in pixels to resize all images to; None asks for one size.
        has_sources: Whether generated images were made from training images; see `read_pool`.
        group_by: What a group is; see `read_pool`.
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
        batch: ``"union"``: clean rows, then the augmented rows made from them; ``"replace"``:
            these in place of those they were made from.
        batch_size: Clean images per step and process; augmented ones come on top in a union. The
            number of steps per epoch does not depend on the augmentation.
        eval_batch_size: Images per validation, test or steering batch and process.
        steering: Rows that steer SAFLEX: ``"val"`` the validation folder, ``"split"`` a stratified
            part of the training images, which neither they nor what was generated from them are
            then trained on, ``"train"`` the clean training images.
        steering_fraction: Share of the training images that ``"split"`` takes, in (0, 1).
        merge_val: Train on the validation images too. Then there are no validation rows: nothing
            can be selected on them, and SAFLEX needs ``steering`` ``"train"`` or ``"split"``.
        seed: Seed of the order of the rows, of the draws and of the split.
        num_workers: Loader processes; 0 loads in the training process.

    Raises:
        ValueError: If a number is out of its range, or settings contradict each other.
    """

    def __init__(
        self,
        root: str,
        generated: str | None = None,
        *,
        num_classes: int | None = None,
        image_size: int | None = 224,
        has_sources: bool = True,
        group_by: Literal["prompt", "generator"] = "prompt",
        per_class: Literal["all", "extra", "real"] = "all",
        generated_per_real: float = 1.0,
        redraw: bool = False,
        label_noise: float = 0.0,
        drop_wrong: bool = False,
        augmentation: Literal["generated"] | AugmentationName = "generated",
        augmentation_settings: dict[str, Any] | None = None,
        batch: Literal["union", "replace"] = "union",
        batch_size: int = 128,
        eval_batch_size: int = 256,
        steering: SteeringName = "val",
        steering_fraction: float = 0.2,
        merge_val: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        check_sizes(
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
        )
        check_shares(steering_fraction=steering_fraction)
        for name, value, choices in (
            ("augmentation", augmentation, ("generated", *get_args(AugmentationName))),
            ("batch", batch, ("union", "replace")),
            ("group_by", group_by, ("prompt", "generator")),
            ("per_class", per_class, ("all", "extra", "real")),
            ("steering", steering, get_args(SteeringName)),
        ):
            check_choice(name, value, choices)
        if generated_per_real <= 0.0:
            raise ValueError(
                f"Expected `generated_per_real` to be positive, but got {generated_per_real}. Set "
                "`augmentation` to none to train without generated images."
            )
        if not 0.0 <= label_noise < 1.0:
            raise ValueError(
                f"Expected `label_noise` to be in [0, 1), but got {label_noise}. Pass 0.0 to keep "
                "the labels of the pool."
            )
        if augmentation == "generated" and generated is None:
            raise ValueError(
                "Expected `generated` to name the folder of generated images, but got None. Make "
                "one with `saflex-generate`, or set `augmentation` to none."
            )
        if augmentation == "generated" and batch == "replace" and not has_sources:
            raise ValueError(
                "Expected `batch`='union' for generated images without sources, but got "
                "'replace': there is no telling which clean rows they replace. Choose union."
            )
        self.root = root
        self.generated = generated
        self.num_classes = num_classes
        self.image_size = image_size
        self.has_sources = has_sources
        self.group_by: Literal["prompt", "generator"] = group_by
        self.per_class = per_class
        self.generated_per_real = generated_per_real
        self.redraw = redraw
        self.label_noise = label_noise
        self.drop_wrong = drop_wrong
        self.augmentation: Literal["generated"] | AugmentationName = augmentation
        self.augmentation_settings = dict(augmentation_settings or {})
        self.batch: Literal["union", "replace"] = batch
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.steering: SteeringName = steering
        self.steering_fraction = steering_fraction
        self.merge_val = merge_val
        self.seed = seed
        self.num_workers = num_workers
        self._is_set_up = False

    def setup(self, stage: str) -> None:
        """List all images once, look at their heads, and set the steering rows aside.

        Raises:
            FileNotFoundError: If a folder or a listed file is missing.
            ValueError: If an image, a class folder or a row of the pool is not as expected.
        """
        if self._is_set_up:
            return
        root = Path(self.root).expanduser()
        real = read_class_folders(root / "train", num_classes=self.num_classes)
        val = read_class_folders(root / "val", real.classes)
        test = read_class_folders(root / "test", real.classes)
        files = [*real.files, *val.files, *test.files]
        if self.augmentation == "generated":
            self._pool = self._read_pool(real)
            files += self._pool.files
        if self.merge_val:
            # Behind the training images, so that the numbers of the sources stay theirs.
            target = torch.cat([real.target, val.target])
            real = real._replace(files=[*real.files, *val.files], target=target)
        self._real = real
        self._rows = steering = torch.arange(len(real.files))
        if self.steering == "split":
            self._rows, steering = split_stratified(real.target, self.steering_fraction, self.seed)
        if self.augmentation == "generated":
            self._wanted = self._count_wanted()
        else:
            made = (self.augmentation, len(real.classes), self.augmentation_settings)
            self._augment, self._mix = make_image_augmentation(*made), make_mixing(*made)
        check_images(files, same_size=self.image_size is None)
        self._val = CleanImages(self._make_split(val))
        self._test = CleanImages(self._make_split(test))
        # The same object where the rows are the same, so that SAFLEX can tell.
        self._steering = (
            self._val if self.steering == "val" else CleanImages(self._make_split(real, steering))
        )
        self._is_set_up = True

    def _read_pool(self, real: ClassFolders) -> Pool:
        assert self.generated is not None
        pool = read_pool(
            Path(self.generated).expanduser(),
            real,
            has_sources=self.has_sources,
            group_by=self.group_by,
        )
        generator = torch.Generator().manual_seed(mix_seeds(self.seed, _NOISE))
        given = plant_wrong_labels(pool.target, len(real.classes), self.label_noise, generator)
        self._wrong = given != pool.target
        return pool._replace(target=given)

    def _count_wanted(self) -> Tensor:
        classes = self._real.classes
        found = self._pool.target[self._usable()].bincount(minlength=len(classes))
        if self.per_class == "all":
            return found
        if self.per_class == "extra":
            folder = Path(self.root).expanduser() / "extra"
            wanted = read_class_folders(folder, classes).target.bincount()
        else:
            wanted = self.class_counts().mul(self.generated_per_real).round().long()
        if (found < wanted).any():
            lacking = {
                classes[label]: f"{found[label]} of {wanted[label]}"
                for label in (found < wanted).nonzero().flatten().tolist()
            }
            rank_zero_warn(
                f"Expected as many generated images in {self.generated} as `per_class`="
                f"'{self.per_class}' asks for, but found only {lacking}. All there are will be "
                "used; make more with `saflex-generate`.",
                category=SAflexWarning,
            )
        return wanted

    def _make_split(self, folders: ClassFolders, rows: Tensor | None = None) -> Split:
        rows = torch.arange(len(folders.files)) if rows is None else rows
        files = [folders.files[row] for row in rows.tolist()]
        # Read one by one, by the row number, as a tensor would be.
        images = cast("Tensor", FileImages(files, self.image_size))
        return Split(images, folders.target[rows])

    def _usable(self) -> Tensor:
        return ~self._wrong if self.drop_wrong else torch.ones_like(self._wrong)

    def wrong_rows(self) -> Tensor | None:
        """Return which rows carry a planted label, by ``AugmentedBatch.index``; needs `setup`.

        Returns:
            ``(rows,)`` bool; None where no label was planted.
        """
        if self.augmentation != "generated" or not self.label_noise:
            return None
        return torch.cat([torch.zeros(len(self._real.files), dtype=torch.bool), self._wrong])

    def class_counts(self) -> Tensor:
        """Return the number of real training rows of each class, ``(classes,)`` int64."""
        return self._real.target[self._rows].bincount(minlength=len(self._real.classes))

    def train_dataloader(self) -> DataLoader[AugmentedBatch]:
        """Return the loader of training batches; its order is a function of seed and epoch.

        Raises:
            ValueError: If a batch asks for more images than a process has.
        """
        if self.augmentation == "generated":
            batches = PairedBatches(
                self._rows.tolist(),
                len(self._real.files),
                self._pool,
                self._wanted,
                usable=self._usable(),
                redraw=self.redraw,
                batch=self.batch,
                batch_size=self.batch_size,
                trainer=self.trainer,
                seed=self.seed,
            )
            return make_paired_loader(
                MixedImages(self._real, self._pool, self.image_size),
                batches,
                trainer=self.trainer,
                seed=self.seed,
                num_workers=self.num_workers,
            )
        return make_image_loader(
            self._make_split(self._real, self._rows),
            self._augment,
            self._mix,
            batch=self.batch,
            batch_size=self.batch_size,
            trainer=self.trainer,
            seed=self.seed,
            num_workers=self.num_workers,
        )

    def saflex_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the rows that steer SAFLEX, without augmentation.

        Raises:
            MisconfigurationException: If those are validation rows that are trained on.
        """
        check_steering(self.steering, merge_val=self.merge_val)
        return self._make_loader(self._steering)

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for; needs `setup`."""
        if self.augmentation == "generated":
            return self._pool.group_names
        return augmentation_group_names(self.augmentation, self.augmentation_settings)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]] | list[Any]:
        """Return the loader of the validation folder; none where it is trained on."""
        if self.merge_val:
            return []
        return self._make_loader(self._val)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Return the loader of the test folder."""
        return self._make_loader(self._test)

    def _make_loader(self, dataset: Dataset[Any]) -> DataLoader[Any]:
        options = loader_options(self.num_workers, self.seed)
        return DataLoader(dataset, self.eval_batch_size, **options)
