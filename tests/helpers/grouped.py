"""Union batches of one helpful and one harmful augmentation, and a module that names them."""

import torch
from helpers.training import NUM_CLASSES, Classifier, make_loader, make_rows
from torch.utils.data import DataLoader, TensorDataset

from saflex_lightning import AugmentedBatch

NAMES = ("clean", "generate", "mislabel")
CLEAN_ROWS = 16


def union_batch(inputs, target, index):
    """Augmented rows that are new and labelled rightly, or the clean ones labelled wrongly."""
    n = len(target)
    harmful = torch.arange(n) % 2 == 1
    new_inputs, new_target = make_rows(n, seed=1000 + int(index.sum()), dtype=inputs.dtype)
    wrong = (target + 1) % NUM_CLASSES
    return AugmentedBatch(
        inputs=torch.cat([inputs, torch.where(harmful.unsqueeze(1), inputs, new_inputs)]),
        target=torch.cat([target, torch.where(harmful, wrong, new_target)]),
        augmented=torch.arange(2 * n) >= n,
        group=torch.cat([torch.zeros(n, dtype=torch.long), 1 + harmful.long()]),
        index=torch.cat([index, index + 1000 * (1 + harmful.long())]),
    )


def grouped_loader(num_rows=96, batch_size=CLEAN_ROWS, *, make_batch=union_batch, **kwargs):
    inputs, target = make_rows(num_rows, dtype=kwargs.pop("dtype", torch.float32))
    rows = TensorDataset(inputs, target, torch.arange(num_rows))

    def collate(samples):
        return make_batch(*(torch.stack(column) for column in zip(*samples, strict=True)))

    settings = {} if "batch_sampler" in kwargs else {"batch_size": batch_size}
    return DataLoader(rows, collate_fn=collate, **settings, **kwargs)


class Grouped(Classifier):
    """Remembers what its steps trained on, and their solutions."""

    names = NAMES

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.steps = []

    def saflex_group_names(self):
        return self.names

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.steps.append((batch, self.saflex_solution, loss.item()))
        return loss


def steering(dtype=torch.float32):
    return make_loader(64, seed=7, dtype=dtype)


def read_indices(_rank, loader):
    """Return the index of every row of every batch, from a process of its own, say."""
    return [batch.index.tolist() for batch in loader]
