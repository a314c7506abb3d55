"""Where the values of a tensor can be looked at for nothing."""

from torch import Tensor

__all__ = ["looking_is_free"]


def looking_is_free(tensor: Tensor) -> bool:
    """Say whether a look at values does not wait for a device that works through its queue."""
    return tensor.device.type == "cpu"
