"""Matrix and kernel products: where paths meet weights.

=================== ==========================  =======================
op                  h                           g
=================== ==========================  =======================
conv, linear        the same op with the mask   the same op with W²
fixed kernel c      the same op with abs(c)     the same op with abs(c)
=================== ==========================  =======================

Biases start no path and are dropped.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call
from .companions import Flow
from .registry import rule


def _weight_is_constant_input(call: Call, x: Tensor, weight: Tensor) -> None:
    if not call.has_paths(x) or call.has_paths(weight):
        raise NotImplementedError("a weight that depends on the input")


@rule(F.linear)
def linear(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Flow:
    _weight_is_constant_input(call, x, weight)
    return call.flow(lambda s, w: F.linear(s, w), x, weight=call.weight(weight))


@rule(F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
def conv(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Flow:
    _weight_is_constant_input(call, input, weight)
    op = call.op
    return call.flow(lambda s, w: op(s, w, None, *args, **kwargs), input, weight=call.weight(weight))


def matrix_product(call: Call, a: Tensor, b: Tensor) -> Flow:
    """``a @ b`` where one factor carries paths and the other is a parameter or fixed."""
    if call.has_paths(a):
        return call.flow(lambda s, w: torch.matmul(s, w), a, weight=call.weight(b))
    return call.flow(lambda s, w: torch.matmul(w, s), b, weight=call.weight(a))
