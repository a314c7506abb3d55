"""A MedMNIST set as a Lightning datamodule."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from saflex_lightning.data.checks import check
from saflex_lightning.data.draws import mix_seeds
from saflex_lightning.recipes.datamodule import Splits
from saflex_lightning.recipes.image_data import ImageDataModule
from saflex_lightning.recipes.label_noise import plant_wrong_labels
from saflex_lightning.recipes.medmnist import read_medmnist
from saflex_lightning.recipes.medmnist_sets import (
    MEDMNIST_SETS,
    download_medmnist,
    find_medmnist,
)

__all__ = ["MedMNISTDataModule"]

_NOISE = 1  # keeps the draw of wrong labels apart from the others of the same seed

SetName = Literal[
    "blood_subset", "path", "derma", "tissue", "blood", "oct", "organa", "organc", "organs"
]


class MedMNISTDataModule(ImageDataModule):
    """A 2D MedMNIST set with an upstream augmentation and the rows that steer SAFLEX.

    Args:
        dataset: ``"blood_subset"`` is the part of BloodMNIST that ships with the package; the
            others are the official sets of `MEDMNIST_SETS`, in ``<root>/<dataset>mnist.npz``.
        path: A file in the same format to read instead; its checksum is not looked at.
        root: Folder of the official files.
        download: Download the official file into ``root`` where it is missing (extra
            ``[medmnist]``).
        check_md5: Refuse an official file with another checksum.
        num_classes: Number of classes that labels must stay below; None takes that of the set, or
            of the file at ``path``.
        in_channels: 1 for grey images, 3 for colour, if the file is to be checked.
        label_noise: Share of the training images that get a wrong label on purpose, in [0, 1), as
            of a careless labeller; see `plant_wrong_labels`.
        **shared: As for `ImageDataModule` and `UnionDataModule`.

    Raises:
        TypeError: If a setting is of another type.
        ValueError: If a setting is out of its range.

    Example:
        >>> data = MedMNISTDataModule(batch_size=2)
        >>> data.setup("fit")
        >>> batch = next(iter(data.train_dataloader()))
        >>> batch.augmented, len(batch.target)
        (tensor([False, False,  True,  True]), 4)
    """

    def __init__(
        self,
        dataset: SetName = "blood_subset",
        *,
        path: str | None = None,
        root: str = "data",
        download: bool = False,
        check_md5: bool = True,
        num_classes: int | None = None,
        in_channels: int | None = None,
        label_noise: float = 0.0,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        check(get_args(SetName), dataset=dataset)
        check("a path", root=root)
        check("a path", optional=True, path=path)
        check("True or False", download=download, check_md5=check_md5)
        check("a positive integer", optional=True, num_classes=num_classes, in_channels=in_channels)
        check("a number in [0, 1)", label_noise=label_noise)
        self.label_noise = label_noise
        self.dataset = dataset
        self.path = path
        self.root = root
        self.download = download and dataset in MEDMNIST_SETS and path is None
        self.check_md5 = check_md5
        self._class_names: Sequence[str] | None = None
        if path is None:
            facts = MEDMNIST_SETS[dataset.removesuffix("_subset")]
            num_classes = facts.num_classes if num_classes is None else num_classes
            in_channels = facts.in_channels if in_channels is None else in_channels
            self._class_names = facts.class_names
        self.num_classes, self.in_channels = num_classes, in_channels

    def prepare_data(self) -> None:
        """Download the file, where that was asked for and it is missing."""
        if self.download:
            download_medmnist(self.dataset, self.root)

    def make_splits(self) -> Splits:
        """Read the file."""
        file = self.path
        if file is None and self.dataset in MEDMNIST_SETS:
            file = find_medmnist(self.dataset, self.root, check_md5=self.check_md5)
        splits = read_medmnist(file, num_classes=self.num_classes, in_channels=self.in_channels)
        largest = max(int(split.target.max()) for split in splits.values())
        self._sizes = {
            "num_classes": self.num_classes or largest + 1,
            "in_channels": splits["train"].images.shape[1],
        }
        train, truth = splits["train"], splits["train"].target
        draws = torch.Generator().manual_seed(mix_seeds(self.seed, _NOISE))
        train = train._replace(
            target=plant_wrong_labels(truth, self._sizes["num_classes"], self.label_noise, draws)
        )
        self._wrong = train.target != truth
        return Splits(train, splits["val"], [splits["test"]])

    def wrong_rows(self) -> Tensor | None:
        """Return which values of ``AugmentedBatch.index`` carry a planted label; None without any.

        ``(2 n,)`` bool, as an augmented row is another one than its clean row; needs `setup`.
        """
        whole = not self.merge_val and self.steering != "split"
        return torch.cat([self._wrong, self._wrong]) if self.label_noise and whole else None

    def sizes(self) -> dict[str, int]:
        """Return the number of classes and of channels; needs `setup`."""
        return self._sizes

    def saflex_class_names(self) -> Sequence[str] | None:
        """Return the names of the classes, for `SAflexInsight`; None for a file of one's own."""
        return self._class_names
