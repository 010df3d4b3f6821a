"""Elementwise activations φ: a gate φ(z)/z that the input decides.

h is multiplied by (φ(z)/z)², g passes. Where φ(0) is not 0, φ(0) acts as a bias and the gate is
(φ(z) − φ(0))/z. At z = 0 the gate is its limit φ'(0), except for relu, whose gate is closed there
as torch's derivative is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, times
from ..companions import Flow, Gate
from ..registry import rule, variants

BOUNDED = 2
ACTIVATED = 1


def _gated(call: Call, x: Tensor, gate: Callable[[], Tensor], gating: int = ACTIVATED) -> Flow:
    squared = gate().square_() if call.reading.gates else None
    return call.flow(lambda s: times(s, squared), x, gating=gating)


@rule(*variants("relu"))
def relu(call: Call, input: Tensor, inplace: bool = False) -> Flow:
    if not call.reading.weights and call.out.dtype == call.dtype:  # as autograd does it: in one pass over memory
        return call.flow(lambda s: torch.ops.aten.threshold_backward(s, call.out, 0), input, gating=ACTIVATED)
    if not call.reading.gates:
        return call.flow(lambda s: s, input, gating=ACTIVATED)
    is_open = call.out.bool()  # far faster on a CPU than `> 0`; the output itself may yet be overwritten
    at_hand = [call.out]  # saves turning `is_open` into numbers the first time, which is now
    return call.flow(lambda s: _Open.apply(s, at_hand.pop() if at_hand else is_open), input, gating=ACTIVATED)


class _Open(torch.autograd.Function):
    """A sum where the gate is open, else 0. Saves its result, which the next product saves anyway, and no gate.

    The gradient is 0 also where the sum itself is: all that such a sum is made of has weight 0, so its score is 0.
    """

    @staticmethod
    def forward(ctx: Any, s: Tensor, is_open: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.threshold_backward(s, is_open.to(s.dtype), 0)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, result, 0), None


@rule(*variants("relu6"), reads_input=True)
def relu6(call: Call, input: Tensor, inplace: bool = False) -> Flow:
    z = input.to(call.dtype)
    return _gated(call, input, lambda: torch.where(z > 0, 6 / z.clamp(min=6), 0.0))


@rule(*variants("leaky_relu"), reads_input=True)
def leaky_relu(call: Call, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Flow:
    slope = torch.tensor(negative_slope, dtype=call.dtype, device=input.device)
    return _gated(call, input, lambda: torch.where(input > 0, 1.0, slope))


def _ratio(out: Tensor, z: Tensor, at_zero: float) -> Tensor:
    """φ(z)/z from what the network computed; at z = 0 the limit. Faster than φ's own formula, and only
    for values in the precision of the path sums."""
    return (out / z).nan_to_num_(at_zero)


@rule(*variants("gelu"), reads_input=True)
def gelu(call: Call, input: Tensor, approximate: str = "none") -> Flow:
    if input.dtype == call.dtype:
        return _gated(call, input, lambda: _ratio(call.out, input, at_zero=0.5))
    z = input.to(call.dtype)
    if approximate == "tanh":
        return _gated(call, input, lambda: 0.5 + 0.5 * torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3)))
    return _gated(call, input, lambda: torch.special.ndtr(z))


@rule(*variants("silu"), reads_input=True)
def silu(call: Call, input: Tensor, inplace: bool = False) -> Flow:
    if input.dtype == call.dtype:
        return _gated(call, input, lambda: _ratio(call.out, input, at_zero=0.5))
    return _gated(call, input, lambda: torch.sigmoid(input.to(call.dtype)))


@rule(*variants("hardswish"), reads_input=True)
def hardswish(call: Call, input: Tensor, inplace: bool = False) -> Flow:
    return _gated(call, input, lambda: F.hardsigmoid(input.to(call.dtype)))


def _secant(call: Call, gating: int) -> Callable[..., Flow]:
    """(φ(z) − φ(0))/z for any elementwise φ, with z kept away from 0, where it would be 0/0."""

    def apply(input: Tensor, *args: Any, **kwargs: Any) -> Flow:
        kwargs.pop("inplace", None)
        op = _out_of_place(call.op)
        tiny = torch.finfo(call.dtype).eps ** 0.5

        def gate() -> Tensor:
            z = input.to(call.dtype)
            z = torch.where(z.abs() < tiny, tiny, z)
            zero = op(torch.zeros((), dtype=call.dtype, device=z.device), *args, **kwargs)
            return (op(z, *args, **kwargs) - zero) / z

        return _gated(call, input, gate, gating)

    return apply


def _out_of_place(op: Callable[..., Any]) -> Callable[..., Any]:
    name: str = getattr(op, "__name__", "")
    plain = name.rstrip("_")
    for space in (F, torch):
        if name.endswith("_") and hasattr(space, plain):
            found: Callable[..., Any] = getattr(space, plain)
            return found
    return op


@rule(*variants("sigmoid", "hardsigmoid", "tanh", "hardtanh", "logsigmoid", "softsign", "erf"), reads_input=True)
def bounded(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    return _secant(call, BOUNDED)(input, *args, **kwargs)


@rule(
    *variants("elu", "selu", "celu", "softplus", "mish", "softshrink", "hardshrink", "abs", "exp"),
    *variants("clamp", "clamp_min", "clip"),
    reads_input=True,
)
def unbounded(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    return _secant(call, ACTIVATED)(input, *args, **kwargs)


@rule(*variants("pow", "float_power", "square", "sqrt"), torch.Tensor.__pow__, reads_input=True)
def power(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow | Gate:
    exponent = args[0] if args else kwargs.get("exponent", 1)
    if not call.has_paths(input):
        raise NotImplementedError("an activation for an exponent")
    if not bool(torch.as_tensor(exponent > 0).all()):
        return Gate()  # a normalisation, as in x · rms(x)^-½
    return _secant(call, ACTIVATED)(input, *args, **kwargs)


@rule(torch.prelu, torch.Tensor.prelu, F.prelu, reads_input=True)
def prelu(call: Call, input: Tensor, weight: Tensor) -> Flow:
    slope = weight.detach().to(call.dtype)
    if slope.numel() > 1:
        slope = slope.view(-1, *([1] * (input.dim() - 2)))
    return _gated(call, input, lambda: torch.where(input > 0, 1.0, slope))
