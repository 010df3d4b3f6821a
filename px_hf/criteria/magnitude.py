"""Magnitude: the absolute value of each weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..model.inputs import Batches
from ..model.targets import prunable
from ..scoring.masking import masked
from .base import Criterion


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``S(θ) = |θ|``. Needs no data. (Janowsky 1989; Han et al. 2015, arXiv 1506.02626.)

    Of a whole unit it is the mean square of its weights, ``unit_power`` 2.
    """

    unit_power: ClassVar[int | None] = 2
    iterative: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False

    def score(
        self,
        model: nn.Module,
        batches: Batches = (),
        *,
        masks: Mapping[str, Tensor] | None = None,
        prune_head: bool = False,
    ) -> dict[str, Tensor]:
        masks = masks or {}
        return {name: masked(p, masks.get(name)).abs() for name, p in prunable(model, prune_head).items()}
