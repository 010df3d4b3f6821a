"""Scores for the weights behind a gate: the queries and keys of attention, a squeeze-excite branch.

A gate is frozen at its value, so no value path runs through the weights that computed it and Eq. 9
alone would prune them first. They are scored by conservation: the value path is multiplied by

    u / stop_gradient(u),      u = the path sum of the gate's own branch (for Q and K: `px_hf.ops.rules.attention`),

which is 1 and changes no path sum, but whose gradient in log u is the flow that the gate lets
through. The branch's weights share exactly that flow, each factor of a product (Q and K) receiving
all of it. The branch is computed again from where it leaves the value path, with its input held
constant, so that no weight upstream is counted twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .companions import Companion, Gate, Paths, Upstream


def unit_gain(gate: Companion | None, trunk: Paths, factor: Tensor | None = None) -> Tensor | None:
    """``factor`` times u / stop_gradient(u) of each of the gate's sources (where u is not 0): its value is unchanged.

    ``trunk`` holds the value paths that the gate multiplies. Without a factor it is 1; None if there is nothing to
    credit either.
    """
    if isinstance(gate, Paths):  # an activation that acts as a gate is its own source
        sources = [itself(gate, trunk)]
    elif isinstance(gate, Gate):
        sources = [source(trunk) for source in gate.sources]
    else:
        return factor
    credited = [source for source in sources if any(t.requires_grad for t in source.inputs)]
    return _Gain.apply(factor, credited, *(t for source in credited for t in source.inputs)) if credited else factor


class _Gain(torch.autograd.Function):
    """The factor, or 1 in the shape that all u broadcast to; its gradient in log u is the flow, for each u not 0.

    Written out, for at scale it counts: a pattern has N² entries for each head, and here nothing of that size is
    computed before backward, or saved beside the factor.
    """

    @staticmethod
    def forward(ctx: Any, factor: Tensor | None, sources: list[Upstream], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(factor, *inputs)
        ctx.parts = [(source.fn, len(source.inputs)) for source in sources]
        if factor is not None:
            return factor.view_as(factor)
        shape = torch.broadcast_shapes(*(source.fn(*source.inputs).shape for source in sources))
        return inputs[0].new_ones(()).expand(shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        factor, *inputs = ctx.saved_tensors
        flow = gradient if factor is None else gradient * factor
        needed = ctx.needs_input_grad[2:]
        gradients: list[Tensor | None] = [None, None]
        for fn, count in ctx.parts:
            at = len(gradients) - 2
            own = [t.detach().requires_grad_(n) for t, n in zip(inputs[at : at + count], needed[at:], strict=False)]
            with torch.enable_grad():
                u = fn(*own)
            weight = _over(flow.sum_to_size(u.shape), u.detach())
            found = iter(torch.autograd.grad(u, [t for t in own if t.requires_grad], weight))
            gradients += [next(found) if t.requires_grad else None for t in own]
        return tuple(gradients)


def _over(flow: Tensor, u: Tensor) -> Tensor:
    """flow / u, 0 where u is 0."""
    found = flow / u
    if u.device.type == "cpu" and u.numel() and float(u.amin()) > 0:  # far cheaper than to compare and to fill
        return found
    return found.masked_fill_(u == 0, 0)


class ForgottenError(Exception):
    """A branch leads further up than the history that is left. `Tracer` keeps all of it on request."""


def itself(paths: Paths, trunk: Paths) -> Upstream:
    """`branch` as a source of its own."""
    return Upstream(lambda u: u, (branch(paths, trunk),))


def branch(paths: Paths, trunk: Paths) -> Tensor:
    """The path sums of ``paths``, computed again from where its branch leaves ``trunk``.

    Walking up from ``paths``, the branch starts at the first activation that ``trunk`` also comes
    from, provided that a weight lies between; a fused projection (q, k and v as slices of one
    product) lies above that activation but still belongs to the branch. It starts with `Paths.start`:
    the activation squared where gates are read, so that a class token counts that no path leads to; its
    path sums where they are not, or ones if no path arrives at all.
    """
    shared = _ancestors(trunk)
    horizon = max((node.born for node in shared if node.forgotten), default=-1)  # above it `shared` may lack some
    known: dict[tuple[int, bool], Tensor] = {}

    def visit(node: Paths, below_weight: bool, below_slice: bool) -> Tensor:
        start = node in shared and (below_weight or not below_slice)
        if not start and (node.forgotten or node.born < horizon):
            raise ForgottenError
        if start or node.replay is None:
            return node.start()
        key = (id(node), below_weight)
        if key not in known:
            inputs = [visit(p, below_weight or node.weighted, below_slice or node.sliced) for p in node.parents]
            if node.weighted and not any(i.requires_grad for i in inputs):  # the first weight of the branch
                inputs = [torch.where(i.any(), i, 1.0) for i in inputs]
            known[key] = node.replay(*inputs)
        return known[key]

    return visit(paths, False, False)


def _ancestors(paths: Paths) -> set[Paths]:
    """``paths`` and everything that it was computed from."""
    seen = {paths}
    stack = [paths]
    while stack:
        for parent in stack.pop().parents:
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen
