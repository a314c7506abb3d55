"""What an audit judges, by whom and through which network: from paths, a run, or the package."""

import hashlib
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from saflex_lightning.recipes import MedMNISTDataModule, TabularDataModule
from saflex_lightning.recipes.datamodule import UnionDataModule
from saflex_lightning.recipes.folders import FileImages
from saflex_lightning.recipes.images import ImageRows
from saflex_lightning.recipes.sized import SizedModule
from saflex_lightning.recipes.tabular.csv_file import Roles
from saflex_lightning.recipes.tabular.preprocessing import Preprocessing
from saflex_lightning.recipes.tabular.sets import read_table
from saflex_lightning.recipes.tabular.table import Table

from .encoders import PatchEncoder, TableEncoder
from .items import ImageInputs, Items, TableInputs, fit_columns, fit_labels, read_images

__all__ = ["Run", "Sources", "open_run", "read_paths", "read_run_rows", "read_shipped"]

_CONFIG = "config.yaml"
_PATCH_SHAPE = (3, 32, 32)
_PATCH_IMAGES = 256  # that the patches are taken from
_PLANTED = 0.2  # share of the shipped labels that are made wrong


class Sources(NamedTuple):
    """What an audit needs.

    Attributes:
        trusted: Items with right labels.
        doubted: Items to judge, with the same classes.
        network: From a batch of inputs to scores, ``(batch, scores)``.
        origin: Tells that network from others.
        wrong: Which labels were planted wrong, ``(n,)`` bool, where that is known.
    """

    trusted: Items
    doubted: Items
    network: nn.Module
    origin: str
    wrong: Tensor | None = None


class Run(NamedTuple):
    """A run of ``saflex-train``: a checkpoint, the network in it, and the data."""

    checkpoint: Path
    network: nn.Module
    data: UnionDataModule

    @property
    def origin(self) -> str:
        """What tells the network from others."""
        return hashlib.sha256(self.checkpoint.read_bytes()).hexdigest()


def read_shipped() -> Sources:
    """Return the blood cells that ship with the package, a fifth of their labels made wrong."""
    data = MedMNISTDataModule(label_noise=_PLANTED, seed=1)
    data.setup("fit")
    trusted, doubted = _rows_of(data, _PATCH_SHAPE)
    return _with_patches(trusted, doubted)._replace(wrong=_wrong_rows(data, doubted))


def read_paths(
    doubted: Path, trusted: Path, *, roles: Roles | None = None, run: Run | None = None
) -> Sources:
    """Return items of two folders, manifests or tables.

    Args:
        doubted: Items to judge.
        trusted: Items whose labels are right.
        roles: Of the columns of CSV tables; without them a CSV file is a manifest.
        run: Its network makes the scores, instead of an encoder that needs no training.

    Raises:
        FileNotFoundError: If a path is not there.
        ValueError: If they hold different things, a class is unknown, or a file cannot be read.
    """
    is_table = []
    for path in (doubted, trusted):
        if not path.exists():
            raise FileNotFoundError(
                f"Expected items in {path}, but there is nothing. Give a folder with one folder of "
                "images for each class, a manifest, or a table in .csv or .npz."
            )
        is_table.append(path.is_file() and (path.suffix == ".npz" or roles is not None))
    if run is not None:
        is_table.append(isinstance(run.data, TabularDataModule))
    if len(set(is_table)) > 1:
        kinds = ["a table" if each else "images" for each in is_table]
        raise ValueError(
            "Expected items to judge, trusted items and those of the run to be of one kind, but "
            f"they are {', '.join(kinds)}. Give all as tables, `--target` says that a CSV file is "
            "one, or all as images."
        )
    if all(is_table):
        return _read_tables(doubted, trusted, roles, run)
    shape = _PATCH_SHAPE if run is None else _shape_of(run.data)
    right = read_images(trusted, shape)
    judged = fit_labels(read_images(doubted, shape), right.classes, doubted)
    if run is None:
        return _with_patches(right, judged)
    return Sources(right, judged, run.network, run.origin)


def _with_patches(trusted: Items, doubted: Items) -> Sources:
    draws = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(trusted.target), generator=draws)[:_PATCH_IMAGES].tolist()
    images: list[Any] = [trusted.inputs[row] for row in rows]
    for row, image in zip(rows, images, strict=True):
        trusted.check_readable(row, is_readable=bool(image.isfinite().all()))
    return Sources(trusted, doubted, PatchEncoder(torch.stack(images)), "patches")


def _read_tables(doubted: Path, trusted: Path, roles: Roles | None, run: Run | None) -> Sources:
    tables: list[Table] = [read_table(None, str(path), roles=roles) for path in (trusted, doubted)]
    fitted = None if run is None else getattr(run.data, "preprocessing", None)
    fitted = fitted or Preprocessing(tables[0])
    items = []
    for path, table in zip((trusted, doubted), tables, strict=True):
        inputs = TableInputs(fitted.transform(fit_columns(table, fitted.columns, path)))
        names = [str(row) for row in range(len(inputs))]
        items.append(Items(names, torch.from_numpy(table.target), table.classes, inputs))
    right, judged = items
    judged = fit_labels(judged, right.classes, doubted)
    if run is not None:
        return Sources(right, judged, run.network, run.origin)
    return Sources(right, judged, TableEncoder(fitted.columns.cardinalities), "columns")


