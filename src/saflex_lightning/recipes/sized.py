"""Modules whose layers are made once the data have told their sizes."""

import json
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from saflex_lightning.data.checks import check
from saflex_lightning.recipes.network import plain

__all__ = ["SizedModule"]


class SizedModule(L.LightningModule):
    """A module that is built for the sizes of the data: columns, levels, classes, channels.

    A Trainer asks ``sizes()`` of the datamodule. They are kept in the state dictionary, so that
    checkpoints, and what a spawned process sends back, can be loaded where no datamodule tells.
    """

    built_for: dict[str, Any] | None = None

    def make_layers(self, sizes: dict[str, Any]) -> None:
        """Make everything that has a size; ``sizes`` has ``num_classes`` at least."""
        raise NotImplementedError

    def build(self, sizes: Mapping[str, Any]) -> None:
        """Make the layers; where they are there, compare what they were made for.

        Args:
            sizes: What ``sizes()`` of the datamodule returns.

        Raises:
            ValueError: If the layers were made for other sizes, or these do not fit the settings.
        """
        told, built_for = dict(plain(sizes)), self.built_for
        if "num_classes" not in told:
            raise ValueError(
                f"Expected sizes of the data with `num_classes`, but got {told}. Add it to what "
                "`sizes()` returns."
            )
        if built_for is None:
            with torch.device("cpu"):  # the same draws whatever the Trainer trains on
                self.make_layers(told)
            self.built_for = told
            return
        other = {name: size for name, size in told.items() if built_for.get(name, size) != size}
        if other:
            raise ValueError(
                f"Expected the sizes that the model was built for, {built_for}, but got {other} "
                "from the data or a checkpoint. Make a model for these, and leave sizes out of its "
                "settings."
            )

    def configure_model(self) -> None:
        """Build the layers for the Trainer's datamodule.

        Raises:
            MisconfigurationException: If they are not built and no datamodule tells their sizes.
        """
        if self._trainer is None:  # a checkpoint is loaded, which tells
            return
        datamodule = getattr(self.trainer, "datamodule", None)
        tell = getattr(datamodule, "sizes", None)
        if tell is not None:
            self.build(tell())
        elif self.built_for is None:
            found = "there is none" if datamodule is None else f"got {type(datamodule).__name__}"
            raise MisconfigurationException(
                "Expected a datamodule with a method `sizes()` that tells what the model is built "
                f"for, as {{'num_classes': 8}}, but {found}. Add the method, or pass a network "
                "that is ready and its `num_classes`."
            )

    def get_extra_state(self) -> Tensor:
        """Return the sizes as a tensor of characters, which whatever copies tensors can copy."""
        return torch.tensor(
            list(json.dumps(self.built_for, default=int).encode()), dtype=torch.uint8
        )

    def set_extra_state(self, state: Tensor) -> None:
        """Build the layers before their state is loaded.

        Args:
            state: What `get_extra_state` returned.

        Raises:
            ValueError: If it is something else.
        """
        try:
            sizes = json.loads(bytes(state.tolist()))
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                "Expected the sizes that the model was built for in the checkpoint, but they "
                f"cannot be read ({error}). The file is damaged or was edited; take another one."
            ) from error
        if sizes is not None:
            check("a mapping of names to values", sizes=sizes)
            self.build(sizes)
