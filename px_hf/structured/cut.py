"""Copy a module with smaller tensors."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.sizes import follow_shapes_
from ..model.wrappers import named_buffers, named_parameters
from .units import Family

Kept = dict[str, dict[int, Tensor]]
"""Tensor -> axis -> the entries of it that stay, in order."""


def kept_entries(model: nn.Module, families: Mapping[Family, Tensor]) -> Kept:
    """What stays of each tensor when the units stay that are marked, family -> bool [units]."""
    tensors: dict[str, Tensor] = {**named_parameters(model), **named_buffers(model)}
    stays: dict[str, dict[int, Tensor]] = {}
    for family, kept in families.items():
        for part in family.parts:
            axes = stays.setdefault(part.tensor, {})
            axis = axes.setdefault(part.axis, torch.ones(tensors[part.tensor].shape[part.axis], dtype=torch.bool))
            axis[part.index[~kept].flatten()] = False
    return {
        name: {axis: mask.nonzero().flatten() for axis, mask in axes.items() if not bool(mask.all())}
        for name, axes in stays.items()
    }


def cut(tensor: Tensor, entries: Mapping[int, Tensor]) -> Tensor:
    """`tensor` with only those entries of some axes."""
    for axis, kept in entries.items():
        tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor


def smaller_copy(
    module: nn.Module, kept: Kept, families: Mapping[Family, Tensor], masks: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A deep copy whose tensors have only the kept entries, and zeros where `masks` prune.

    The large tensors are never copied. Sizes that modules hold as integers follow, `Family.counts` among them.
    """
    memo: dict[int, Any] = {}
    for name, tensor in {**named_parameters(module), **named_buffers(module)}.items():
        mask = None if masks is None else masks.get(name)
        if mask is None and not kept.get(name):
            continue
        entries = kept.get(name, {})
        values = cut(tensor.detach(), entries)
        if mask is not None:
            values = values.masked_fill(~cut(mask, entries).to(values.device), 0)
        memo[id(tensor)] = (
            nn.Parameter(values, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
        )
    small = copy.deepcopy(module, memo)
    for inner in small.modules():
        follow_shapes_(inner)
    for family, stays in families.items():
        for path, attribute, amount in family.counts:
            setattr(small.get_submodule(path), attribute, amount * int(stays.count_nonzero()))
    return small
