"""Self-supervised pairs: two augmented views of an image find each other (SimCLR)."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Adam
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from saflex_lightning import SAflexMixin, gather_rows
from saflex_lightning.functional import contrastive_scores
from saflex_lightning.recipes.augment import seeded_draws
from saflex_lightning.recipes.batches import EpochSampler, normalize
from saflex_lightning.recipes.data_checks import check_batch_size
from saflex_lightning.recipes.medmnist import read_medmnist
from saflex_lightning.recipes.resumable import ResumableLoader

__all__ = ["SimCLR", "TwoViewsDataModule"]

Views = tuple[Tensor, Tensor]


class SimCLR(SAflexMixin, L.LightningModule):
    """Learn features without labels; a validation pair steers SAFLEX as a training pair trains.

    The loss is Eq. 12 of the paper: a view is told apart from those of the other images in the
    other position. (SimCLR's own also has the other views of the same position as negatives.)
    Both views are augmented, so every row is refined, and no label is needed.

    Args:
        encoder: From images to features ``(batch, features)``.
        features: Their number.
        projection: Width of the hidden layer and of the space that is compared.
        logit_scale: Inverse temperature of cosine similarities, positive.
        lr: Learning rate of Adam.

    Raises:
        ValueError: If ``logit_scale`` is not positive.

    References:
        Chen et al. 2020; Ding et al. 2024, section 3.3 and Eq. 12.
    """

    saflex_rows_interact = True

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        *,
        projection: int = 64,
        logit_scale: float = 5.0,
        lr: float = 1e-3,
    ) -> None:
        super().__init__()
        if logit_scale <= 0.0:
            raise ValueError(
                f"Expected `logit_scale` to be positive, but got {logit_scale}. Pass 5.0 for a "
                "temperature of 0.2."
            )
        self.save_hyperparameters(ignore=["encoder"])
        self.encoder = encoder
        self.projector = nn.Sequential(
            nn.Linear(features, projection), nn.ReLU(), nn.Linear(projection, projection)
        )
        self.logit_scale = logit_scale
        self.lr = lr

    def forward(self, images: Tensor) -> Tensor:
        """Return features, ``(batch, features)``; a linear probe is fitted to these."""
        return self.encoder(images)

    def saflex_scores(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores of both directions over the pairs of all processes."""
        projected = self.projector(self(torch.cat([first, second])))
        one, other = projected.chunk(2)
        return contrastive_scores(one, other, self.logit_scale, gather=gather_rows)

    def saflex_val_batch(self, batch: Any) -> tuple[Views, None]:
        """Return both views; the target is the diagonal."""
        return tuple(batch), None

    def training_step(self, batch: Views, batch_idx: int) -> Tensor:
        """Return the SAFLEX loss of both directions, or the plain contrastive loss."""
        loss = self.saflex_loss(self.saflex_forward(*batch))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Adam:
        """Return Adam."""
        return Adam(self.parameters(), lr=self.lr)


class TwoViews(Dataset[Views]):
    """Two views of an image by draws that depend on (seed, epoch, row) alone."""

    def __init__(self, images: Tensor, augmentation: v2.Transform, seed: int) -> None:
        self.images = images
        self.augmentation = augmentation
        self.seed = seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int | tuple[int, int]) -> Views:
        epoch, row = (0, key) if isinstance(key, int) else key
        with seeded_draws(self.seed, epoch, row):
            first, second = (self.augmentation(self.images[row]) for _ in range(2))
        return normalize(first), normalize(second)


class TwoViewsDataModule(L.LightningDataModule):
    """Pairs of views of the shipped BloodMNIST subset, or of another MedMNIST file.

    Views are crops of 30 to 100 % of the image, flipped and with jittered colours. Validation
    images steer; theirs are the same two views every time.

    Args:
        path: A 2D MedMNIST file with colour images; None reads the shipped subset.
        batch_size: Images per step and process.
        seed: Seed of the order and of the views.
    """

    def __init__(self, path: str | None = None, *, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Read the file."""
        splits = read_medmnist(self.path)
        augmentation = v2.Compose(
            [
                v2.RandomResizedCrop(splits["train"].images.shape[-1], (0.3, 1.0), antialias=True),
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
            ]
        )
        self._train, self._val = (
            TwoViews(splits[name].images, augmentation, self.seed) for name in ("train", "val")
        )

    def train_dataloader(self) -> DataLoader[Views]:
        """Return the loader of training pairs, as many in every batch.

        Raises:
            ValueError: If a batch asks for more images than a process has.
        """
        share = (self.trainer and self.trainer.distributed_sampler_kwargs) or {
            "num_replicas": 1,
            "rank": 0,
        }
        check_batch_size(self.batch_size, len(self._train) // share["num_replicas"])
        sampler = EpochSampler(self._train, seed=self.seed, **share)
        return ResumableLoader(self._train, self.batch_size, sampler=sampler, drop_last=True)

    def saflex_dataloader(self) -> DataLoader[Views]:
        """Return the loader of validation pairs."""
        return DataLoader(self._val, self.batch_size)
