"""Sums and elementwise products.

=============================== ================= ==================================
op                              h                 g
=============================== ================= ==================================
x + y, x − y                    the same sum      the same sum
γ x with a parameter γ          identity          γ²
c x with a fixed c              abs(c)            abs(c)
x ⊙ gate                        gate²             credit to the gate, see ops/gates
=============================== ================= ==================================

A constant summand (bias, position embedding, a frozen statistic) starts no path. In a product of two activations the
one that comes from a bounded function gates the other, else the one from any activation function,
else the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..call import Call, times
from ..companions import Flow, Gate
from ..registry import decomposition, rule, variants


def _shaped(s: Any, shape: torch.Size) -> Any:
    return s.expand(shape) if isinstance(s, Tensor) and s.shape != shape else s


@rule(*variants("add", "sub", "subtract"), torch.Tensor.__radd__, torch.Tensor.__rsub__)
def add(call: Call, x: Any, y: Any, *, alpha: float = 1) -> Flow | Gate:
    shape = call.out.shape
    if call.is_gate(x) or call.is_gate(y):
        gate = call.companion(x) if call.is_gate(x) else call.companion(y)
        assert isinstance(gate, Gate)
        if gate.product:  # logits plus something, such as a relative position term q·r: still logits
            return gate
        return call.flow(lambda s: _shaped(s, shape), x if call.has_paths(x) else y)
    weight = call.fixed(alpha)
    if call.has_paths(x) and call.has_paths(y):
        return call.flow(lambda a, b: a + (b if weight == 1 else weight * b), x, y)
    if call.has_paths(x):
        return call.flow(lambda s: _shaped(s, shape), x)
    return call.flow(lambda s: _shaped(s if weight == 1 else weight * s, shape), y)


@rule(*variants("neg", "negative"))
def neg(call: Call, x: Tensor) -> Flow:
    return call.flow(lambda s: s, x)


def _gating_order(call: Call, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of two activations: the one on the value path, the one that gates it."""
    return (y, x) if call.gating(x) > call.gating(y) else (x, y)


@rule(*variants("mul", "multiply"), torch.Tensor.__rmul__, reads_input=True)
def mul(call: Call, x: Any, y: Any) -> Flow:
    shape = call.out.shape
    if not call.has_paths(x) or call.is_gate(x):
        x, y = y, x
    if call.has_paths(y):
        x, y = _gating_order(call, x, y)
    if call.has_paths(y) or call.is_gate(y):
        gate2 = call.credit(y, x, call.gate(y))
        return call.flow(lambda s: _shaped(times(s, gate2), shape), x)
    scale = call.scale(y)
    return call.flow(lambda s: _shaped(s if scale is None else s * scale, shape), x)


@rule(*variants("div", "divide", "true_divide"), reads_input=True)
def div(call: Call, x: Any, y: Any, *, rounding_mode: str | None = None) -> Flow:
    if rounding_mode is not None:
        raise NotImplementedError(f"rounding_mode={rounding_mode!r}")
    if not call.has_paths(x):
        raise NotImplementedError("a divisor that paths lead to and a numerator that none leads to")
    shape = call.out.shape
    if call.has_paths(y) or call.is_gate(y):
        gate2 = call.gate(1 / y)
        return call.flow(lambda s: _shaped(times(s, gate2), shape), x)
    factor = call.fixed(1 / y)
    return call.flow(lambda s: _shaped(s * factor, shape), x)


@decomposition(torch.addcmul, torch.Tensor.addcmul)
def addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor:
    return input + (tensor1 * tensor2 if value == 1 else value * tensor1 * tensor2)
