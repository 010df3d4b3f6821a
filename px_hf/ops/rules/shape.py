"""Operations that only move entries about, or leave them alone: the same op on the path sums.

An interpolation with coefficients c acts by abs(c) in h and in g, by c² where one stream carries both.

Also dropout and drop-path, which are off in eval mode. These rules hold for parameters and for
frozen gates too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..companions import Flow
from ..registry import rule, variants

_MOVES = variants(
    "reshape", "view", "view_as", "reshape_as", "flatten", "unflatten", "ravel",
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "adjoint",
    "squeeze", "unsqueeze", "expand", "expand_as", "broadcast_to", "repeat", "repeat_interleave", "tile",
    "narrow", "select", "index_select", "roll", "flip", "rot90", "diagonal",
    "contiguous", "clone", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "unfold",
)  # fmt: skip
_ATTRIBUTES = [
    getattr(torch.Tensor, name).__get__ for name in ("T", "mT", "H", "mH")
]  # fmt: skip
_SLICES = variants("chunk", "split", "split_with_sizes", "tensor_split", "unbind", "hsplit", "vsplit")


@rule(*_MOVES, *_ATTRIBUTES, shape=True)
def move(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    op = call.op
    return call.flow(lambda s: op(s, *args, **kwargs), input, gating=call.gating(input))


@rule(*_SLICES, torch.Tensor.__getitem__, torch.Tensor.__iter__, shape=True)
def take(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    op = call.op

    def fn(s: Tensor) -> Any:
        taken = op(s, *args, **kwargs)
        return taken if isinstance(taken, (Tensor, list, tuple)) else list(taken)

    return call.flow(fn, input, sliced=True, gating=call.gating(input))


@rule(
    *variants("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "detach"),
    *variants("float", "double", "half", "bfloat16", "type", "type_as", "to", "cpu", "cuda"),
    *(getattr(torch.Tensor, name).__get__ for name in ("data", "real")),
    shape=True,
)
def leave(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Flow:
    device = call.out.device
    return call.flow(lambda s: s.to(device), input, gating=call.gating(input))


@rule(F.pad, torch._C._nn.pad, shape=True)
def pad(call: Call, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Flow:
    return call.flow(lambda s: F.pad(s, pad, mode), input)


@rule(*variants("cat", "concat", "concatenate", "stack", "hstack", "vstack"), shape=True)
def cat(call: Call, tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Flow:
    op = call.op
    # Beside an activation, a parameter (a class token) is a constant and starts no path.
    activations = any(call.has_paths(t) for t in tensors)
    carries = [call.has_paths(t) if activations else call.companion(t) is not None for t in tensors]
    carrying = [t for t, carried in zip(tensors, carries, strict=True) if carried]
    shapes = [t.shape for t in tensors]
    dtype, device = call.dtype, call.out.device

    def fn(*streams: Tensor) -> Tensor:
        given = iter(streams)
        parts = [
            next(given) if carried else torch.zeros(shape, dtype=dtype, device=device)
            for carried, shape in zip(carries, shapes, strict=True)
        ]
        result: Tensor = op(parts, *args, **kwargs)
        return result

    return call.flow(fn, *carrying)


@rule(torch.Tensor.__setitem__)
def setitem(call: Call, target: Tensor, index: Any, value: Any) -> Flow:
    """``target[index] = value``: also where only one of them carries paths."""

    def write(a: Tensor, b: Tensor | float) -> Tensor:
        written = a.clone()
        written[index] = b
        return written

    shape, dtype, device = target.shape, call.dtype, target.device
    if call.has_paths(target) and call.has_paths(value):
        return call.flow(write, target, value)
    if call.has_paths(target):
        return call.flow(lambda a: write(a, 0.0), target)
    return call.flow(lambda b: write(torch.zeros(shape, dtype=dtype, device=device), b), value)


@rule(torch.Tensor.copy_)
def copy(call: Call, target: Tensor, source: Tensor, non_blocking: bool = False) -> Flow | None:
    if not call.has_paths(source):
        return None
    shape = call.out.shape
    return call.flow(lambda s: s.expand(shape).clone(), source)


_CONSTANTS = [
    *variants("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "zero"),
    *(getattr(torch.Tensor, f"new_{name}") for name in ("zeros", "ones", "full", "empty", "tensor")),
]


@rule(*_CONSTANTS)
def constant(call: Call, *args: Any, **kwargs: Any) -> None:
    """Takes shape and dtype of an activation, not its values."""


@rule(*variants("where"))
def where(call: Call, condition: Tensor, x: Any, y: Any) -> Flow:
    """Each entry from the operand it is taken from; a constant starts no path."""
    if call.op is torch.Tensor.where:
        condition, x = x, condition
    shape = call.out.shape
    chosen = [(t, mask) for t, mask in ((x, condition), (y, ~condition)) if call.has_paths(t)]
    operands = [t for t, _ in chosen]
    return call.flow(lambda *s: sum(t * mask for t, (_, mask) in zip(s, chosen, strict=True)).expand(shape), *operands)


@rule(*variants("masked_scatter"))
def masked_scatter(call: Call, input: Tensor, mask: Tensor, source: Tensor) -> Flow:
    """Image features into the places that a text has kept for them."""
    if not call.has_paths(source):
        raise NotImplementedError("a source that no path leads to")
    kept = call.has_paths(input)
    shape = call.out.shape

    def fn(s: Tensor, into: Tensor | None = None) -> Tensor:
        return (s.new_zeros(shape) if into is None else into).masked_scatter(mask, s)

    return call.flow(fn, source, input) if kept else call.flow(fn, source)


@rule(*variants("masked_fill"), shape=True)
def masked_fill(call: Call, input: Tensor, mask: Tensor, value: Any) -> Flow:
    return call.flow(lambda s: s.masked_fill(mask, 0.0), input)


@rule(F.interpolate, F.upsample, shape=True)
def interpolate(
    call: Call,
    input: Tensor,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Flow:
    if mode in ("nearest", "nearest-exact"):
        return call.flow(lambda s: F.interpolate(s, size, scale_factor, mode), input)
    if recompute_scale_factor:
        size, scale_factor = call.out.shape[2:], None
    options = {"mode": mode, "align_corners": align_corners, "antialias": antialias}
    matrices = [
        call.fixed(_resampling(length, new, scale, input.dim() - 2, options).to(input.device))
        for length, new, scale in zip(
            input.shape[2:], call.out.shape[2:], _each(scale_factor, input.dim() - 2), strict=True
        )
    ]

    def fn(s: Tensor) -> Tensor:
        for axis, matrix in enumerate(matrices, start=2):
            s = torch.tensordot(s, matrix.to(s.dtype), ([axis], [0])).movedim(-1, axis)
        return s

    return call.flow(fn, input)


def _each(scale: Any, dims: int) -> list[float | None]:
    return list(scale) if isinstance(scale, (tuple, list)) else [scale] * dims


def _resampling(length: int, new: int, scale: float | None, dims: int, options: dict[str, Any]) -> Tensor:
    """The coefficients [length, new] of an interpolation along one axis: what it makes of the unit vectors."""
    units = torch.eye(length, dtype=torch.float64).view(1, length, length, *[1] * (dims - 1))
    others = [1] * (dims - 1)
    if scale is None:
        moved = F.interpolate(units, size=[new, *others], **options)
    else:
        moved = F.interpolate(units, scale_factor=[scale, *map(float, others)], **options)
    return moved.view(length, new)
