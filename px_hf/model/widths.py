"""The structure of a model that its config cannot express: noted when it is saved, read when it is built again.

    {"shapes": {"layers.0.mlp.fc1.weight": [96, 192], ...}, "counts": {"layers.0.attn": {"num_heads": 2}}}

`shapes` are those of parameters and buffers, `counts` integers of modules, wherever they differ from those of a model
that is built from the config. Anybody may have written what is read, so a structure can only make a model smaller:
names, dimensions and integers must be those of the built model, and no number may grow. In TimmWrapper names are those
of the model of timm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .sizes import SIZED, follow_shapes_

Structure = dict[str, dict[str, Any]]


def other_shapes(model: nn.Module, built: nn.Module) -> dict[str, list[int]]:
    """The shapes of those tensors of `model` that have another in `built`."""
    wanted = {name: tensor.shape for name, tensor in _tensors(built)}
    return {name: list(t.shape) for name, t in _tensors(model) if t.shape != wanted.get(name, t.shape)}


def other_integers(model: nn.Module, built: nn.Module) -> dict[str, dict[str, int]]:
    """The integers of modules of `model` that are others in `built`."""
    modules = dict(built.named_modules())
    counts: dict[str, dict[str, int]] = {}
    for path, module in model.named_modules():
        known = dict(_integers(modules[path])) if path in modules else {}
        differ = {name: value for name, value in _integers(module) if value != known.get(name, value)}
        if differ:
            counts[path] = differ
    return counts


def structure_of(model: nn.Module, built: nn.Module) -> Structure:
    """In which shapes and counts `model` differs from `built`, a new model of its config; {} if in no shape."""
    model, built = _inner(model), _inner(built)
    shapes = other_shapes(model, built)
    return {"shapes": shapes, "counts": other_integers(model, built)} if shapes else {}


def restore_(built: nn.Module, structure: Any, source: str) -> None:
    """Give a newly built model, whose parameters may be on the meta device, a noted structure.

    Raises:
        CheckpointError: `structure` is none of this model; then nothing was changed.
    """
    built = _inner(built)
    shapes, counts = _checked(built, structure, source)
    _reshape_(built, shapes)
    for path, integers in counts.items():
        for name, value in integers.items():
            setattr(built.get_submodule(path), name, value)


def _checked(built: nn.Module, structure: Any, source: str) -> tuple[dict[str, list[int]], dict[str, dict[str, int]]]:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"The structure that config.json of {source!r} notes is not one of its model: {what}.")

    shapes, counts = (
        (structure.get("shapes"), structure.get("counts")) if isinstance(structure, Mapping) else (None, None)
    )
    if not isinstance(shapes, Mapping) or not isinstance(counts, Mapping):
        raise wrong('expected {"shapes": {...}, "counts": {...}}')
    tensors = dict(_tensors(built))
    for name, shape in shapes.items():
        full = list(tensors[name].shape) if name in tensors else None
        if full is None:
            raise wrong(f"it has no tensor {name!r}")
        if not isinstance(shape, list) or len(shape) != len(full) or not all(map(_at_most, shape, full)):
            raise wrong(f"{name!r} of shape {full} cannot become {str(shape)[:80]}")
    modules = dict(built.named_modules())
    for path, integers in counts.items():
        known = dict(_integers(modules[path])) if path in modules else {}
        if not isinstance(integers, Mapping) or not known:
            raise wrong(f"it has no module {path!r} with integers")
        for name, value in integers.items():
            if name not in known or not _at_most(value, known[name]):
                raise wrong(f"{path}.{name} = {known.get(name)} cannot become {str(value)[:80]}")
    return dict(shapes), {path: dict(integers) for path, integers in counts.items()}


def _at_most(value: object, limit: int) -> bool:
    return type(value) is int and 1 <= value <= limit


def _reshape_(model: nn.Module, shapes: Mapping[str, list[int]]) -> None:
    """Replace tensors by those of other shapes: the leading entries of buffers that have values, else no values."""
    tensors = dict(_tensors(model))
    for name, shape in shapes.items():
        path, _, leaf = name.rpartition(".")
        module, tensor = model.get_submodule(path), tensors[name]
        smaller: Tensor
        if isinstance(tensor, nn.Parameter):
            smaller = nn.Parameter(torch.empty(shape, dtype=tensor.dtype, device="meta"), tensor.requires_grad)
        else:
            smaller = tensor[tuple(slice(size) for size in shape)].clone()
        setattr(module, leaf, smaller)
        follow_shapes_(module)


def _inner(model: nn.Module) -> nn.Module:
    inner = getattr(model, "timm_model", model)
    return inner if isinstance(inner, nn.Module) else model


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _integers(module: nn.Module) -> Iterator[tuple[str, int]]:
    """The integers of a module that are not sizes of its own tensors."""
    if not isinstance(module, SIZED):
        yield from ((name, value) for name, value in vars(module).items() if type(value) is int)
