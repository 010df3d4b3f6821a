"""LAMP, layer-adaptive magnitude (Lee, Park, Mo, Ahn, Shin, ICLR 2021, arXiv 2010.07611).

    S(u; W) = W[u]² / Σ_{v ≥ u} W[v]²,   weights of one tensor W in ascending order

Magnitude within a layer, but comparable between layers: the share of a weight in what would be left of
its layer if all smaller ones were gone. Every layer's largest weight scores 1, so none is emptied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..scoring.given import Given
from .base import Criterion


@dataclass(frozen=True)
class LAMP(Criterion):
    """``S(u) = W[u]² / Σ_{v ≥ u} W[v]²`` in each tensor; scores in [0, 1], float64. Needs no data.

    Of equal weights the earlier one counts as the larger, so that `px_hf.select` breaks ties as ever.
    """

    iterative: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True

    def formula(self, given: Given) -> dict[str, Tensor]:
        return {name: _lamp(weight) for name, weight in given.weights().items()}


def _lamp(weight: Tensor) -> Tensor:
    largest = weight.abs().max().double()
    return shares((weight.double() / torch.where(largest > 0, largest, 1.0)).square())


def shares(amounts: Tensor) -> Tensor:
    """Each of some non-negative float64 amounts over the sum of those that are not smaller, 0 for 0; in [0, 1].

    Of equal amounts the earlier one counts as the larger.
    """
    flat = amounts.flatten()
    descending = flat.argsort(descending=True, stable=True)
    sums = flat[descending].cumsum(0)
    found = torch.empty_like(flat)
    found[descending] = flat[descending] / torch.where(sums > 0, sums, 1.0)
    return found.view(amounts.shape)
