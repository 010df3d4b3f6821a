"""The table {op: rule}, and how a rule joins it.

A rule says what one operation does to path sums. It is called with a `Call` and the operation's own
arguments (the values the network computes with) and returns a `Flow`, a `Gate` or ``None`` (the
result carries no path). It must return something linear in the path sums, with non-negative
coefficients: at a given input every op is treated as linear with data-dependent gates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

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


def decomposition(*ops: Op) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Run the decorated function instead of each of ``ops``."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        for op in ops:
            DECOMPOSITIONS[op] = function
        return function

    return enter
