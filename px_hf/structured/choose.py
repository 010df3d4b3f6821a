"""Which units to keep: scores of weights in, masks of whole units out.

The score of a unit is the mean, over its kept weights, of the scores of these weights. With PX at power 1 that is the
path flow through the unit, which each of its matrices receives once (docs/MATHEMATICS.md, 5.4), for each weight that
it costs: the ranking keeps as much flow as it can for a number of weights, and a head competes with hidden units by
what it costs. docs/STRUCTURED.md has the theorem and its limits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from ..errors import TargetError
from ..masks import Masks
from .units import Family, unread

STRUCTURED: Final = ("structured", "structured:uniform")
"""Scopes: all units ranked together; hidden units and channels, no heads, the same share of every layer."""

MULTIPLE: Final = 8
"""In layers of 64 units or more the uniform scope keeps a multiple of this, which kernels like."""


def choose_units(
    scores: Mapping[str, Tensor],
    families: Sequence[Family],
    *,
    sparsity: float,
    scope: str = "structured",
    within: Masks | None = None,
    min_layer_density: float = 0.0,
    power: int = 1,
) -> Masks:
    """Masks that prune the units of the lowest scores: as many as make up at most `sparsity` of the scored weights.

    `scores`: parameter name -> scores, as for `px_hf.select`. `scope`: one of `STRUCTURED`. `within`: units that it
    prunes stay pruned. `min_layer_density`: the share of each layer's units that stays in any case; at least one does.
    `power`: a unit adds up the scores of its weights to that power.

    The next unit in the ranking (of the uniform scope: the next narrower width) would exceed `sparsity`.
    """
    families = [family for family in _eligible(families, scope) if family.weights(scores) == family.matrices]
    masks = {name: torch.ones(score.shape, dtype=torch.bool) for name, score in scores.items()}
    if within is not None:
        masks |= {name: within[name] for name in scores}
    gone = {family: unread(family, masks) for family in families}
    values = {family: unit_scores(family, scores, masks, power) for family in families}
    least = {family: _least(family, scope, min_layer_density) for family in families}
    choose = _alike if scope == STRUCTURED[1] else _together
    choose(values, gone, least, sparsity, scores)
    for family in families:
        for part in family.parts:
            if part.tensor in masks:
                masks[part.tensor].index_fill_(part.axis, part.index[gone[family]].flatten(), False)
    return Masks(masks)


def check_reachable(
    families: Sequence[Family], weights: Mapping[str, Tensor], *, scope: str, sparsity: float, min_layer_density: float
) -> None:
    """Raises TargetError if there is no unit to choose from, or too few to prune `sparsity` of `weights`."""
    families = _eligible(families, scope)
    if not families:
        raise TargetError(
            f"scope={scope!r}: the model has no unit that can be taken out whole. That takes a hidden layer between "
            "two prunable weights that meets nothing else, or attention with two heads or more, in separate "
            "operations. Use scope='global' or 'layer'."
        )
    sizes = _Sizes(weights)
    for family in families:
        sizes.remove(family, family.size - _least(family, scope, min_layer_density))
    most = sizes.removed / sizes.total
    if sparsity > most:
        raise TargetError(
            f"sparsity={sparsity:g} is out of reach with scope={scope!r}: where "
            f"{f'{min_layer_density:g}' if min_layer_density else 'one unit'} of each layer stays, its units hold "
            f"{most:.4f} of the prunable weights. Ask for less, or use scope='global' or 'layer'."
        )


def unit_scores(family: Family, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], power: int = 1) -> Tensor:
    """The mean, over the kept weights of each unit, of their scores to the power `power`: float64 [units]."""
    total, count = torch.zeros(2, family.size, dtype=torch.float64)
    for part in family.parts:
        if part.tensor in scores:
            powers = scores[part.tensor].detach().double().pow(power)
            total += powers.movedim(part.axis, 0).flatten(1).sum(1).cpu()[part.index].sum(1)
            count += masks[part.tensor].movedim(part.axis, 0).flatten(1).sum(1)[part.index].sum(1)
    return total / count.clamp(min=1)


def _eligible(families: Sequence[Family], scope: str) -> list[Family]:
    return [family for family in families if not (scope == STRUCTURED[1] and family.heads)]


def _least(family: Family, scope: str, share: float) -> int:
    """How many units stay in any case."""
    least = max(1, math.ceil(share * family.size - 1e-9))
    return _rounded(least, family) if scope == STRUCTURED[1] else least


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
