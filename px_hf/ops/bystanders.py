"""What operations make of tensors that no path leads through: parameters, and gates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

from .call import Call
from .companions import Companion, Derived, Flow, Gate, Source, Weight
from .nested import tensors_of
from .registry import GATE_OPS, RULES


def reshaped(call: Call, flow: Flow) -> Companion | list[Companion]:
    """A parameter, or a gate, whose entries are only moved about."""
    companions = [call.companion(operand) for operand in flow.operands]
    one = companions[0]
    if all(isinstance(c, Weight) for c in companions):
        moved = flow.fn(*(_path_of(call, operand) for operand in flow.operands))
        return Weight(moved) if isinstance(moved, Tensor) else [Weight(m) for m in moved]
    if len(companions) == 1 and isinstance(one, Gate):
        shape = flow.operands[0].shape
        if isinstance(call.out, Tensor):
            return Gate(tuple(_moved(source, shape, flow.fn) for source in one.sources), one.product)
        pieces = [lambda u, i=i: flow.fn(u)[i] for i, _ in enumerate(tensors_of(call.out))]
        return [Gate(tuple(_moved(s, shape, piece) for s in one.sources), one.product) for piece in pieces]
    if any(isinstance(c, Gate) for c in companions):
        gates = [c for c in companions if isinstance(c, Gate)]
        return Gate(tuple(s for c in gates for s in c.sources), any(c.product for c in gates))
    if len(companions) == 1 and isinstance(one, Derived) and one.path is not None and isinstance(call.out, Tensor):
        moved = flow.fn(one.path)
        assert isinstance(moved, Tensor)
        return Derived(one.name, moved)
    return Derived("a mixture of parameters and constants")


def of_gates(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Gate:
    """What an operation makes of gates, which is a gate too.

    Those that the result cannot be broadcast from, as in a sum over a pattern, are mere statistics.

    Raises:
        NotImplementedError: the rule of the operation does not know these arguments.
    """
    product = False
    sources: dict[Source, None] = {}
    for value in {id(t): t for t in tensors_of((args, kwargs))}.values():
        gate = call.companion(value)
        if not isinstance(gate, Gate):
            continue
        product |= gate.product
        if call.op in GATE_OPS:
            flow = RULES[call.op](call, *args, **kwargs)
            assert isinstance(flow, Flow)
            weight = () if flow.weight is None else (flow.weight,)
            sources |= dict.fromkeys(_moved(source, value.shape, flow.fn, *weight) for source in gate.sources)
        elif isinstance(call.out, Tensor) and _broadcasts(value.shape, call.out.shape):
            sources |= dict.fromkeys(gate.sources)
    return Gate(tuple(sources), product)


def of_parameters(call: Call, operands: Any) -> Derived:
    """What an operation makes of parameters. It has the path of the one that has its shape, if there is just one."""
    path = None
    if isinstance(call.out, Tensor):
        known = {id(t): t for t in tensors_of(operands) if call.companion(t) is not None}
        same = [t for t in known.values() if t.shape == call.out.shape]
        path = _path_of(call, same[0]) if len(same) == 1 else None
    return Derived(name_of(call.op), path)


def name_of(op: Callable[..., Any]) -> str:
    """``op`` as an error message calls it."""
    return resolve_name(op) or getattr(op, "__qualname__", None) or repr(op)


def _path_of(call: Call, value: Tensor) -> Tensor | None:
    weight = call.companion(value)
    if isinstance(weight, Weight) and weight.path is None:
        return torch.ones((), dtype=call.dtype, device=value.device).expand(value.shape)
    return weight.path if isinstance(weight, (Weight, Derived)) else None


def _moved(source: Source, shape: torch.Size, fn: Callable[..., Any], *weight: Tensor) -> Source:
    return lambda trunk: source(trunk).then(lambda u, *w: fn(u.expand(shape), *w), *weight)


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
