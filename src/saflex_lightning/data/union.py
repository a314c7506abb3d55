"""Union batches: clean rows, then one augmented row for each, from any dataset and augmentation."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from saflex_lightning.batch import AugmentedBatch

from .checks import check
from .draws import kept_generators, mix_seeds, seed_draws, seeded_draws
from .mixing import check_mixing, group_of_mixed, is_mixing, mixing_group_names
from .operations import TaggedImage, TagOperations, can_be_tagged
from .own_draws import FromGlobalDraws, has_own_draws
from .resumable import EpochSampler, ResumableLoader, check_dataset, draw_and_row

__all__ = [
    "MadeRows",
    "UnionDataset",
    "check_shape",
    "group_names_of",
    "join_rows",
    "mix_rows",
    "union_loader",
]


class UnionRow(NamedTuple):
    """One row before collation; ``made`` is its augmented version and ``group`` what made it."""

    draw: int
    row: int
    clean: tuple[Any, Any]
    made: tuple[Any, Any] | None
    group: int


class MadeRows(NamedTuple):
    """The augmented rows of a batch, one per clean row: inputs, targets and groups."""

    inputs: Any
    target: Tensor
    group: Tensor


class UnionDataset(Dataset[UnionRow]):
    """Rows of a dataset with one augmented version each, and `collate`, which makes union batches.

    What is drawn depends on (seed, draw, row) alone: neither the order of the batches, the number
    of workers nor what the training draws changes a row. Items are addressed by ``(draw, row)``, as
    `union_loader` does, whose draw is the epoch; a plain row number is one of draw 0.

    Args:
        dataset: Map-style, yields ``(input, label)``; the label is a class or class probabilities.
        augment: From an input to another one of the same shape; None leaves all rows clean.
            RandAugment, TrivialAugment and AutoAugment (torchvision, timm), also inside a
            ``Compose``, give a group for each operation, see `TagOperations`; MixUp and CutMix
            (torchvision, timm) mix the rows of the batch and have groups by strength; anything else
            is one group, named after it: AugMix, a function, kornia for tensors, albumentations for
            pictures and arrays. One with an attribute ``changes_label`` that is
            True is called with input and label and returns both. What draws from a generator of its
            own is a function of the seed only if it is given as one of albumentations itself.
        transform: From an input, clean or augmented, to what the model takes.
        seed: Seed of the draws.
        replace: Keep the augmented rows alone.
        collate_fn: From ``(input, label)`` pairs to batched inputs and labels; None is torch's.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If the seed is out of its range.

    Example:
        >>> rows = UnionDataset([(torch.ones(3), 0), (torch.zeros(3), 1)], torch.neg)
        >>> batch = rows.collate([rows[0], rows[1]])
        >>> batch.augmented, batch.index
        (tensor([False, False,  True,  True]), tensor([0, 1, 2, 3]))
    """

    def __init__(
        self,
        dataset: Any,
        augment: Callable[..., Any] | None,
        transform: Callable[[Any], Any] | None = None,
        *,
        seed: int = 0,
        replace: bool = False,
        collate_fn: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        check_dataset(dataset)
        check("a function", optional=True, augment=augment, transform=transform)
        check("a function", optional=True, collate_fn=collate_fn)
        check("a non-negative integer below 2**32", seed=seed)
        check("True or False", replace=replace)
        check_mixing(augment)
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.replace = replace
        self.collate_fn = collate_fn or default_collate
        self._mix = cast("Any", augment) if is_mixing(augment) else None
        self._augment: Any = None if is_mixing(augment) else augment
        if can_be_tagged(augment):
            self._augment = TagOperations(cast("Any", augment))
        elif has_own_draws(augment):
            self._augment = FromGlobalDraws(augment)
        # A dataset may say by `is_random` that reading a row draws nothing.
        only_reads = self._augment is None and transform is None
        self._is_random = not only_reads or getattr(dataset, "is_random", True)

    @property
    def group_names(self) -> tuple[str, ...]:
        """What each value of ``AugmentedBatch.group`` stands for; the first is ``"clean"``."""
        return group_names_of(self._augment if self._mix is None else self._mix)

    @property
    def keeps_labels(self) -> bool:
        """Whether every augmented row has the label of its own row."""
        return self._mix is None and not getattr(self._augment, "changes_label", False)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int] | int) -> UnionRow:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int] | int]) -> list[UnionRow]:
        """Return some rows; a loader asks for those of a batch."""
        pairs = [draw_and_row(key) for key in keys]
        if not self._is_random:
            return [self._read(*pair) for pair in pairs]
        with kept_generators():
            return [self._draw(*pair) for pair in pairs]

    def _draw(self, draw: int, row: int) -> UnionRow:
        seed_draws(self.seed, draw, row)
        return self._read(draw, row)

    def _read(self, draw: int, row: int) -> UnionRow:
        pair = self.dataset[row]
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                f"Expected `dataset` to yield (input, label), but row {row} is "
                f"{_describe(pair)}. Wrap the dataset in one that does."
            )
        value, label = pair
        clean = self._transform(value)
        if self._augment is None:
            return UnionRow(draw, row, (clean, label), None, 0)
        made, made_label, group = self._make(value, label)
        made = self._transform(made)
        check_shape(clean, made, f"row {row}")
        return UnionRow(draw, row, (clean, label), (made, made_label), group)

    def _transform(self, value: Any) -> Any:
        return value if self.transform is None else self.transform(value)

    def _make(self, value: Any, label: Any) -> tuple[Any, Any, int]:
        if getattr(self._augment, "changes_label", False):
            return *self._augment(value, label), 1
        made = self._augment(value)
        if isinstance(made, TaggedImage):
            return made.image, label, made.group
        if isinstance(made, Tensor) and made.shape == (1, *getattr(value, "shape", ())):
            made = made[0]  # kornia's, a batch of one
        return made, label, 1

    def collate(self, rows: list[UnionRow]) -> AugmentedBatch:
        """Return the union batch of some rows, or the augmented rows alone with ``replace``.

        Args:
            rows: Items of this dataset.

        Raises:
            ValueError: If inputs or labels cannot be put into a batch.
        """
        inputs, target = self._collate([row.clean for row in rows])
        made = None
        if self._mix is not None:
            with seeded_draws(self.seed, rows[0].draw, rows[0].row):
                made = mix_rows(self._mix, inputs, target)
        elif self._augment is not None:
            group = torch.tensor([row.group for row in rows])
            made = MadeRows(*self._collate([cast("Any", row.made) for row in rows]), group)
        index = torch.tensor([row.row for row in rows])
        return join_rows(inputs, target, index, made, num_rows=len(self), replace=self.replace)

    def _collate(self, pairs: list[tuple[Any, Any]]) -> tuple[Any, Tensor]:
        try:
            inputs, target = self.collate_fn(pairs)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"Expected rows that fit into one batch, but got {_describe(pairs[0])} and so on "
                f"({error}). Pass a `transform` that makes tensors of one size, or a `collate_fn`."
            ) from error
        if isinstance(target, Tensor) and target.is_floating_point():  # class probabilities
            _check_unmixed(target, [label for _, label in pairs])
            return inputs, target
        if not isinstance(target, Tensor) or target.numel() != len(pairs):
            raise ValueError(
                "Expected labels that are one class per row, or class probabilities, but got "
                f"{_describe(target)} of shape {tuple(getattr(target, 'shape', ()))} for "
                f"{len(pairs)} rows. Return integers, or floats that sum to 1."
            )
        return inputs, target.long().reshape(-1)  # of any integer type, also as a column


def group_names_of(augment: Callable[..., Any] | None) -> tuple[str, ...]:
    """Return the name of every group that an augmentation can give, that of clean rows first.

    Args:
        augment: As for `UnionDataset`.

    Raises:
        TypeError: If it is no function.

    Example:
        >>> group_names_of(torch.fliplr)
        ('clean', 'fliplr')
    """
    check("a function", optional=True, augment=augment)
    if augment is None:
        return ("clean",)
    if is_mixing(augment):
        return mixing_group_names(type(augment).__name__.lower())
    if can_be_tagged(augment):
        return TagOperations(augment).group_names
    if isinstance(names := getattr(augment, "group_names", None), tuple):
        return names
    function = augment.func if isinstance(augment, partial) else augment
    name = getattr(function, "__name__", type(function).__name__)
    return ("clean", "augmented" if name == "<lambda>" else name)


def union_loader(
    dataset: Any,
    augment: Callable[..., Any] | None,
    transform: Callable[[Any], Any] | None = None,
    *,
    seed: int = 0,
    replace: bool = False,
    batch_size: int = 1,
    shuffle: bool = True,
    weights: Tensor | None = None,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    **loader_options: Any,
) -> ResumableLoader:
    """Return a loader of union batches: clean rows, then one augmented row for each.

    Batches are `AugmentedBatch`es whose rows say what made them (``group``, named by the loader's
    ``group_names``) and which row they are in every epoch (``index``). The order is a function of
    (seed, epoch), and the loader resumes in the middle of an epoch. Under DDP every process has its
    share of the rows.

    Args:
        dataset: As for `UnionDataset`.
        augment: As for `UnionDataset`.
        transform: As for `UnionDataset`.
        seed: Seed of the order and of the draws.
        replace: As for `UnionDataset`.
        batch_size: Clean rows per batch and process; a union batch has twice as many rows.
        shuffle: Whether to draw an order for each epoch.
        weights: How often rows are drawn, ``(rows,)``, see `read_row_weights`; None takes each row
            once in an epoch.
        collate_fn: As for `UnionDataset`.
        **loader_options: Further options of `torch.utils.data.DataLoader`, such as
            ``num_workers`` or ``drop_last``.

    Returns:
        The loader.

    Raises:
        TypeError: If an argument is of another type.
        ValueError: If one is out of its range, or there is a sampler among the options.

    Example:
        >>> rows = [(torch.rand(3, 8, 8), label) for label in range(4)]
        >>> loader = union_loader(rows, torch.fliplr, batch_size=2)
        >>> next(iter(loader)).inputs.shape, loader.group_names
        (torch.Size([4, 3, 8, 8]), ('clean', 'fliplr'))
    """
    check("a positive integer", batch_size=batch_size)
    check("True or False", shuffle=shuffle)
    if given := sorted({"sampler", "batch_sampler"} & loader_options.keys()):
        raise ValueError(
            f"Expected no {given} among the options of the loader, whose order is a function of "
            "seed and epoch, but got one. Pass `shuffle` or `weights` instead."
        )
    if weights is not None and not shuffle:
        raise ValueError(
            "Expected `shuffle`=True with `weights`, as rows are drawn by them, but got False. "
            "Leave one of them out."
        )
    rows = UnionDataset(
        dataset, augment, transform, seed=seed, replace=replace, collate_fn=collate_fn
    )
    # The sampler adds the epoch to its seed: keep the orders of neighbouring seeds apart.
    sampler = EpochSampler(rows, shuffle=shuffle, seed=mix_seeds(seed), weights=weights)
    # Otherwise each pass draws from the global random state.
    loader_options.setdefault("generator", torch.Generator().manual_seed(seed))
    return ResumableLoader(
        rows, batch_size, sampler=sampler, collate_fn=rows.collate, **loader_options
    )


def mix_rows(mix: Callable[..., Any], inputs: Any, target: Tensor) -> MadeRows:
    """Return rows mixed with one another by MixUp, CutMix or timm's Mixup."""
    if not isinstance(inputs, Tensor):
        raise ValueError(
            f"Expected inputs that are one tensor for {type(mix).__name__} to mix, "
            f"but got {_describe(inputs)}. Make one in `transform`."
        )
    images, mixed = mix(inputs.clone(), target)  # timm's writes in its input
    per_row = getattr(mix, "mode", "batch") != "batch"
    return MadeRows(images, mixed, group_of_mixed(mixed, target, per_row=per_row))


