"""The scopes of whole units: hidden units, attention heads and channels, which `px_hf.shrink` then takes out.

The score of a unit is the mean, over its kept weights, of the scores of these weights. With PX at power 1 that is the
path flow through the unit, which each of its matrices receives once (docs/MATHEMATICS.md, 5.4), for each weight that
it costs: the ranking keeps as much flow as it can for a number of weights, and a head competes with hidden units by
what it costs. docs/STRUCTURED.md has the theorem and its limits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import torch
from torch import Tensor, nn

from ..criteria import Criterion
from ..errors import InvalidArgumentError, TargetError
from ..model.example import example_of
from ..model.inputs import Batches
from ..structured.heads import with_counts
from ..structured.units import Family, trace_units, unread
from .base import Scope, Step, check_adds_up

MULTIPLE: Final = 8
"""In layers of 64 units or more the uniform scope keeps a multiple of this, which kernels like."""


@dataclass(frozen=True)
class Units(Scope):
    """All units of the model compete; ``min_layer_density`` is the share of each layer's units that stays in any case.

    Args:
        uniform: prune the same share of every layer instead, of hidden units and channels; heads stay.
    """

    uniform: bool = False
    texts: ClassVar[tuple[str, ...]] = ("structured", "structured:uniform")
    whole_units: ClassVar[bool] = True

    @classmethod
    def parse(cls, text: str) -> Scope | None:
        return cls(uniform=text == cls.texts[1]) if text in cls.texts else None

    @property
    def name(self) -> str:
        return self.texts[self.uniform]

    def check_criterion(self, criterion: Criterion) -> None:
        check_adds_up(criterion, self, "units")

    def begin(self, model: nn.Module, batches: Batches, targets: Mapping[str, Tensor], criterion: Criterion) -> Scope:
        """The scope with the units of the model, found by running it on one image of ``batches``, or on zeros."""
        batch = next(iter(batches), None) if not isinstance(batches, Iterator) else None
        inputs = example_of(model, batch)
        families = with_counts(model, inputs, trace_units(model, inputs, targets))
        return UnitsOfModel(self.uniform, tuple(families), criterion.unit_power or 1)

    def keep(self, step: Step) -> dict[str, Tensor]:
        """Not from scores alone: see `begin`.

        Raises:
            InvalidArgumentError: always.
        """
        raise InvalidArgumentError(
            f"scope={self.name!r} chooses among the units of a model, which scores alone do not tell. Use px.prune."
        )


@dataclass(frozen=True)
class UnitsOfModel(Units):
    """`Units` that knows the units of one model. ``power``: a unit adds up the scores of its weights to that power."""

    families: tuple[Family, ...] = ()
    power: int = 1

    def check_budget(self, targets: Mapping[str, Tensor], sparsity: float, min_layer_density: float) -> None:
        """Whether there are units, and enough of them.

        Raises:
            TargetError: there is no unit to choose from, or they hold less than ``sparsity`` of the weights.
        """
        families = _eligible(self.families, self.uniform)
        if not families:
            raise TargetError(
                f"scope={self.name!r}: the model has no unit that can be taken out whole. That takes a hidden layer "
                "between two prunable weights that meets nothing else, or attention with two heads or more, in "
                "separate operations. Use scope='global' or 'layer'."
            )
        sizes = _Sizes(targets)
        for family in families:
            sizes.remove(family, family.size - _least(family, self.uniform, min_layer_density))
        most = sizes.removed / sizes.total
        if sparsity > most:
            raise TargetError(
                f"sparsity={sparsity:g} is out of reach with scope={self.name!r}: where "
                f"{f'{min_layer_density:g}' if min_layer_density else 'one unit'} of each layer stays, its units hold "
                f"{most:.4f} of the prunable weights. Ask for less, or use scope='global' or 'layer'."
            )

    def keep(self, step: Step) -> dict[str, Tensor]:
        """The units of the lowest scores go: as many as make up at most the sparsity of the weights.

        The next unit in the ranking (of the uniform scope: the next narrower width) would be too much. Units that are
        pruned already stay pruned, and at least one unit of each layer stays.
        """
        scores = step.scores
        families = [f for f in _eligible(self.families, self.uniform) if f.weights(scores) == f.matrices]
        masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
        masks |= {name: mask.clone() for name, mask in step.within.items()}
        gone = {family: unread(family, masks) for family in families}
        values = {family: unit_scores(family, scores, masks, self.power) for family in families}
        least = {family: _least(family, self.uniform, step.min_layer_density) for family in families}
        choose = _alike if self.uniform else _together
        choose(values, gone, least, step.sparsity, scores)
        for family in families:
            for part in family.parts:
                if part.tensor in masks:
                    masks[part.tensor].index_fill_(part.axis, part.index[gone[family]].flatten(), False)
        return masks


def unit_scores(family: Family, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], power: int = 1) -> Tensor:
    """The mean, over the kept weights of each unit, of their scores to the power `power`: float64 [units]."""
    total, count = torch.zeros(2, family.size, dtype=torch.float64)
    for part in family.parts:
        if part.tensor in scores:
            powers = scores[part.tensor].detach().double().pow(power)
            total += powers.movedim(part.axis, 0).flatten(1).sum(1).cpu()[part.index].sum(1)
            count += masks[part.tensor].movedim(part.axis, 0).flatten(1).sum(1)[part.index].sum(1)
    return total / count.clamp(min=1)


def _eligible(families: Sequence[Family], uniform: bool) -> list[Family]:
    return [family for family in families if not (uniform and family.heads)]


def _least(family: Family, uniform: bool, share: float) -> int:
    """How many units stay in any case."""
    least = max(1, math.ceil(share * family.size - 1e-9))
    return _rounded(least, family) if uniform else least


def _rounded(count: int, family: Family) -> int:
    multiple = MULTIPLE if family.size >= 8 * MULTIPLE else 1
    return min(family.size, multiple * math.ceil(count / multiple))


class _Sizes:
    """How many weights are left while units are removed: a weight has two axes, whose removals overlap."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._shapes = {name: list(weight.shape) for name, weight in weights.items()}
        self.total = sum(map(math.prod, self._shapes.values()))
        self.removed = 0

    def cost(self, family: Family, units: int = 1) -> int:
        """How many weights would go with so many more units of a family."""
        before = {name: self._shapes[name] for name in family.weights(self._shapes)}
        return sum(map(math.prod, before.values())) - sum(map(math.prod, self._after(family, units).values()))

    def remove(self, family: Family, units: int = 1) -> None:
        """Remove so many more units of a family."""
        self.removed += self.cost(family, units)
        self._shapes |= self._after(family, units)

    def _after(self, family: Family, units: int) -> dict[str, list[int]]:
        shapes = {name: [*self._shapes[name]] for name in family.weights(self._shapes)}
        for part in family.parts:
            if part.tensor in shapes:
                shapes[part.tensor][part.axis] -= units * part.index.shape[1]
        return shapes


