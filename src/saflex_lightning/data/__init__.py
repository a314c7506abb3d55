"""Union batches for a pipeline of your own: any dataset, any augmentation, one line."""

from .batch import union_batch
from .indexed import with_index
from .operations import TagOperations
from .resumable import ResumableLoader
from .row_weights import read_row_weights
from .union import UnionDataset, group_names_of, union_loader

__all__ = [
    "ResumableLoader",
    "TagOperations",
    "UnionDataset",
    "group_names_of",
    "read_row_weights",
    "union_batch",
    "union_loader",
    "with_index",
]