# Runs


def open_run(path: Path) -> Run:
    """Return a run of ``saflex-train``, with its data read.

    Args:
        path: Its folder, of which the newest checkpoint is taken, or a checkpoint in it.

    Raises:
        FileNotFoundError: If there is none, or no settings beside it.
        ValueError: If the checkpoint does not fit the settings, or the data is of another kind.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"Expected the folder of a run at {path}, but there is nothing. Give the folder that "
            "`saflex-train` printed at its end."
        )
    home = _home_of(path.resolve())
    if home is None:
        raise FileNotFoundError(
            f"Expected {_CONFIG} of a run in {path} or above it, but found none. Give the folder "
            "that `saflex-train` printed at its end. For a network of your own write its scores "
            "into a table, and give that."
        )
    files = [file for file in path.rglob("*.ckpt") if _home_of(file.resolve()) == home]
    files.sort(key=lambda file: file.stat().st_mtime_ns)
    if path.is_dir() and not files:
        raise FileNotFoundError(
            f"Expected a checkpoint (*.ckpt) in {path}, but there is none. Train with "
            "`callbacks=last`, the default of `saflex-train`."
        )
    checkpoint = files[-1] if path.is_dir() else path
    try:
        settings: Any = OmegaConf.load(home / _CONFIG)
        data = instantiate(settings.data)
    except (AttributeError, OmegaConfBaseException, YAMLError) as error:
        raise ValueError(
            f"Expected {home / _CONFIG} as `saflex-train` writes it, but it cannot be read "
            f"({error!s:.300}). Give another run."
        ) from error
    if not isinstance(data, UnionDataModule):
        raise ValueError(
            f"Expected a run on images or a table, but the data of {home} are "
            f"{type(data).__name__}. Write the scores of its network into a table, and give that."
        )
    data.setup("fit")
    network = instantiate(settings.model)
    if isinstance(network, SizedModule):
        network.build(data.sizes())
    try:
        state: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
        network.load_state_dict(state["state_dict"])
    except (
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
        pickle.PickleError,
    ) as error:
        raise ValueError(
            f"Expected {checkpoint} to hold the network of the run in {home}, but it cannot be "
            f"loaded ({type(error).__name__}: {error!s:.300}). Give a checkpoint of that run."
        ) from error
    return Run(checkpoint, network.eval(), data)


def _home_of(path: Path) -> Path | None:
    """Return the folder of the run that something belongs to: rivals and second runs lie inside."""
    folders = [path, *path.parents]
    return next((folder for folder in folders if (folder / _CONFIG).is_file()), None)


def read_run_rows(run: Run) -> Sources:
    """Return a run's own training rows, or its pool, to be judged by the rows that steered it.

    Raises:
        MisconfigurationException: If there are none.
        ValueError: If these are the same rows.
    """
    trusted, doubted = _rows_of(run.data, None)
    return Sources(trusted, doubted, run.network, run.origin, _wrong_rows(run.data, doubted))


def _rows_of(data: UnionDataModule, shape: tuple[int, ...] | None) -> list[Items]:
    """Return the rows that steer, and those in doubt."""
    rows = [data.saflex_dataloader().dataset, data.doubted_rows()]
    if rows[0] is rows[1]:
        raise ValueError(
            "Expected trusted rows beside the training rows, but `steering` of this run is "
            f"'{data.steering}'. Give items to judge, and trusted ones by `--trusted`."
        )
    ask = getattr(data, "saflex_class_names", None)
    names = ask() if ask else getattr(data, "classes", None)
    classes = [str(name) for name in names or range(data.sizes()["num_classes"])]
    return [_as_items(each, classes, shape) for each in rows]


def _wrong_rows(data: UnionDataModule, doubted: Items) -> Tensor | None:
    find: Any = getattr(data, "wrong_rows", None)
    wrong = None if find is None else find()
    return None if wrong is None else wrong[-len(doubted.target) :]  # clean rows come first


def _as_items(rows: Any, classes: list[str], shape: tuple[int, ...] | None) -> Items:
    names = [str(row) for row in range(len(rows))]
    if not isinstance(rows, ImageRows):
        return Items(names, rows.target, classes, TableInputs(rows.inputs))
    images = rows.rows.images
    if isinstance(images, FileImages):
        names = [str(file) for file in images.files]
    return Items(names, rows.target, classes, ImageInputs(images, shape or rows[0][0].shape))


def _shape_of(data: UnionDataModule) -> tuple[int, ...]:
    return tuple(data.doubted_rows()[0][0].shape)
