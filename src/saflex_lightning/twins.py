"""Lightning is published twice, as `lightning.pytorch` and as `pytorch_lightning`: serve both.

Their classes have the same names and know nothing of one another, so that classes are told by name.
"""

__all__ = ["is_a", "overrides"]

_CORE = ("lightning.pytorch.core", "pytorch_lightning.core")


def is_a(instance: object, *names: str) -> bool:
    """Say whether a class of one of the names is among those of an object."""
    return any(cls.__name__ in names for cls in type(instance).__mro__)


def overrides(instance: object, name: str) -> bool:
    """Say whether a module or datamodule brings a method of its own in place of Lightning's."""
    if name in vars(instance):
        return True
    owners = (cls for cls in type(instance).__mro__ if name in vars(cls))
    owner = next(owners, None)
    return owner is not None and not owner.__module__.startswith(_CORE)
