"""The probes by the names that files and the command line have for them."""

from __future__ import annotations

from .knn import KNN
from .linear_probe import LinearProbe
from .probe import Probe
from .ridge import Ridge

PROBES: dict[str, Probe] = {"knn": KNN(), "ridge": Ridge(), "linear": LinearProbe()}
