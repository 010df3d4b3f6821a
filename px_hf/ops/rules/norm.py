"""Normalisation.

=============================== ================== ==============
op                              h                  g
=============================== ================== ==============
BatchNorm (running statistics)  identity           γ²/(σ² + ε)
Layer-, Group-, InstanceNorm    1/(σ(x)² + ε)      γ²
RMSNorm                         1/(rms(x)² + ε)    γ²
F.normalize                     1/max(‖x‖, ε)²     identity
a norm, σ(x), 1/x, 1/√x         a frozen gate      a frozen gate
=============================== ================== ==============

BatchNorm with running statistics is a fixed affine map, read as a weight: scores equal those of the
network with BatchNorm folded into its convolutions. The others scale by a statistic of the input,
which is a gate; their centring, a weak coupling of all entries, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call, times
from ..companions import Flow, Gate
from ..registry import decomposition, rule, variants


def _per_channel(value: Tensor, dims: int) -> Tensor:
    return value.view(1, -1, *([1] * (dims - 2)))


@rule(F.batch_norm, torch.batch_norm)
def batch_norm(
    call: Call,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Flow:
    gamma2 = None if weight is None else call.scale(weight)
    if training or running_var is None:
        over = [d for d in range(input.dim()) if d != 1]
        gate2 = _inverse_variance(call, input, over, eps)
    else:
        gate2 = None
        if call.reading.weights:
            inverse = 1 / (running_var.detach().to(call.dtype) + eps)
            inverse = inverse if call.reading.order == 2 else inverse.sqrt()
            gamma2 = inverse if gamma2 is None else gamma2 * inverse
    scale = None if gamma2 is None else _per_channel(gamma2, input.dim())
    return call.flow(lambda s: times(s, gate2, scale), input, scale=gamma2 if gate2 is None else None)


def _inverse_variance(call: Call, x: Tensor, over: Sequence[int], eps: float) -> Tensor | None:
    if not call.reading.gates:
        return None
    x = x.to(call.dtype)
    if list(over) == list(range(-len(over), 0)):  # the kernel of LayerNorm is ten times as fast as var
        _, _, rstd = torch.native_layer_norm(x, x.shape[-len(over) :], None, None, eps)
        return rstd.square()
    return 1 / (x.var(tuple(over), unbiased=False, keepdim=True) + eps)


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Flow:
    gate2 = _inverse_variance(call, input, range(-len(normalized_shape), 0), eps)
    gamma2 = None if weight is None else call.scale(weight)
    return call.flow(lambda s: times(s, gate2, gamma2), input)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(
    call: Call,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Flow:
    gate2 = None
    if call.reading.gates:
        over = tuple(range(-len(normalized_shape), 0))
        gate2 = 1 / (
            input.to(call.dtype).square().mean(over, keepdim=True)
            + (torch.finfo(input.dtype).eps if eps is None else eps)
        )
    gamma2 = None if weight is None else call.scale(weight)
    return call.flow(lambda s: times(s, gate2, gamma2), input)


@rule(F.group_norm, torch.group_norm)
def group_norm(
    call: Call,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Flow:
    gate2 = None
    if call.reading.gates:
        grouped = input.reshape(input.shape[0], num_groups, -1)
        inverse = _inverse_variance(call, grouped, (-1,), eps)
        assert inverse is not None
        gate2 = inverse.expand_as(grouped).reshape(input.shape)
    gamma2 = None if weight is None else call.scale(weight)
    scale = None if gamma2 is None else _per_channel(gamma2, input.dim())
    return call.flow(lambda s: times(s, gate2, scale), input)


@rule(F.normalize)
def normalize(
    call: Call, input: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: Tensor | None = None
) -> Flow:
    gate2 = None
    if call.reading.gates:
        gate2 = 1 / input.to(call.dtype).norm(p, dim, keepdim=True).clamp(min=eps).square()
    return call.flow(lambda s: times(s, gate2), input)


@rule(*variants("norm", "var", "std", "rsqrt", "reciprocal"), torch.linalg.norm, torch.linalg.vector_norm)
def statistic(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Gate:
    """What a hand-written normalisation multiplies or divides by."""
    return Gate()


@decomposition(torch.var_mean, torch.std_mean)
def spread_and_mean(input: Tensor, dim: Any = None, *, correction: int = 1, keepdim: bool = False) -> Any:
    mean = input.mean(dim, keepdim=keepdim)
    return input.var(dim, correction=correction, keepdim=keepdim), mean
