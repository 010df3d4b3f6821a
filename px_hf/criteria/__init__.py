"""Pruning criteria: frozen objects that score weights, one file each."""

from __future__ import annotations

from .base import Criterion
from .magnitude import Magnitude
from .px import PX
from .random import Random

CRITERIA: dict[str, Criterion] = {
    "px": PX(),
    "px-active": PX(paths="active", power=0.25),
    "magnitude": Magnitude(),
    "random": Random(),
}
"""Names for files and the command line."""

__all__ = ["CRITERIA", "PX", "Criterion", "Magnitude", "Random"]
