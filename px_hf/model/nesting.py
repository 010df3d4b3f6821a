"""A model and a module around it give a parameter different names: say for which of the two masks were made."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from .wrappers import named_parameters, unwrap


def where_they_fit(model: nn.Module, shapes: Mapping[str, torch.Size]) -> str | None:
    """What to do about masks of those names and shapes, if they fit a part of the model, or a module around it."""
    name = min(shapes)
    named = named_parameters(model, remove_duplicate=False)
    parameters = {path: p.shape for path, p in named.items() if not nn.parameter.is_lazy(p)}
    for path in parameters:
        if path.endswith(f".{name}"):
            level = path.removesuffix(name)
            if all(parameters.get(level + each) == shape for each, shape in shapes.items()):
                where = level.rstrip(".")
                return (
                    f"They fit its part {where!r}, a {_class_of(model, where)}: pass module.{where} instead, or take "
                    f"masks.under({where!r})."
                )
    for level in _levels_of(name):
        if all(each.startswith(level) and parameters.get(each.removeprefix(level)) == shape
               for each, shape in shapes.items()):  # fmt: skip
            return (
                f"They are those of a module that holds this one as {level.rstrip('.')!r}: pass that module, or prune "
                "this one."
            )
    return None


def _levels_of(name: str) -> list[str]:
    """The beginnings of a name that end with a dot."""
    return [name[: i + 1] for i, letter in enumerate(name) if letter == "."]


def _class_of(model: nn.Module, path: str) -> str:
    try:
        return type(unwrap(unwrap(model).get_submodule(path))).__name__
    except AttributeError:  # levels of wrappers lie between
        return "module"
