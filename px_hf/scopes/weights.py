"""Scopes of single weights: all together, within each layer, within each output of a layer. Their counts are exact."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from .base import Scope, Step
from .ranking import count_to_keep, keep_top, keep_top_of_each, kept


@dataclass(frozen=True)
class Global(Scope):
    """All weights compete with each other; ``min_layer_density`` keeps the best of each layer in any case."""

    texts: ClassVar[tuple[str, ...]] = ("global",)
    by_counts: ClassVar[bool] = True

    def keep(self, step: Step) -> dict[str, Tensor]:
        scores, within = step.scores, step.within
        count, floor = count_to_keep(scores, step.density, step.held), Fraction(repr(step.min_layer_density))
        if not floor:
            return keep_top(scores, count, within, step.held)
        masks = keep_top_of_each(scores, floor, within, step.held)
        count -= kept(masks, masks, step.held)
        rest = {name: ~mask & within[name] if within else ~mask for name, mask in masks.items()}
        for name, mask in keep_top(scores, max(0, count), rest, step.held).items():
            masks[name] |= mask
        return masks


@dataclass(frozen=True)
class Layer(Scope):
    """The weights of a layer compete: every layer has the same sparsity, to one weight."""

    texts: ClassVar[tuple[str, ...]] = ("layer",)
    by_counts: ClassVar[bool] = True

    def keep(self, step: Step) -> dict[str, Tensor]:
        return keep_top_of_each(step.scores, step.density, step.within, step.held)


@dataclass(frozen=True)
class Row(Scope):
    """The weights of an output (the first axis of a weight) compete.

    Rows of a tensor may differ by one weight, so that the tensor as a whole has the count of `Layer`.
    """

    texts: ClassVar[tuple[str, ...]] = ("row",)

    def keep(self, step: Step) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, score in step.scores.items():
            outputs = score.shape[0] if score.dim() else 1
            rows = score.detach().abs().reshape(outputs, score.numel() // max(1, outputs))
            if step.within:
                rows = rows.masked_fill(~step.within[name].to(rows.device).view_as(rows), -1)
            place = rows.argsort(stable=True, dim=1, descending=True).argsort(dim=1)
            each, more = divmod(count_to_keep({name: score}, step.density), max(1, outputs))
            counts = each + (torch.arange(outputs, device=rows.device) < more).to(torch.int64)
            masks[name] = ((place < counts[:, None]) & (rows >= 0)).view(score.shape).cpu()
        return masks
