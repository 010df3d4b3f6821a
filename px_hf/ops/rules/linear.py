"""Matrix and kernel products: where paths meet weights.

=================== ==========================  =======================
op                  h                           g
=================== ==========================  =======================
conv, linear        the same op with the mask   the same op with W²
fixed kernel c      the same op with abs(c)     the same op with abs(c)
=================== ==========================  =======================

Biases start no path and are dropped. In a matrix product a factor that is computed from parameters
alone, such as the queries of learned latents, is fixed. A weight without a mask is all ones in h, so that every
output is the same sum over the input channels, which is computed once. A layer that mixes frozen attention logits
(talking heads) mixes what their weights are credited with by W², see `px_hf.ops.gates`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..companions import Derived, Flow, Weight, is_constant
from ..registry import rule, variants


def _require_weight(call: Call, x: Tensor, weight: Tensor) -> None:
    if not (call.has_paths(x) or call.is_gate(x)) or call.has_paths(weight) or call.is_gate(weight):
        raise NotImplementedError("a weight that depends on the input")


@rule(F.linear, gates=True)
def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Flow:
    _require_weight(call, x, weight)
    return call.flow(_linear, x, weight=call.weight(weight))


def _linear(s: Tensor, w: Tensor) -> Tensor:
    if is_constant(w):
        return (s.sum(-1, keepdim=True) * w[0, 0]).expand(*s.shape[:-1], len(w))
    return F.linear(s, w)


@rule(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, gates=True)
def conv(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Flow:
    _require_weight(call, input, weight)
    op, channels = call.op, call.out.shape[1]
    groups = args[3] if len(args) > 3 else kwargs.get("groups", 1)
    summed = input.dim() == weight.dim() and input.shape[1] > groups

    def fn(s: Tensor, w: Tensor) -> Tensor:
        if not (summed and is_constant(w)):
            return op(s, w, None, *args, **kwargs)
        one = op(s.unflatten(1, (groups, -1)).sum(2), w[:groups, :1], None, *args, **kwargs)  # a channel per group
        each = one.unsqueeze(2).expand(-1, -1, channels // groups, *one.shape[2:])
        return each.flatten(1, 2)

    transposed = op in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    return call.flow(fn, input, weight=call.weight(weight), channels=None if transposed else 0)


def matrix_product(call: Call, a: Tensor, b: Tensor) -> Flow:
    """``a @ b`` where one factor carries paths and the other is a parameter or fixed."""
    if call.has_paths(a):
        return call.flow(lambda s, w: torch.matmul(s, w), a, weight=_matrix(call, b))
    return call.flow(lambda s, w: torch.matmul(w, s), b, weight=_matrix(call, a))


def _matrix(call: Call, value: Tensor) -> Any:
    return call.fixed(value) if isinstance(call.companion(value), Derived) else call.weight(value)


@rule(*variants("addmm"))
def addmm(call: Call, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Flow:
    """A linear layer with its bias written first."""
    if call.companion(input) is not None and not isinstance(call.companion(input), (Weight, Derived)):
        raise NotImplementedError("an activation for a bias")
    if alpha != 1:
        raise NotImplementedError(f"alpha={alpha}")
    return matrix_product(call, mat1, mat2)
