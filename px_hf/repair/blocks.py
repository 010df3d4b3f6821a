"""Block by block: the output of a whole residual block of the dense network is matched, by a plain optimizer.

In running order, for block B with inputs x̂ in the network as it is pruned and repaired so far, and x in the dense one,
Adam minimises over the kept weights, biases and norm parameters of the block

    ‖B̂(x̂) − B(x)‖² / ‖B(x)‖²,

from where `px_hf.repair.layers` has left them. Gradients of pruned weights are zero, so these stay zero. The step is
warmed up over a tenth of the steps and then falls to zero in a straight line. Best of what was seen on the images held
out, the start included, is kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import processes
from ..model.wrappers import named_parameters
from ..scoring.sums import sum_aligned_
from .images import Part
from .outcome import LayerRepair
from .probe import Record, Visit
from .walk import Walk, tensors_in

_CHECKS = 4
"""How often the images held out are looked at."""


@dataclass(frozen=True)
class Adam:
    """Settings: ``epochs`` over the images, in steps of at least ``images`` of them, with step ``rate``."""

    epochs: int
    rate: float
    images: int = 16

    def repair_(self, walk: Walk, path: str, masks: Mapping[str, Tensor]) -> LayerRepair:
        """Repair the module that the walk stands at, in the tensors of the sparse network."""
        sparse = walk.networks["sparse"]
        names = _trained(walk, path)
        start = {name: sparse.parameter(name).detach().clone() for name in names}
        kept = {name: masks[name].to(start[name].device) for name in names if name in masks}
        for part in walk.parts:
            target = walk.networks["dense"].run(lambda part=part: walk.forward("dense", part))
            walk.states.put(f"target-{part.key}", tensors_in(target)[:1])
        fitted = [part for part in walk.parts if not part.held_out]
        apart = [part for part in walk.parts if part.held_out]
        sparse.tensors |= start
        first, before = _error(walk, fitted), _error(walk, apart)
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
                self._step(walk, [part for part in fitted if part.key in batches[number]], leaves, kept)
                optimizer.step()
            if epoch + 1 == self.epochs or (epoch + 1) % math.ceil(self.epochs / _CHECKS) == 0:
                sparse.tensors |= {name: _masked(leaf, kept.get(name)) for name, leaf in leaves.items()}
                now = _error(walk, apart)
                if now < best or math.isnan(before):
                    best, at_best = now, {name: sparse.tensors[name] for name in names}
        sparse.tensors |= at_best
        if processes().world_size > 1:
            for name in names:
                dist.broadcast(sparse.tensors[name], src=0)
        return LayerRepair(
            path, rows=sum(part.images for part in fitted), inputs=0, error_before=first,
            error_after=_error(walk, fitted), held_out_before=before, held_out_after=best,
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

    def _step(
        self, walk: Walk, parts: Sequence[Part], leaves: Mapping[str, Tensor], kept: Mapping[str, Tensor]
    ) -> None:
        """Put the gradient into ``leaves``: the sum over the parts, whichever process has them, exact in any order."""
        sparse = walk.networks["sparse"]
        sparse.tensors |= leaves
        sums = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in leaves.items()}
        for part in parts:
            with torch.enable_grad():
                loss = _distance(walk, part)
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            for name, gradient in zip(leaves, found, strict=True):
                if gradient is not None:
                    sums[name] += gradient
        sum_aligned_(sums, 0)
        for name, leaf in leaves.items():
            leaf.grad = _masked(sums[name], kept.get(name)).to(leaf.dtype)


def blocks_of(record: Record) -> list[str]:
    """Children of a list or sequence of modules, of a class that comes twice or more, around two layers or more.

    Of two that lie in each other the inner one is meant, which is what `route` finds cheaper.
    """
    times = sorted(time for layer in record.layers.values() for time in layer.times)

    def layers(visit: Visit) -> int:
        return sum(visit.start < time < visit.end for time in times)

    found = [visit for visit in record.visits if visit.path.rpartition(".")[2].isdigit() and layers(visit) > 1]
    kinds = [visit.kind for visit in found]
    return [visit.path for visit in found if kinds.count(visit.kind) > 1]


def _trained(walk: Walk, path: str) -> list[str]:
    """Parameters of the block: those that are repaired already, and vectors (biases, norms, scales)."""
    sparse = walk.networks["sparse"]
    inside = set(walk.module("sparse").parameters())
    own = named_parameters(sparse.model)
    return [
        name
        for name, parameter in own.items()
        if parameter in inside and parameter.is_floating_point() and (name in sparse.tensors or parameter.dim() <= 1)
    ]


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    value = value.detach()
    return value.clone() if mask is None else torch.where(mask, value, 0.0)


def _distance(walk: Walk, part: Part) -> Tensor:
    """‖B̂(x̂) − B(x)‖² / ‖B(x)‖² of the images of a part, times their number."""
    target = walk.states.get(f"target-{part.key}", walk.device)[0].float()
    output = walk.networks["sparse"].run(lambda: walk.forward("sparse", part))
    gap = tensors_in(output)[0].float() - target
    return part.images * gap.square().mean() / target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _error(walk: Walk, parts: Sequence[Part]) -> float:
    """The root of the mean of that over the images of all processes; NaN if there are none."""
    sums = {"error": torch.zeros(2, dtype=torch.float64, device=walk.device)}
    with torch.no_grad():
        for part in parts:
            sums["error"] += torch.stack((_distance(walk, part).double(), torch.tensor(part.images).to(walk.device)))
    sum_aligned_(sums, 0)
    error, images = sums["error"].tolist()
    return math.sqrt(error / images) if images else math.nan
