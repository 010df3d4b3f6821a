"""A round of pruning where the weights are sharded over processes (FSDP2): what `px_hf.prune` does there.

Criteria that look at one layer at a time (`Criterion.by_layer`: magnitude, LAMP, random) score it from one gathered
layer after the other. All others run the network: for that each process gathers all weights, as one that is not
sharded has them. The scores are cut to the process's own rows, and the choice is made between these.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .criteria import Criterion
from .criteria.layers import each_layer
from .distributed import raise_together
from .errors import InvalidArgumentError, PxError, TargetError
from .masks import Masks
from .model.inputs import Batches
from .model.shards import Shards, gathered, is_sharded, local, whole
from .scopes import Scope
from .scopes.sharded import choose_sharded
from .sharded_masks import ShardedMasks


class ShardedRound:
    """Scores and choices of one pruning over a sharded model.

    Args:
        model: outside wrappers other than FSDP2.
        targets: its prunable weights.
        shards: how they are spread.
        scope: what chooses.

    Raises:
        InvalidArgumentError: the scope prunes whole units.
        TargetError: a prunable weight is not sharded, or not finite.
    """

    def __init__(self, model: nn.Module, targets: Mapping[str, Tensor], shards: Shards, scope: Scope) -> None:
        if scope.whole_units:
            raise InvalidArgumentError(
                f"scope={scope.name!r} takes out whole units, and {type(model).__name__} is sharded: prune it so, and "
                "px.shrink it, before fully_shard or accelerator.prepare. Scopes of weights work on sharded models: "
                "'global', 'layer', 'row', '2:4', 'block:32'."
            )
        if loose := [name for name, weight in targets.items() if not is_sharded(weight)]:
            raise TargetError(
                f"{len(loose)} prunable weight(s) of {type(model).__name__} are not sharded while others are, for "
                f"example {loose[0]!r}. Shard all of them: fully_shard without ignored_params."
            )
        self._model, self._shards, self._scope = model, shards, scope
        self._shapes = {name: weight.shape for name, weight in targets.items()}
        _require_finite(targets)

    def runs_network(self, criterion: Criterion) -> bool:
        """Whether all weights are gathered for a round."""
        return not (criterion.by_layer and self._scope.by_counts)

    def masks(
        self,
        criterion: Criterion,
        batches: Batches,
        targets: Mapping[str, Tensor],
        sparsity: float,
        *,
        within: Masks | None,
        min_layer_density: float,
        final: bool,
        prune_head: bool,
        named: Mapping[str, Any],
    ) -> ShardedMasks:
        """The masks of one round, each process its rows."""
        settings: dict[str, Any] = {"min_layer_density": min_layer_density, "final": final}
        before = (
            within if within is None or isinstance(within, ShardedMasks) else ShardedMasks.of(within, self._shards)
        )
        if not self.runs_network(criterion):
            getters = {name: functools.partial(whole, weight) for name, weight in targets.items()}
            scores = each_layer(criterion, self._model, getters, _nothing if before is None else before.one)
            parts = {name: self._shards.part(score).clone() for name, score in scores}
        else:
            dense = None if before is None else before.whole()
            with gathered(self._model):
                found = criterion.score(
                    self._model,
                    batches,
                    masks=None if dense is None else dense.tensors,
                    prune_head=prune_head,
                    **named,
                )
            found = {name: score for name, score in found.items() if name in targets}
            if not self._scope.by_counts:
                masks = self._scope.choose(found, sparsity, within=dense, **settings)
                return ShardedMasks.of(masks, self._shards)
            parts = {name: self._shards.part(found.pop(name)).clone() for name in list(found)}
        return choose_sharded(self._scope, parts, self._shapes, self._shards, sparsity, within=before, **settings)


def _nothing(name: str) -> None:
    """Masks of the first round."""


def _require_finite(targets: Mapping[str, Tensor]) -> None:
    problem: PxError | None = None
    for name, weight in targets.items():
        if not bool(torch.isfinite(local(weight.detach())).all()):
            problem = TargetError(f"the weight {name} holds NaN or infinity; load the model again before pruning it.")
    raise_together(problem)
