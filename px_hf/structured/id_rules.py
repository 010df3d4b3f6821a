"""What each operation makes of ids: the table of `UnitTracer`, keyed by the path rule that an operation has.

A rule gets the step and the operation's own arguments, and returns the ids of the result (a list, of several
results), or None: then all ids that went in are pinned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from ..ops import RULES, H, Paths
from ..ops.call import Call
from ..ops.companions import Flow
from ..ops.registry import Rule
from ..ops.rules import activation, arithmetic, attention, linear, norm, pooling, shape
from .unit_ids import Step, core

Ids = Tensor | list[Tensor] | None


def product(s: Step, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Ids:
    """A linear layer."""
    return _product(s, x, weight, bias, dim=-1)


def convolution(
    s: Step,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation_or_output_padding: Any = 1,
    groups: int = 1,
    *_: Any,
    **__: Any,
) -> Ids:
    """A convolution; one that is neither dense nor depthwise pins its inputs."""
    if input.dim() != weight.dim():
        return None
    transposed = "transpose" in getattr(s.op, "__name__", "")
    if groups == 1:
        return _product(s, input, weight, bias, dim=1, rows=1 if transposed else 0)
    if groups == input.shape[1] == s.out.shape[1] == weight.shape[0] and s.ids(input) is not None:
        return _along(s, input, weight, bias)
    return None


def _product(s: Step, x: Tensor, weight: Tensor, bias: Any, dim: int, rows: int = 0) -> Ids:
    tracer, ids = s.tracer, s.ids(x)
    if s.ids(weight) is not None:
        return None
    fresh = tracer.fresh(weight.shape[rows])
    if not tracer.note(weight, rows, fresh, "rows"):
        return None
    if ids is not None:
        others = tuple(d for d in range(x.dim()) if d != dim % x.dim())
        if not tracer.note(weight, 1 - rows, tracer.join(ids, others), "columns"):
            return None
    if bias is not None and not tracer.note(bias, 0, fresh, "along"):
        return None
    return _at(fresh, dim, s.out)


def batch_norm(
    s: Step,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *_: Any,
    **__: Any,
) -> Ids:
    """One entry of each tensor for each channel."""
    return _along(s, input, running_mean, running_var, weight, bias)


def _along(s: Step, x: Tensor, *tensors: Tensor | None) -> Ids:
    ids = s.ids(x)
    if ids is None:
        return None
    channels = s.tracer.join(ids, tuple(d for d in range(x.dim()) if d != 1)).flatten()
    if not all(s.tracer.note(t, 0, channels, "along") for t in tensors if t is not None):
        return None
    return _at(channels, 1, s.out)


def _at(channels: Tensor, dim: int, out: Tensor) -> Tensor:
    return channels.view([-1 if d == dim % out.dim() else 1 for d in range(out.dim())]).expand(out.shape)


def same(s: Step, input: Tensor, *parameters: Any, **_: Any) -> Ids:
    """An elementwise function, of numbers and sizeless constants beside its input."""
    if any(isinstance(p, Tensor) and p.numel() > 1 for p in parameters):
        return None
    return s.ids(input)


def moved(s: Step, *args: Any, **kwargs: Any) -> Ids:
    """The ids move as the path sums would; what is cut in from elsewhere has none."""
    companions = {key: Paths(ids, 0) for key, ids in s.found.items()}
    out = s.out.new_empty(()).cpu().expand(s.out.shape) if isinstance(s.out, Tensor) else s.out  # ids are on the CPU
    flow = RULES[s.op](Call(s.op, out, H, torch.float64, companions), *args, **kwargs)
    assert isinstance(flow, Flow)
    result = flow.fn(*(s.found[id(operand)].contiguous() for operand in flow.operands))
    return result if isinstance(result, Tensor) else list(result)


def summed(s: Step, x: Any, y: Any, **_: Any) -> Ids:
    """x + y: two branches make a residual stream, unless both are rows of one weight (rotary embeddings)."""
    return _pairwise(s, x, y, same_maker=True)


def multiplied(s: Step, x: Any, y: Any, **_: Any) -> Ids:
    """x · y and x / y."""
    return _pairwise(s, x, y, same_maker=False)


def _pairwise(s: Step, x: Any, y: Any, same_maker: bool) -> Ids:
    a, b = s.ids(x), s.ids(y)
    if a is not None and b is not None:
        met = s.tracer.meet(a, b, same_maker=same_maker)
        return None if met is None else met.expand(s.out.shape)
    ids, constant = (a, y) if a is not None else (b, x)
    if ids is None:
        return None
    # where the constant differs from entry to entry, as rotary angles do along a head, all entries go or none
    varying = zip(_sizes(constant, ids.dim()), core(ids).shape, strict=True)
    dims = tuple(d for d, sizes in enumerate(varying) if 1 not in sizes)
    return s.tracer.join(ids, dims).expand(s.out.shape)


def _sizes(constant: Any, dims: int) -> list[int]:
    """The sizes of a constant, aligned to the last `dims` dimensions."""
    shape = constant.shape if isinstance(constant, Tensor) else ()
    return [1] * (dims - len(shape)) + list(shape[max(0, len(shape) - dims) :])


def _alike_for_all(constant: Any, ids: Tensor) -> bool:
    """Whether a constant is the same for all ids, so that it fits those that remain."""
    return all(1 in sizes for sizes in zip(_sizes(constant, ids.dim()), core(ids).shape, strict=True))


def pooled(s: Step, input: Tensor, *_: Any, **__: Any) -> Ids:
    """Windows over all but the first two dimensions."""
    ids = s.ids(input)
    if ids is None or s.out.shape[:2] != input.shape[:2]:
        return None
    return s.tracer.join(ids, tuple(range(2, input.dim()))).expand(s.out.shape)


def reduced(s: Step, input: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Ids:
    """A mean or sum over some dimensions."""
    ids = s.ids(input)
    if ids is None:
        return None
    given = range(input.dim()) if dim is None or dim == () else [dim] if isinstance(dim, int) else dim
    dims = tuple(sorted(d % input.dim() for d in given))
    joined = s.tracer.join(ids, dims)
    return joined if keepdim else joined.amax(dims)


def normalised(s: Step, input: Tensor, normalized_shape: Any, *_: Any, **__: Any) -> Ids:
    """LayerNorm and RMSNorm: a unit is all that they normalise, so their parameters stay."""
    return _coupled(s, input, tuple(range(input.dim() - len(normalized_shape), input.dim())))


def unit_length(s: Step, input: Tensor, p: float = 2.0, dim: int = 1, *_: Any, **__: Any) -> Ids:
    """`F.normalize`."""
    return _coupled(s, input, (dim % input.dim(),))


def softmax(s: Step, input: Tensor, dim: int = -1, *_: Any, **__: Any) -> Ids:
    """Each result depends on all entries along `dim`."""
    return _coupled(s, input, (dim % input.dim(),))


def _coupled(s: Step, input: Tensor, dims: tuple[int, ...]) -> Ids:
    ids = s.ids(input)
    return None if ids is None else s.tracer.join(ids, dims).expand(s.out.shape)


def matmul(s: Step, a: Tensor, b: Tensor) -> Ids:
    """a [..., n, c] @ b [..., c, m]: each result depends on a row of `a` and on a column of `b`."""
    if a.dim() < 2 or b.dim() < 2:
        return None
    joined = [
        None if (ids := s.ids(t)) is None else s.tracer.join(ids, (t.dim() + shared,))
        for t, shared in ((a, -1), (b, -2))
    ]
    for ids in joined:
        if ids is not None:
            s.tracer.attend(ids)
    if joined[0] is not None and joined[1] is not None:
        met = s.tracer.meet(joined[0], joined[1])
        return None if met is None else met.expand(s.out.shape)
    ids, other = (joined[0], b) if joined[0] is not None else (joined[1], a)
    if ids is None or not _alike_for_all(other[..., :1, :1], ids):
        return None
    return ids.expand(s.out.shape)


def scaled_dot_product_attention(
    s: Step, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> Ids:
    """All of a head becomes one; heads that share keys are pinned."""
    heads: Tensor | None = None
    for factor in (query, key, value):
        ids = s.ids(factor)
        if ids is None or factor.shape[:-2] != query.shape[:-2]:
            return None
        joined = s.tracer.join(ids, (factor.dim() - 2, factor.dim() - 1))
        heads = joined if heads is None else s.tracer.meet(heads, joined)
        if heads is None:
            return None
    assert heads is not None
    if not _alike_for_all(attn_mask, heads):
        return None
    s.tracer.attend(heads)
    return s.tracer.roots(heads).expand(s.out.shape)


_ELEMENTWISE: Final = {rule for rule in RULES.values() if rule.__module__ == activation.__name__} | {arithmetic.neg}
_MOVES: Final = (shape.move, shape.take, shape.leave, shape.pad, shape.cat, shape.masked_fill)
_POOLS: Final = (
    *(pooling.max_pool, pooling.adaptive_max_pool, pooling.average_pool, pooling.adaptive_average_pool),
    shape.interpolate,
)
_REDUCTIONS: Final = (pooling.mean, pooling.sum_, pooling.amax)

ID_RULES: Final[dict[Rule | None, Callable[..., Ids]]] = {
    linear.linear: product,
    linear.conv: convolution,
    norm.batch_norm: batch_norm,
    norm.layer_norm: normalised,
    norm.rms_norm: normalised,
    norm.normalize: unit_length,
    arithmetic.add: summed,
    arithmetic.mul: multiplied,
    arithmetic.div: multiplied,
    attention.matmul: matmul,
    attention.softmax: softmax,
    attention.scaled_dot_product_attention: scaled_dot_product_attention,
    **dict.fromkeys(_ELEMENTWISE, same),
    **dict.fromkeys(_MOVES, moved),
    **dict.fromkeys(_POOLS, pooled),
    **dict.fromkeys(_REDUCTIONS, reduced),
}

STARTS_IDS: Final[tuple[Rule, ...]] = (linear.linear, linear.conv)
