"""Magnitude: the absolute value of each weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..scoring.given import Given
from .base import Criterion


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``S(θ) = |θ|``. Needs no data. (Janowsky 1989; Han et al. 2015, arXiv 1506.02626.)

    Of a whole unit it is the mean square of its weights, ``unit_power`` 2.
    """

    unit_power: ClassVar[int | None] = 2
    iterative: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True

    def formula(self, given: Given) -> dict[str, Tensor]:
        return {name: weight.abs() for name, weight in given.weights().items()}
