"""Union batches for a pipeline of your own: any dataset, any augmentation, one line."""

from .mixing import mixing_group, mixing_group_names
from .operations import TagOperations
from .resumable import ResumableLoader
from .union import UnionDataset, union_loader

__all__ = [
    "ResumableLoader",
    "TagOperations",
    "UnionDataset",
    "mixing_group",
    "mixing_group_names",
    "union_loader",
]
