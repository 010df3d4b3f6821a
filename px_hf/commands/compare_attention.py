"""How should PX score queries and keys? The candidates, compared with the budget and options of compare_criteria.py.

recipes/compare_attention.py says how it is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import px_hf as px

from ..criteria import Criterion
from ..model.inputs import Batches
from ..model.outputs import Output
from ..ops.call import Call, times
from ..ops.companions import Flow, Gate, Paths, Upstream
from ..ops.gates import branch, unit_gain
from ..ops.rules.attention import MIXED
from .compare_criteria import USAGE, compare

POLICIES = ("means", "fisher", "spread", "dense")
PROJECTIONS = (("q_proj", "v_proj"), ("k_proj", "v_proj"), ("query", "value"), ("key", "value"))


@dataclass(frozen=True)
class QueriesKeys(Criterion):
    """``PX(paths="active", power=power)`` with the scores of queries and keys by ``policy``."""

    policy: str
    power: float = 0.25

    def score(
        self,
        model: nn.Module,
        batches: Batches = (),
        *,
        masks: Mapping[str, Tensor] | None = None,
        prune_head: bool = False,
        output: Output = None,
    ) -> dict[str, Tensor]:
        """See `Criterion.score`."""
        flow = px.PX(paths="active")
        settings: dict[str, Any] = {"masks": masks, "prune_head": prune_head, "output": output}
        rule = px.add_rule(F.scaled_dot_product_attention, by_means) if self.policy == "means" else nullcontext()
        with rule:
            shares = flow.score(model, batches, **settings)  # θ² · ∂R/∂θ²
        squares = {name: p.detach().square() for name, p in model.named_parameters() if name in shares}
        projections = dict(_projections(shares))
        if self.policy == "fisher":
            fisher = px.NTKTrace(probes=1).score(model, batches, **settings)
        for name, values in projections.items():
            if self.policy in ("fisher", "spread"):
                kept = masks[name] if masks else torch.ones_like(squares[name], dtype=torch.bool)
                inside = fisher[name] if self.policy == "fisher" else squares[name] * kept
                shares[name] = inside * (shares[values].sum() / inside.sum())
        scores = {
            name: torch.where(squares[name] > 0, squares[name] * (share / squares[name]) ** self.power, 0.0)
            for name, share in shares.items()
        }
        if self.policy == "dense":
            highest = max(float(score.max()) for score in scores.values())
            scores |= {name: torch.full_like(scores[name], 2 * highest) for name in projections}
        return scores


def _projections(names: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Queries and keys, each with the values of its attention."""
    for name in names:
        for mine, values in PROJECTIONS:
            if name.endswith(f".{mine}.weight"):
                yield name, name.replace(f".{mine}.", f".{values}.")


def by_means(
    call: Call, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, **rest: object
) -> Flow:
    """Attention without mask and dropout, its queries and keys credited by the means of their path sums."""
    pattern = ((query @ key.mT) * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1)
    q, k, trunk = call.companion(query), call.companion(key), call.companion(value)
    assert isinstance(q, Paths)
    assert isinstance(k, Paths)
    assert isinstance(trunk, Paths)

    def source(trunk: Paths) -> Upstream:
        means = [branch(p, trunk).mean(-2, keepdim=True) for p in (q, k)]
        return Upstream(lambda a, b: a @ b.mT, tuple(means))

    credit = unit_gain(Gate((source,)), trunk)
    squared = pattern.to(call.dtype).square()
    return call.flow(lambda s: times(squared, credit) @ s, value, gating=MIXED)


def main(argv: list[str]) -> None:
    """`compare_criteria` with a criterion more for each policy; they are the methods unless others are named."""
    usage = replace(USAGE, command="python recipes/compare_attention.py", examples=())
    policies = {f"qk-{policy}": QueriesKeys(policy) for policy in POLICIES}
    compare(argv, usage, {**px.CRITERIA, **policies}, {"methods": ["px-active", *policies]})
