"""Pooling, mean and sum.

================== ============= ========================
op                 h             g
================== ============= ========================
max-pool, max, min the arg max   the mean of the window
max(x, y), where   the one taken the mean of the two; the one taken
average, mean      the same op   the same op
sum, fold          the same op   the same op
================== ============= ========================

An average's 1/n is a fixed coefficient: where one stream carries both readings it counts squared.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..companions import Flow
from ..registry import decomposition, rule, variants


def _both(call: Call) -> bool:
    return call.reading.gates and call.reading.weights


def _pick(s: Tensor, indices: Tensor, spatial: int) -> Tensor:
    return s.flatten(-spatial).gather(-1, indices.flatten(-spatial)).view(indices.shape)


def _indexed(op: Any) -> Any:
    """A max-pool as one that says where each maximum is, so that its rule need not look for it again."""

    def indexed_max_pool(
        input: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        pooled = op(input, kernel_size, stride, padding, dilation, ceil_mode)
        return pooled if return_indices else pooled[0]

    return indexed_max_pool


INDEXED = {
    F.max_pool1d: F.max_pool1d_with_indices,
    F.max_pool2d: F.max_pool2d_with_indices,
    F.max_pool3d: F.max_pool3d_with_indices,
}
"""A max-pool -> the same operation that also returns where each maximum is: the one with a rule."""
for _plain, _with_indices in INDEXED.items():
    decomposition(_plain)(_indexed(_with_indices))

_MAX_POOLS = {op: spatial for spatial, op in enumerate(INDEXED.values(), start=1)}


@rule(*_MAX_POOLS)
def max_pool(
    call: Call,
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = True,
) -> Flow:
    spatial = _MAX_POOLS[call.op]
    if call.reading.gates:
        _, indices = call.out
        return call.flow(lambda s: _pick(s, indices, spatial), input)
    if dilation not in (1, (1,) * spatial, [1] * spatial):
        raise NotImplementedError("dilation")
    average = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[spatial]
    return call.flow(lambda s: average(s, kernel_size, stride, padding, ceil_mode, count_include_pad=False), input)


_ADAPTIVE_MAX_POOLS = {
    F.adaptive_max_pool1d: (1, F.adaptive_avg_pool1d),
    F.adaptive_max_pool2d: (2, F.adaptive_avg_pool2d),
    F.adaptive_max_pool3d: (3, F.adaptive_avg_pool3d),
}


@rule(*_ADAPTIVE_MAX_POOLS)
def adaptive_max_pool(call: Call, input: Tensor, output_size: Any, return_indices: bool = False) -> Flow:
    if return_indices:
        raise NotImplementedError("return_indices=True")
    spatial, average = _ADAPTIVE_MAX_POOLS[call.op]
    if call.reading.gates:
        _, indices = call.op(input, output_size, return_indices=True)
        return call.flow(lambda s: _pick(s, indices, spatial), input)
    return call.flow(lambda s: average(s, output_size), input)


@rule(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
def average_pool(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    op = call.op
    if not _both(call):
        return call.flow(lambda s: op(s, *args, **kwargs), input)
    # All coefficients c of a window are equal, so Σ c² s = c · Σ c s. Of ones, the op makes n c.
    ones = torch.ones((1, 1, *input.shape[2:]), dtype=call.dtype, device=input.device)
    coefficient = op(ones, *args, **kwargs) / _window_size(op, ones, *args, **kwargs)
    return call.flow(lambda s: op(s, *args, **kwargs) * coefficient, input)


def _window_size(
    op: Any,
    ones: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """How many entries each window of an average really holds."""
    if op is F.avg_pool1d:  # has no divisor_override
        kernel, step, pad = (x[0] if isinstance(x, (list, tuple)) else x for x in (kernel_size, stride, padding))
        windows = F.avg_pool2d(
            ones.unsqueeze(-2), (1, kernel), (1, step or kernel), (0, pad), ceil_mode, divisor_override=1
        )
        return windows.squeeze(-2)
    windows = op(ones, kernel_size, stride, padding, ceil_mode, divisor_override=1)
    assert isinstance(windows, Tensor)
    return windows


@rule(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)
def adaptive_average_pool(call: Call, input: Tensor, output_size: Any) -> Flow:
    op = call.op
    if not _both(call):
        return call.flow(lambda s: op(s, output_size), input)
    spatial = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}[op]
    coefficient = torch.ones((), dtype=call.dtype, device=input.device)
    for size, bins in zip(input.shape[-spatial:], call.out.shape[-spatial:], strict=True):
        index = torch.arange(bins, device=input.device)
        width = ((index + 1) * size + bins - 1) // bins - index * size // bins  # torch's own bounds
        coefficient = coefficient.unsqueeze(-1) / width.to(call.dtype)
    return call.flow(lambda s: op(s, output_size) * coefficient, input)


def _reduced(input: Tensor, out: Tensor) -> int:
    return input.numel() // max(out.numel(), 1)


@rule(*variants("mean"))
def mean(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    coefficient = 1 / _reduced(input, call.out) if _both(call) else 1
    return call.flow(lambda s: s.mean(*args, **_no_dtype(kwargs)) * coefficient, input)


@rule(*variants("sum"))
def sum_(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    return call.flow(lambda s: s.sum(*args, **_no_dtype(kwargs)), input)


def _no_dtype(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k != "dtype"}


@rule(*variants("amax", "amin"))
def amax(call: Call, input: Tensor, dim: Any = (), keepdim: bool = False) -> Flow:
    return _shared_extremum(call, input, dim, keepdim)


def _shared_extremum(call: Call, input: Tensor, dim: Any, keepdim: bool) -> Flow:
    """Entries that are equally large (small) share their place."""
    if not call.reading.gates:
        return call.flow(lambda s: s.mean(dim or None, keepdim=keepdim), input)
    kept = call.out if keepdim or dim == () else call.op(input, dim, keepdim=True)
    chosen = (input == kept).to(call.dtype)
    share = chosen / chosen.sum(dim or None, keepdim=True)
    return call.flow(lambda s: (s * share).sum(dim or None, keepdim=keepdim), input)


@rule(*variants("max", "min"))
def extremum(call: Call, input: Tensor, dim: Any = None, keepdim: bool = False) -> Flow:
    if isinstance(dim, Tensor):
        return _larger_or_smaller(call, input, dim)
    if dim is None:
        return _shared_extremum(call, input, (), False)
    if not call.reading.gates:
        return call.flow(lambda s: s.mean(dim, keepdim=keepdim), input)
    indices = call.out.indices if keepdim else call.out.indices.unsqueeze(dim)

    def fn(s: Tensor) -> Tensor:
        taken = s.gather(dim, indices)
        return taken if keepdim else taken.squeeze(dim)

    return call.flow(fn, input)


@rule(*variants("maximum", "minimum", "fmax", "fmin"))
def elementwise_extremum(call: Call, input: Tensor, other: Tensor) -> Flow:
    return _larger_or_smaller(call, input, other)


def _larger_or_smaller(call: Call, input: Tensor, other: Tensor) -> Flow:
    shape = call.out.shape
    carrying = [t for t in (input, other) if call.has_paths(t)]
    if not call.reading.gates:
        return call.flow(lambda *s: sum(t.expand(shape) for t in s) / len(carrying), *carrying)
    first = (call.out == input).to(call.dtype)  # equals are taken from the first
    shares = [share for t, share in ((input, first), (other, 1 - first)) if call.has_paths(t)]
    return call.flow(lambda *s: sum(t * share for t, share in zip(s, shares, strict=True)), *carrying)


@rule(F.fold)
def fold(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    """The sum of overlapping blocks."""
    return call.flow(lambda s: F.fold(s, *args, **kwargs), input)
