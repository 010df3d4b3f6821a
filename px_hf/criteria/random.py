"""Random: the control that every criterion must beat."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..batches import Batches
from ..targets import prunable
from .base import Criterion, masked


@dataclass(frozen=True)
class Random(Criterion):
    """``S(θ)`` uniform in (0, 1), independent of weights and data.

    The scores of a parameter depend on ``seed``, its name and its shape alone: the same on every
    process, device and run.
    """

    seed: int = 0
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
        scores = {}
        for name, p in prunable(model, prune_head).items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
            uniform = torch.rand(p.shape, generator=generator).clamp(min=2**-24).to(p.device)
            scores[name] = masked(uniform, masks.get(name))
        return scores