def _together(
    values: Mapping[Family, Tensor],
    gone: Mapping[Family, Tensor],
    least: Mapping[Family, int],
    sparsity: float,
    weights: Mapping[str, Tensor],
) -> None:
    """Mark as gone the units of the lowest value, of all families together, until the next would be too much."""
    sizes = _Sizes(weights)
    stay = {family: int((~mark).count_nonzero()) for family, mark in gone.items()}
    for family, count in stay.items():
        sizes.remove(family, family.size - count)
    units = [(family, unit) for family in values for unit in range(family.size)]
    order = torch.cat(list(values.values())).argsort(stable=True).tolist() if units else []
    already = {family: mark.tolist() for family, mark in gone.items()}
    for family, unit in (units[place] for place in order):
        if already[family][unit] or stay[family] <= least[family]:
            continue
        if sizes.removed + sizes.cost(family) > sparsity * sizes.total:
            break
        sizes.remove(family)
        stay[family] -= 1
        gone[family][unit] = True


def _alike(
    values: Mapping[Family, Tensor],
    gone: Mapping[Family, Tensor],
    least: Mapping[Family, int],
    sparsity: float,
    weights: Mapping[str, Tensor],
) -> None:
    """Mark as gone all but the best units of each family, the same share of each: the smallest that is enough."""
    steps = max((family.size for family in values), default=0)

    def widths(step: int) -> dict[Family, int]:
        return {f: max(least[f], _rounded(math.ceil(f.size * step / steps), f)) for f in values}

    def enough(step: int) -> bool:
        sizes = _Sizes(weights)
        for family, width in widths(step).items():
            sizes.remove(family, family.size - width)
        return sizes.removed <= sparsity * sizes.total

    step = next((step for step in range(steps + 1) if enough(step)), steps)
    for family, width in widths(step).items() if steps else ():
        alive = values[family].masked_fill(gone[family], -1)  # scores are not negative
        gone[family][alive.argsort(stable=True)[: family.size - width]] = True
