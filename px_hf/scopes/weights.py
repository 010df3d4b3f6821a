"""Scopes of single weights: all together, within each layer, within each output of a layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import Tensor

from ..masks import Masks
from .ranking import Tensors, check_scores, check_within, count_to_keep, keep_top
from .scope import Scope, check_min_layer_density, check_sparsity


class WeightScope(Scope):
    """A scope that ranks weights one by one: its counts are exact."""

    @classmethod
    def parse(cls, text: str) -> Scope | None:
        return cls() if text in cls.texts else None

    @property
    def name(self) -> str:
        return self.texts[0]

    def choose(
        self,
        scores: Mapping[str, Tensor],
        sparsity: float,
        *,
        within: Masks | None = None,
        min_layer_density: float = 0.0,
        final: bool = True,
    ) -> Masks:
        """See `Scope.choose` and, for what is exact, `px_hf.select`."""
        density = 1 - Fraction(repr(check_sparsity(sparsity)))
        check_scores(scores)
        self.check_step(scores, sparsity, final)
        if within is not None:
            check_within(within, scores)
        floor = Fraction(repr(check_min_layer_density(min_layer_density, sparsity)))
        return Masks(self.keep(scores, density, {} if within is None else within.tensors, floor))

    def check_step(self, scores: Tensors, sparsity: float, final: bool) -> None:
        """Whether `keep` can be asked.

        Raises:
            InvalidArgumentError, TargetError: it cannot.
        """

    @abstractmethod
    def keep(self, scores: Tensors, density: Fraction, within: Tensors, floor: Fraction) -> dict[str, Tensor]:
        """The masks that keep ``density`` of the weights.

        Args:
            scores: checked: non-negative and finite.
            density: the fraction to keep, in (0, 1].
            within: what may be kept; no entry = everything.
            floor: the fraction of each tensor to keep in any case.
        """


@dataclass(frozen=True)
class Global(WeightScope):
    """All weights compete with each other; ``min_layer_density`` keeps the best of each layer in any case."""

    texts: ClassVar[tuple[str, ...]] = ("global",)

    def keep(self, scores: Tensors, density: Fraction, within: Tensors, floor: Fraction) -> dict[str, Tensor]:
        count = count_to_keep(scores, density)
        if not floor:
            return keep_top(scores, count, within)
        masks = Layer().keep(scores, floor, within, floor)
        count -= sum(int(mask.count_nonzero()) for mask in masks.values())
        rest = {name: ~mask & within[name] if within else ~mask for name, mask in masks.items()}
        for name, mask in keep_top(scores, max(0, count), rest).items():
            masks[name] |= mask
        return masks


@dataclass(frozen=True)
class Layer(WeightScope):
    """The weights of a layer compete: every layer has the same sparsity, to one weight."""

    texts: ClassVar[tuple[str, ...]] = ("layer",)

    def keep(self, scores: Tensors, density: Fraction, within: Tensors, floor: Fraction) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, score in scores.items():
            masks |= keep_top({name: score}, count_to_keep({name: score}, density), within)
        return masks


@dataclass(frozen=True)
class Row(WeightScope):
    """The weights of an output (the first axis of a weight) compete.

    Rows of a tensor may differ by one weight, so that the tensor as a whole has the count of `Layer`.
    """

    texts: ClassVar[tuple[str, ...]] = ("row",)

    def keep(self, scores: Tensors, density: Fraction, within: Tensors, floor: Fraction) -> dict[str, Tensor]:
        masks: dict[str, Tensor] = {}
        for name, score in scores.items():
            outputs = score.shape[0] if score.dim() else 1
            rows = score.detach().abs().reshape(outputs, score.numel() // max(1, outputs))
            if within:
                rows = rows.masked_fill(~within[name].to(rows.device).view_as(rows), -1)
            place = rows.argsort(stable=True, dim=1, descending=True).argsort(dim=1)
            each, more = divmod(count_to_keep({name: score}, density), max(1, outputs))
            counts = each + (torch.arange(outputs, device=rows.device) < more).to(torch.int64)
            masks[name] = ((place < counts[:, None]) & (rows >= 0)).view(score.shape).cpu()
        return masks
