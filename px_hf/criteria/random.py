"""Random: the control that every criterion must beat.

With ``densities="erk"`` the layers get the densities of Erdős-Rényi-Kernel (Evci et al., RigL, ICML 2020, arXiv
1911.11134; Mocanu et al., 2018), those of a layer of shape [o, i, h, w]:

    min(1, ε · (o + i + h + w) / (o · i · h · w)),    ε such that the total is as asked for.

A score (o + i + h + w)/(o · i · h · w) / u, with u uniform on {1/n, ..., 1}, passes 1/ε exactly if u is below that
density: with scope ``"global"`` this is ERK for any sparsity, exact to one weight in each layer. Uniform densities
are ``Random()`` with scope ``"layer"``."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..errors import InvalidArgumentError
from ..scoring.given import Given
from .base import Criterion


@dataclass(frozen=True)
class Random(Criterion):
    """``S(θ)`` random, independent of weights and data.

    Args:
        seed: of the random numbers.
        densities: ``"equal"``, scores uniform in (0, 1), or ``"erk"``, which prunes small layers less.

    The scores of a parameter depend on ``seed``, its name and its shape alone: the same on every
    process, device and run.

    Raises:
        InvalidArgumentError: unknown ``densities``.
    """

    seed: int = 0
    densities: Literal["equal", "erk"] = "equal"
    iterative: ClassVar[bool] = False
    needs_data: ClassVar[bool] = False
    by_layer: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.densities not in ("equal", "erk"):
            raise InvalidArgumentError(f"Random(densities={self.densities!r}): expected 'equal' or 'erk'.")

    def formula(self, given: Given) -> dict[str, Tensor]:
        scores = {}
        for name, p in given.targets().items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{name}".encode()))
            if self.densities == "erk":
                places = torch.randperm(p.numel(), generator=generator).view(p.shape).double()
                random = sum(p.shape) / (places + 1)  # (Σ shape / n) / (place / n)
            else:
                random = torch.rand(p.shape, generator=generator).clamp(min=2**-24)
            scores[name] = random.to(p.device)
        return scores