def check_shape(clean: Any, made: Any, what: str) -> None:
    """Refuse an augmentation that changes the shape of inputs."""
    shapes = [tuple(getattr(each, "shape", ())) for each in (clean, made)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Expected `augment` to keep the shape {shapes[0]} of the rows, but of "
            f"{what} it made {shapes[1]}. Set `size` to theirs, or resize in `transform`."
        )


def _check_unmixed(target: Tensor, labels: list[Any]) -> None:
    """Refuse a collate function that mixes rows, which would no longer be clean."""
    are_classes = not any(
        label.is_floating_point() if isinstance(label, Tensor) else not isinstance(label, Integral)
        for label in labels
    )
    if are_classes and target.ndim == 2 and not bool(target.amax(1).gt(1 - 1e-3).all()):
        raise ValueError(
            "Expected `collate_fn` to keep the labels of rows, which must stay clean, but it made "
            "mixtures of classes. Pass MixUp or CutMix as `augment`, and label smoothing to "
            "`saflex_loss`."
        )


def join_rows(
    inputs: Any,
    target: Tensor,
    index: Tensor,
    made: MadeRows | None,
    *,
    num_rows: int,
    replace: bool = False,
) -> AugmentedBatch:
    """Put clean rows and their augmented versions into one batch (Ding et al. 2024, Eq. 3).

    Labels become probabilities where those of the augmented rows are. An augmented row is another
    row than its clean one: its index is larger by ``num_rows``, the number of all clean rows.
    """
    if made is None:
        return AugmentedBatch(inputs, target, index < 0, index * 0, index)
    if replace:
        return AugmentedBatch(made.inputs, made.target, index >= 0, made.group, index + num_rows)
    if made.target.ndim == 2 and target.ndim == 1:
        target = F.one_hot(target, made.target.shape[-1]).to(made.target)
    return AugmentedBatch(
        inputs=_join(inputs, made.inputs),
        target=torch.cat([target, made.target]),
        augmented=torch.cat([index < 0, index >= 0]),
        group=torch.cat([index * 0, made.group]),
        index=torch.cat([index, index + num_rows]),
    )


def _join(first: Any, second: Any) -> Any:
    """Return inputs of one structure as those of one batch."""
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, Mapping):
        return {name: _join(value, second[name]) for name, value in first.items()}
    if isinstance(first, (list, tuple)) and not isinstance(first, str):
        parts = [_join(one, other) for one, other in zip(first, second, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    raise TypeError(
        f"Expected inputs to be tensors, or mappings and sequences of them, but got "
        f"{_describe(first)}. Turn it into a tensor in `transform`, or leave it out."
    )


def _describe(value: Any) -> str:
    """Return the type of a value, and of what it holds."""
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(map(_describe, value))})"
    return type(value).__name__
