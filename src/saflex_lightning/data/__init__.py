"""Union batches for a pipeline of your own: any dataset, any augmentation, one line."""

from .operations import TagOperations
from .resumable import ResumableLoader
from .union import UnionDataset, union_loader

__all__ = ["ResumableLoader", "TagOperations", "UnionDataset", "union_loader"]
