"""Tensors among the arguments and results of an operation: nested lists, tuples and dictionaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_of(item)


def with_tensors(value: Any, replaced: Mapping[int, Tensor]) -> Any:
    """``value`` with those tensors replaced whose id is given, in nested lists and tuples."""
    if isinstance(value, Tensor):
        return replaced.get(id(value), value)
    if isinstance(value, (list, tuple)) and any(True for _ in tensors_of(value)):
        return type(value)(with_tensors(v, replaced) for v in value)
    return value
