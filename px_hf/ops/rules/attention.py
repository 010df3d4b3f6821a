"""Attention: the pattern softmax(QKᵀ) is frozen, paths run through the values.

================================ ===================== =======================
op                               h                     g
================================ ===================== =======================
A V, with A softmax(QKᵀ) frozen  N·A∘A on the values   mean over the N tokens
================================ ===================== =======================

N·A∘A·(1/N) = A∘A is what one stream carries. The weights behind Q and K share the flow of their
head by conservation, see `px_hf.ops.gates`. On active paths Q and K gate each other: for query i and
key l, u = Σ_d q̃_id K_ld² hands the flow through A_il to Q, u = Σ_d Q_id² k̃_ld hands it to K. With all
gates open (g) u = Σ_d q̃_d k̃_d, both averaged over tokens.

Linear attention φ(Q) (φ(K)ᵀ V) has no pattern, but its factors mix in the same way. In a product of
two activations the one that comes from an activation function mixes the other; one that is itself
mixed already (φ(K)ᵀ V) is mixed by the other. Between equals it is a pattern Q Kᵀ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..call import Call
from ..companions import Flow, Gate, Paths, Source, Upstream
from ..gates import branch, itself, unit_gain
from ..registry import decomposition, rule, variants
from .linear import matrix_product

MIXED = -1
"""`Paths.gating` of the result of a mixture: it is on the value path."""


def _mix(call: Call, pattern: Tensor, factor: Tensor | None, values: Tensor) -> Flow:
    """``pattern @ values`` with the pattern frozen; ``factor`` is `Call.credit` of its square."""
    shape = pattern.shape
    if factor is not None and not (call.reading.gates and call.reading.weights):
        factor = factor * shape[-1] if call.reading.gates else factor / shape[-1]

    def fn(s: Tensor) -> Tensor:
        if factor is None:
            return s.mean(-2, keepdim=True).expand(*s.shape[:-2], shape[-2], s.shape[-1])
        return factor.expand(shape) @ s

    return call.flow(fn, values, gating=MIXED)


def _scores(
    call: Call,
    product: Callable[[Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    tokens: tuple[list[int], list[int]],
) -> Gate:
    """The companion of ``product(query, key)``, which is linear in both: see the head of this file.

    ``tokens``: the axes of each over which Q and K are averaged where gates are not read.
    """
    if not call.reading.weights:
        return Gate(product=True)
    factors = [(call.companion(value), value) for value in (query, key)]
    if not call.reading.gates:

        def source(trunk: Paths) -> Upstream:
            q, k = (
                (branch(p, trunk) if isinstance(p, Paths) else torch.ones_like(value, dtype=call.dtype))
                for p, value in factors
            )
            means = (f.mean(t, keepdim=True) if t else f for f, t in zip((q, k), tokens, strict=True))
            return Upstream(product, tuple(means))

        return Gate((source,), product=True)
    sources: list[Source] = []
    (q, query2), (k, key2) = [(p, value.to(call.dtype).square()) for p, value in factors]
    if isinstance(q, Paths):
        sources.append(lambda trunk: Upstream(product, (branch(q, trunk), key2)))
    if isinstance(k, Paths):
        sources.append(lambda trunk: Upstream(product, (query2, branch(k, trunk))))
    return Gate(tuple(sources), product=True)


@rule(*variants("matmul", "bmm"), torch.Tensor.__rmatmul__)
def matmul(call: Call, a: Tensor, b: Tensor) -> Flow | Gate:
    if call.op is torch.Tensor.__rmatmul__:
        a, b = b, a
    first, second = call.companion(a), call.companion(b)
    both = isinstance(first, Paths) and isinstance(second, Paths)
    if both and call.gating(a) == call.gating(b):
        return _scores(call, torch.matmul, a, b, ([-2], [-1]))
    if isinstance(first, Gate) or (both and call.gating(a) > call.gating(b)):
        return _mix(call, a, call.credit(a, b, call.gate(a)), b)
    if isinstance(second, Gate) or both:
        factor = call.credit(b, a, call.gate(b))
        flow = _mix(call, b.mT, None if factor is None else factor.mT, a)
        inner = flow.fn
        return call.flow(lambda s: inner(s.mT).mT, a, gating=MIXED)  # type: ignore[union-attr]
    return matrix_product(call, a, b)


@rule(torch.einsum)
def einsum(call: Call, equation: str, *operands: Any) -> Flow | Gate:
    """Two factors, as in `matmul`: a parameter or constant, a frozen gate, or two activations."""
    factors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    terms, _, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    if len(factors) != 2 or not result or "." in equation:
        raise NotImplementedError(f"the equation {equation!r}")
    alive = [isinstance(call.companion(f), Paths) for f in factors]
    both = all(alive)
    if both and call.gating(factors[0]) == call.gating(factors[1]):
        one, two = ([n.index(c) for c in n if c not in other] for n, other in (names, names[::-1]))
        return _scores(call, lambda q, k: torch.einsum(equation, q, k), factors[0], factors[1], (one, two))
    if not alive[0] or (both and call.gating(factors[0]) > call.gating(factors[1])):
        factors, names = factors[::-1], names[::-1]
    stream, factor = factors
    order = f"{names[0]},{names[1]}->{result}"
    if not (both or call.is_gate(factor)):
        return call.flow(lambda s, w: torch.einsum(order, s, w), stream, weight=call.weight(factor))
    tokens_mixed = 1
    for axis in set(names[0]) & set(names[1]) - set(result):
        tokens_mixed *= factor.shape[names[1].index(axis)]
    squared = call.gate(factor)
    if squared is None:
        squared = torch.full(factor.shape, 1 / tokens_mixed, dtype=call.dtype, device=factor.device)
    elif not call.reading.weights:
        squared = squared * tokens_mixed
    squared = call.credit(factor, stream, squared)
    return call.flow(lambda s: torch.einsum(order, s, squared), stream, gating=MIXED)


@rule(*variants("softmax"))
def softmax(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Gate:
    """Weights that the activations themselves compute, as in attention pooling: a gate."""
    paths = call.companion(input)
    assert isinstance(paths, Paths)
    return Gate((lambda trunk: itself(paths, trunk),))


@rule(F.scaled_dot_product_attention)
def scaled_dot_product_attention(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Flow:
    groups = query.shape[-3] // key.shape[-3] if enable_gqa else 1  # of queries that share a key and a value
    if not call.has_paths(value):
        raise NotImplementedError("values that no path leads to")
    pattern = query.new_empty(()).expand(*query.shape[:-1], key.shape[-2])
    if call.reading.gates:
        keys = key.repeat_interleave(groups, -3) if groups > 1 else key
        logits = (query @ keys.mT).to(call.dtype) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            closed = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1)
            logits = logits.masked_fill(closed, -torch.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                logits = logits.masked_fill(~attn_mask, -torch.inf)
            else:
                logits = logits + attn_mask
        pattern = logits.softmax(-1)
    factor, trunk = call.gate(pattern), call.companion(value)
    if call.reading.weights and isinstance(trunk, Paths):

        def product(q: Tensor, k: Tensor) -> Tensor:
            return q @ (k.repeat_interleave(groups, -3) if groups > 1 else k).mT

        factor = unit_gain(_scores(call, product, query, key, ([-2], [-2])), trunk, factor)
    flow = _mix(call, pattern, factor, value)
    if groups == 1:
        return flow
    mix = flow.fn
    return call.flow(lambda s: mix(s.repeat_interleave(groups, -3)), value, gating=MIXED)


@decomposition(F.multi_head_attention_forward)
def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.MultiheadAttention, [tokens, batch, channels], from projections and attention."""
    unusual = {
        "bias_k": bias_k,
        "bias_v": bias_v,
        "key_padding_mask": key_padding_mask,
        "static_k": static_k,
        "static_v": static_v,
    }
    given = [name for name, item in unusual.items() if item is not None]
    if given or add_zero_attn:
        raise NotImplementedError(f"torch.nn.MultiheadAttention with {', '.join(given) or 'add_zero_attn'}")
    if use_separate_proj_weight:
        weights = [w for w in (q_proj_weight, k_proj_weight, v_proj_weight) if w is not None]
    else:
        assert in_proj_weight is not None
        weights = list(in_proj_weight.chunk(3))
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))

    def heads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        return y.reshape(y.shape[0], y.shape[1], num_heads, -1).permute(1, 2, 0, 3)

    q, k, v = (heads(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.reshape(q.shape[0], num_heads, *attn_mask.shape[1:])
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal and attn_mask is None)
    merged = mixed.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)
    return F.linear(merged, out_proj_weight, out_proj_bias), None
