"""A plain optimizer for what least squares cannot do: several layers at once, and what is between them.

Adam minimises an `Objective` over the kept weights, biases, norms and scales of a part of the network, from where
`px_hf.repair.layers` has left them. Gradients of pruned weights are zero, so these stay zero. The step is warmed up
over a tenth of the steps and then falls to zero in a straight line. Best of what was seen on the images held out, the
start included, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import processes
from ..scoring.sums import sum_aligned_
from .images import Part
from .outcome import LayerRepair
from .walk import Walk

_CHECKS = 4
"""How often the images held out are looked at."""


class Objective(Protocol):
    """What the sparse network is to come near.

    Attributes:
        name: in the report.
        trained: names of the parameters that may change.
    """

    name: str
    trained: Sequence[str]

    def distance(self, part: Part, epoch: int | None = None) -> Tensor:
        """The loss, a mean over the images of a part, times their number; ``epoch``: as it is fitted to in that one.

        It is the square of a relative error.
        """
        ...


@dataclass(frozen=True)
class Adam:
    """Settings: ``epochs`` over the images, in steps of at least ``images`` of them, with step ``rate``."""

    epochs: int
    rate: float
    images: int = 16

    def repair_(self, walk: Walk, objective: Objective, masks: Mapping[str, Tensor]) -> LayerRepair:
        """Repair, in the tensors of the sparse network."""
        sparse = walk.networks["sparse"]
        names = objective.trained
        start = {name: sparse.parameter(name).detach().clone() for name in names}
        kept = {name: masks[name].to(start[name].device) for name in names if name in masks}
        fitted = [part for part in walk.parts if not part.held_out]
        apart = [part for part in walk.parts if part.held_out]
        sparse.tensors |= start
        first, before = _error(walk, objective, fitted), _error(walk, objective, apart)
        best, at_best = before, start
        leaves = {name: value.clone().requires_grad_(True) for name, value in start.items()}
        optimizer = torch.optim.Adam(leaves.values(), lr=self.rate, betas=(0.9, 0.95))
        batches = self._batches(walk.images)
        total = self.epochs * len(batches)
        done = 0
        for epoch in range(self.epochs):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch)).tolist()
            for number in order:
                done += 1
                warm = min(1.0, done / math.ceil(total / 10))
                optimizer.param_groups[0]["lr"] = self.rate * warm * (1 - (done - 1) / total)
                sparse.tensors |= leaves
                mine = [part for part in fitted if part.key in batches[number]]
                _gradients_(objective, mine, epoch, leaves, kept)
                optimizer.step()
            if epoch + 1 == self.epochs or (epoch + 1) % math.ceil(self.epochs / _CHECKS) == 0:
                sparse.tensors |= {name: _masked(leaf, kept.get(name)) for name, leaf in leaves.items()}
                now = _error(walk, objective, apart)
                if now < best or math.isnan(before):
                    best, at_best = now, {name: sparse.tensors[name] for name in names}
        sparse.tensors |= at_best
        if processes().world_size > 1:
            for name in names:
                dist.broadcast(sparse.tensors[name], src=0)
        return LayerRepair(
            objective.name, rows=sum(part.images for part in fitted), inputs=0, error_before=first,
            error_after=_error(walk, objective, fitted), held_out_before=before, held_out_after=best,
            repaired=at_best is not start,
        )  # fmt: skip

    def _batches(self, parts: Sequence[Part]) -> list[set[str]]:
        """Keys of the parts of all processes that make one step, in the order of the images."""
        batches: list[set[str]] = []
        images = self.images
        for part in parts:
            if part.held_out:
                continue
            if images >= self.images:
                batches.append(set())
                images = 0
            batches[-1].add(part.key)
            images += part.images
        return batches


def _gradients_(
    objective: Objective, parts: Sequence[Part], epoch: int, leaves: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> None:
    """Put them into ``leaves``: the sum over the parts, whichever process has them, exact in any order."""
    sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
    for part in parts:
        with torch.enable_grad():
            loss = objective.distance(part, epoch)
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                sums[name] += gradient
    sum_aligned_(sums, 0)
    for name, leaf in leaves.items():
        leaf.grad = _masked(sums[name], kept.get(name)).to(leaf.dtype)


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    value = value.detach()
    return value.clone() if mask is None else torch.where(mask, value, 0.0)


def _error(walk: Walk, objective: Objective, parts: Sequence[Part]) -> float:
    """The root of the mean distance over the images of all processes; NaN if there are none."""
    sums = {"error": torch.zeros(2, dtype=torch.float64, device=walk.device)}
    with torch.no_grad():
        for part in parts:
            distance = objective.distance(part).double()
            sums["error"] += torch.stack((distance, torch.tensor(part.images).to(walk.device)))
    sum_aligned_(sums, 0)
    error, images = sums["error"].tolist()
    return math.sqrt(error / images) if images else math.nan
