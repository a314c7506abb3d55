"""What the datamodules of images share: upstream augmentations by name, above `UnionDataset`."""

from typing import Any, get_args

from saflex_lightning.data import UnionDataset
from saflex_lightning.data.checks import check
from saflex_lightning.data.union import group_names_of
from saflex_lightning.recipes.augment import (
    AugmentationName,
    check_augmentation,
    make_augmentation,
)
from saflex_lightning.recipes.datamodule import UnionDataModule
from saflex_lightning.recipes.images import ImageRows, Split, stack_normalized

__all__ = ["ImageDataModule"]


class ImageDataModule(UnionDataModule):
    """Images in `Split`s with an upstream augmentation.

    Args:
        augmentation: Upstream augmentation, drawn anew for each image in each epoch.
        augmentation_settings: Keyword values of its torchvision transform (`SoftCrop` for
            ``"soft_crop"``); None keeps their defaults.
        **shared: As for `UnionDataModule`.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range.
    """

    def __init__(
        self,
        *,
        augmentation: AugmentationName = "randaugment",
        augmentation_settings: dict[str, Any] | None = None,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check(get_args(AugmentationName), augmentation=augmentation)
        check_augmentation(augmentation, augmentation_settings)
        self.augmentation: AugmentationName = augmentation
        self.augmentation_settings = dict(augmentation_settings or {})

    def setup(self, stage: str) -> None:
        """Read the files once, and augment one image to see that this works and its size stays."""
        super().setup(stage)
        image = self._train.rows.images[0]
        check_augmentation(self.augmentation, self.augmentation_settings, image)
        self.make_augmented(self._train)[0]

    def make_clean(self, rows: Split) -> ImageRows:
        """Return normalised images and labels."""
        return ImageRows(rows)

    def make_augmented(self, clean: ImageRows) -> UnionDataset:
        """Return images with one augmented version each."""
        return UnionDataset(
            ImageRows(clean.rows, normalized=False),
            self._make_augmentation(self.sizes()["num_classes"]),
            seed=self.seed,
            replace=self.batch == "replace",
            collate_fn=stack_normalized,
        )

    def saflex_group_names(self) -> tuple[str, ...]:
        """Return what each value of ``AugmentedBatch.group`` stands for."""
        return group_names_of(self._make_augmentation(2))

    def _make_augmentation(self, num_classes: int) -> Any:
        return make_augmentation(self.augmentation, num_classes, self.augmentation_settings)
