"""A choice between scores of which each process holds some rows: counts cross the wire, scores do not.

The border is found digit by digit from histograms that the processes add up (`px_hf.scopes.ranking`): 65,536 counts a
digit, two digits for 32-bit floats and four for float64. Of equal scores at the border each process learns how many
there are in each tensor before its own, so those that stay are the ones that stay on one process.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed import raise_together
from ..errors import PxError
from ..model.shards import Shards
from ..sharded_masks import ShardedMasks
from .base import Scope, Step, check_min_layer_density, check_sparsity
from .ranking import Held, check_scores


class Spread(Held):
    """Scores of which each process holds the rows that `px_hf.model.shards` says."""

    def __init__(self, shards: Shards, shapes: Mapping[str, torch.Size]) -> None:
        self._shards, self._shapes = shards, shapes

    def numel(self, name: str, score: Tensor) -> int:
        return self._shapes[name].numel()

    def total(self, counts: Tensor) -> Tensor:
        return self._shards.total(counts)

    def shares(self, counts: dict[str, int], number: int) -> dict[str, int]:
        """In the order of the tensors, and within one of the processes, whose rows follow one another."""
        each = self._shards.of_each(torch.tensor(list(counts.values()), dtype=torch.int64))
        flat = each.T.flatten()
        before = (flat.cumsum(0) - flat).view(each.T.shape)[:, self._shards.rank]
        own = torch.minimum(each[self._shards.rank], (number - before).clamp(min=0))
        return dict(zip(counts, own.tolist(), strict=True))


def choose_sharded(
    scope: Scope,
    parts: Mapping[str, Tensor],
    shapes: Mapping[str, torch.Size],
    shards: Shards,
    sparsity: float,
    *,
    within: ShardedMasks | None = None,
    min_layer_density: float = 0.0,
    final: bool = True,
) -> ShardedMasks:
    """`Scope.choose` of a scope that goes ``by_counts``, on every process with its rows of the scores.

    The masks are those of the whole scores.

    Raises:
        InvalidArgumentError, NonFiniteError: see `px_hf.select`; on every process.
    """
    sparsity = check_sparsity(sparsity)
    problem: PxError | None = None
    try:
        check_scores({name: part for name, part in parts.items() if part.numel()} or dict(parts))
    except PxError as error:
        problem = error
    raise_together(problem)
    floor = check_min_layer_density(min_layer_density, sparsity)
    kept = {} if within is None else within.parts
    masks = scope.keep(Step(parts, sparsity, kept, floor, final, Spread(shards, shapes)))
    return ShardedMasks(masks, shapes, shards)
