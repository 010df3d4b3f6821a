"""Weights that Accelerate has offloaded to CPU memory or a disk (`device_map`, `cpu_offload`, `disk_offload`).

The model holds them on the meta device, and the hook of a layer fetches its own for each forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from .wrappers import paths_of_tensors


def is_offloaded(model: nn.Module) -> bool:
    """Whether all weights that ``model`` does not hold are offloaded."""
    elsewhere = [m for m in model.modules() if any(p.is_meta for p in m.parameters(recurse=False))]
    return bool(elsewhere) and all(map(_has_hook, elsewhere))


def fetched(model: nn.Module, names: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
    """Name of a parameter -> what gets it, from wherever it is, onto the CPU if it is offloaded."""
    paths = paths_of_tensors(model)
    found: dict[str, Callable[[], Tensor]] = {}
    for name in names:
        owner, _, attribute = paths[name].rpartition(".")
        found[name] = functools.partial(_fetch, model.get_submodule(owner), attribute)
    return found


def _fetch(owner: nn.Module, attribute: str) -> Tensor:
    parameter = getattr(owner, attribute)
    if not parameter.is_meta:
        return parameter.detach()
    hook: Any = owner._hf_hook  # Accelerate's ModelHook, or several in a row
    try:
        hook.pre_forward(owner)
        return getattr(owner, attribute).detach().to("cpu", copy=True)
    finally:
        hook.post_forward(owner, None)


def _has_hook(module: nn.Module) -> bool:
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", [hook]))
