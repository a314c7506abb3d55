"""A network by its class, by the import path of that, or with settings: made for some sizes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

from torch import nn

__all__ = ["Network", "NetworkMaker", "plain"]

# What makes a network: the import path of a class, a mapping of ``class``, such a path, and of
# settings, a class or another function; or a network that is ready. LightningCLI takes the first
# that fits, so paths come first.
Network = str | dict[str, Any] | nn.Module | Callable[..., nn.Module]


@dataclass(frozen=True)
class NetworkMaker:
    """What makes a network once the sizes of the data are known.

    Attributes:
        make: A class of networks, or a function that returns one.
        settings: Its arguments that are no sizes; sizes among them are compared with the data's.
    """

    make: Callable[..., nn.Module]
    settings: dict[str, Any]

    @classmethod
    def read(cls, network: str | Mapping[str, Any] | Callable[..., nn.Module]) -> "NetworkMaker":
        """Return what makes a network.

        Args:
            network: See `Network`.

        Raises:
            TypeError: If it is nothing of that kind.
            ValueError: If no class of networks is found, or it has no such setting.
        """
        made = cls(network, {}) if callable(network) else None
        if isinstance(network, str):
            made = cls(_import_class(network), {})
        elif isinstance(network, Mapping):
            settings = plain(network)
            made = cls(_import_class(settings.pop("class", None)), settings)
        elif isinstance(network, partial) and not network.args:
            made = cls(network.func, dict(network.keywords))
        if made is None or not _is_called_by_names(made.make):
            raise TypeError(
                "Expected `network` to be a network, a class or the import path of one, but got "
                f"{network!r}. Pass `ResNet18` of `saflex_lightning.recipes`, for instance."
            )
        if unknown := sorted(name for name in made.settings if not made.takes(name)):
            raise ValueError(
                f"Expected settings of {made.name} in `network`, which are "
                f"{sorted(signature(made.make).parameters)}, but got {unknown}. Correct them."
            )
        return made

    @property
    def name(self) -> str:
        """What messages call it."""
        return getattr(self.make, "__name__", type(self.make).__name__)

    def takes(self, name: str) -> bool:
        """Say whether there is an argument of a name."""
        accepted = signature(self.make).parameters
        takes_all = any(each.kind is Parameter.VAR_KEYWORD for each in accepted.values())
        return takes_all or name in accepted

    def build(self, sizes: Mapping[str, Any]) -> nn.Module:
        """Return the network; of the sizes it gets those that are arguments of it.

        Args:
            sizes: What ``sizes()`` of the datamodule returns.

        Raises:
            TypeError: If what is made is no network.
            ValueError: If a setting is another size than that of the data, or one is missing.
        """
        told = {name: size for name, size in sizes.items() if self.takes(name)}
        given = {**told, **self.settings}
        if wrong := [name for name in told if given[name] != told[name]]:
            raise ValueError(
                f"Expected {wrong} of `network` to be {[told[name] for name in wrong]}, as the "
                f"data have, but got {[given[name] for name in wrong]}. Leave it out: the data "
                "tell."
            )
        parameters = signature(self.make).parameters.values()
        needed = {each.name for each in parameters if _is_needed(each)}
        if missing := sorted(needed - given.keys()):
            raise ValueError(
                f"Expected the data or the settings to tell {missing} of {self.name}, but the "
                f"data tell {sorted(sizes)}. Choose a network for such data, or pass {missing}."
            )
        network: Any = self.make(**given)
        if not isinstance(network, nn.Module):
            raise TypeError(
                f"Expected {self.name} to return a network, but got {type(network).__name__}. Pass "
                "what makes an `nn.Module`."
            )
        return network


def plain(value: Any) -> Any:
    """Return mappings and sequences, of a config for instance, as dictionaries and lists."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    return value


def _import_class(path: Any) -> type[nn.Module]:
    if isinstance(path, str):
        module, _, name = path.rpartition(".")
        try:
            found = getattr(import_module(module), name, None) if module else None
        except ImportError:
            found = None
        # Nothing else is called by a name, which may come from a checkpoint.
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
    raise ValueError(
        "Expected `class` of `network` to be the import path of a class of networks, but got "
        f"{path!r}. Pass 'saflex_lightning.recipes.ResNet18', for instance."
    )


def _is_called_by_names(make: Callable[..., Any]) -> bool:
    try:
        parameters = signature(make).parameters.values()
    except ValueError:  # a built-in one
        return False
    return all(each.kind is not Parameter.POSITIONAL_ONLY for each in parameters)


def _is_needed(parameter: Parameter) -> bool:
    by_name = parameter.kind in {Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY}
    return by_name and parameter.default is Parameter.empty
