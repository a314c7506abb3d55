"""Engines: ways to compute how a batch's scores move along a direction of parameters."""

from .choose import make_engine
from .direction import descent_direction
from .errors import UnsupportedModelError

__all__ = ["UnsupportedModelError", "descent_direction", "make_engine"]
