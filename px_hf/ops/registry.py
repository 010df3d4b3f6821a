"""The table {op: rule}, and how a rule joins it.

A rule says what one operation does to path sums. It is called with a `Call` and the operation's own
arguments (the values the network computes with) and returns a `Flow`, a `Gate` or ``None`` (the
result carries no path). It must return something linear in the path sums, with non-negative
coefficients: at a given input every op is treated as linear with data-dependent gates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from ..errors import InvalidArgumentError

if TYPE_CHECKING:
    from .companions import Flow, Gate

Op = Callable[..., Any]
Rule = Callable[..., "Flow | Gate | None"]

RULES: dict[Op, Rule] = {}
"""Rules of operations on activations."""

SHAPE_OPS: set[Op] = set()
"""Operations that only move entries about: their rule also holds for parameters and for gates."""

GATE_OPS: set[Op] = set()
"""Operations whose rule also says what they make of the sources of a gate, such as a linear layer
that mixes the heads of an attention pattern."""

READS_INPUT: set[Op] = set()
"""Operations whose rule looks at the value of the first argument, which an in-place call destroys."""

DECOMPOSITIONS: dict[Op, Callable[..., Any]] = {}
"""Composite operations, with an equivalent written in simpler ones that is run instead."""


def variants(*names: str) -> list[Op]:
    """Every public spelling of an operation: function, method, in-place method, torch.nn.functional."""
    found: list[Op] = []
    for name in names:
        for space in (torch, torch.Tensor, F, torch.special):
            for spelling in (name, f"{name}_"):
                op = getattr(space, spelling, None)
                if callable(op) and op not in found:
                    found.append(op)
    return found


def rule(*ops: Op, shape: bool = False, gates: bool = False, reads_input: bool = False) -> Callable[[Rule], Rule]:
    """Enter the decorated rule into the table for each of ``ops``."""

    def enter(function: Rule) -> Rule:
        for op in ops:
            RULES[op] = function
            if shape:
                SHAPE_OPS.add(op)
            if gates:
                GATE_OPS.add(op)
            if reads_input:
                READS_INPUT.add(op)
        return function

    return enter


class AddedRule:
    """A rule that `add_rule` entered. ``remove()``, or leaving a ``with``, restores what was there before."""

    def __init__(self, ops: Sequence[Op], function: Rule, shape: bool, reads_input: bool) -> None:
        tables = (SHAPE_OPS, READS_INPUT, GATE_OPS)
        self._before = [(op, RULES.get(op), DECOMPOSITIONS.pop(op, None), [op in t for t in tables]) for op in ops]
        for op, *_ in self._before:
            for table in tables:
                table.discard(op)
        rule(*ops, shape=shape, reads_input=reads_input)(function)

    def remove(self) -> None:
        for op, before, decomposed, flags in self._before:
            if before is None:
                RULES.pop(op, None)
            else:
                RULES[op] = before
            if decomposed is not None:
                DECOMPOSITIONS[op] = decomposed
            for table, flag in zip((SHAPE_OPS, READS_INPUT, GATE_OPS), flags, strict=True):
                (table.add if flag else table.discard)(op)
        self._before = []

    def __enter__(self) -> AddedRule:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def add_rule(
    op: str | Op | Sequence[Op], function: Rule, *, shape: bool = False, reads_input: bool = False
) -> AddedRule:
    """Teach PX an operation, or teach it otherwise, without touching the package.

    >>> import torch, px_hf as px
    >>> def cumsum(call, input, dim):
    ...     return call.flow(lambda s: s.cumsum(dim), input)
    >>> class Model(torch.nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(x).cumsum(-1)
    >>> with px.add_rule("cumsum", cumsum):
    ...     scores = px.PX().score(Model(4, 2), [torch.ones(1, 4)], prune_head=True)
    >>> scores["weight"].shape
    torch.Size([2, 4])

    Without ``with`` the rule stays until ``remove()`` is called on what this returns.

    Args:
        op: the operation: a name for all spellings of it in torch (``"cumsum"``: the function, the method and
            their in-place forms), a function such as ``torch.cumsum``, or several functions.
        function: called with a `Call` and the operation's own arguments; returns ``call.flow(fn, *operands)``,
            where ``fn`` is what the operation does to the path sums of its operands: linear in them, with
            non-negative coefficients. ``call.weight``, ``call.scale``, ``call.fixed`` and ``call.gate`` say what
            a factor multiplies them by. An argument that it does not know is an unknown operation.
        shape: the operation only moves entries about, so that the rule holds for parameters and gates too.
        reads_input: the rule looks at the values of its first operand, which an in-place call would destroy.

    Raises:
        InvalidArgumentError: torch has no operation of that name, or an argument cannot be called.
    """
    ops: Sequence[Any]
    if isinstance(op, str):
        ops = variants(op)
        if not ops:
            raise InvalidArgumentError(f"op={op!r}: torch has no function or tensor method of that name.")
    else:
        ops = list(op) if isinstance(op, Sequence) else [op]
    for value in (*ops, function):
        if not callable(value):
            raise InvalidArgumentError(f"{value!r} cannot be called; expected an operation and a function, its rule.")
    return AddedRule(ops, function, shape, reads_input)


def decomposition(*ops: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the decorated function instead of each of ``ops``."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            DECOMPOSITIONS[op] = function
        return function

    return enter
