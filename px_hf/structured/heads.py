"""Heads: which integers of an attention module say how many there are, found by trying.

The weights of a head are not all there is to it: `x.view(..., self.num_heads, self.head_dim)` needs the number too,
under whatever name. The integers of the module that equal the number of heads, or that times the size of one, are
changed in a copy from which one head is taken, until the copy computes what the module does without that head.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model.inputs import Inputs, run
from ..model.modes import evaluating
from ..model.sizes import SIZED
from .cut import kept_entries, smaller_copy
from .units import Family

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def with_counts(model: nn.Module, inputs: Inputs, families: Sequence[Family]) -> list[Family]:
    """The families, heads with their `Family.counts`, and without those heads that cannot be taken out."""
    owners = {family: _owner(family) for family in families if family.heads}
    with evaluating(model):
        calls = _calls(model, inputs, set(owners.values()))
        found = []
        for family in families:
            if family in owners:
                path = owners[family]
                counts = _counts(model.get_submodule(path), _inside(family, path), calls[path])
                if counts is None:
                    continue
                prefix = f"{path}." if path else ""
                family = replace(family, counts=tuple(((prefix + m).rstrip("."), a, n) for m, a, n in counts))
            found.append(family)
    return found


def _owner(family: Family) -> str:
    """The path of the smallest module that holds all tensors of the family."""
    levels = zip(*(part.tensor.split(".")[:-1] for part in family.parts), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _inside(family: Family, path: str) -> Family:
    """The family as the module at `path` names it."""
    skip = len(path) + 1 if path else 0
    return replace(family, parts=tuple(replace(p, tensor=p.tensor[skip:]) for p in family.parts))


def _calls(model: nn.Module, inputs: Inputs, paths: set[str]) -> dict[str, Arguments]:
    """What the modules at `paths` are called with when the model runs."""
    calls: dict[str, Arguments] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, path=path: calls.__setitem__(path, (args, kwargs)), with_kwargs=True
        )
        for path in paths
    ]
    try:
        run(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _counts(owner: nn.Module, family: Family, call: Arguments) -> tuple[tuple[str, str, int], ...] | None:
    """The counts with which `owner` works without its last head, if there are any."""
    args, kwargs = call
    stays = torch.arange(family.size) < family.size - 1
    kept = kept_entries(owner, {family: stays})
    silenced = {
        part.tensor: owner.get_parameter(part.tensor).index_fill(part.axis, part.index[-1].to(_device(owner)), 0)
        for part in family.parts
        if part.role == "columns"
    }
    expected = _first(torch.func.functional_call(owner, silenced, args, kwargs))
    for counts in _choices(owner, family):
        tried = replace(family, counts=counts)
        try:
            result = _first(smaller_copy(owner, kept, {tried: stays})(*args, **kwargs))
        except (RuntimeError, ValueError, IndexError, AssertionError):
            continue
        if agree(result, expected):
            return counts
    return None


_MOST_INTEGERS = 6


def _choices(owner: nn.Module, family: Family) -> Iterator[tuple[tuple[str, str, int], ...]]:
    """Sets of integers that may depend on the number of units, the largest first."""
    amounts = {1, *(part.index.shape[1] for part in family.parts)}
    candidates = [
        (path, attribute, amount)
        for path, module in owner.named_modules()
        if not isinstance(module, SIZED)
        for attribute, value in vars(module).items()
        for amount in sorted(amounts)
        if type(value) is int and value == family.size * amount
    ]
    for count in range(min(len(candidates), _MOST_INTEGERS), -1, -1):
        yield from itertools.combinations(candidates, count)


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether two results are equal but for rounding: within √ε of the largest entry."""
    if a.shape != b.shape:
        return False
    tolerance = float(torch.finfo(b.dtype).eps) ** 0.5 * float(b.detach().abs().max())
    return bool(((a - b).abs() <= tolerance).all())


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _first(output: Any) -> Tensor:
    while not isinstance(output, Tensor):
        output = output[0]
    return output
