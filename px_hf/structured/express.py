"""Say in a model's config how wide it is, where the config can."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError
from ..model.empty import build_empty
from ..model.inputs import Inputs, run
from ..model.modes import evaluating
from ..model.widths import other_integers, other_shapes
from .heads import agree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Entries = dict[str, Any]

_MOST_WIDTHS = 4
"""If more old widths became more new ones than this, layers differ, and a config will not say how."""


@torch.no_grad()
def express_in_config_(small: nn.Module, inputs: Inputs) -> bool:
    """Change the config of a transformers model so that a model built from it has the shapes of `small`.

    Numbers in the config that equal an old width, or are a ratio to it, are changed as the width did, one after the
    other, for as long as that leaves fewer tensors of another shape: `intermediate_size`, `mlp_ratio`,
    `num_attention_heads` together with `head_dim`; of TimmWrapper the argument `mlp_ratio` of timm. The new config
    is taken only if in the end no tensor has another shape and a model built from it computes what `small` does.
    Returns whether config and model agree.
    """
    from transformers import PreTrainedModel

    if not isinstance(small, PreTrainedModel):
        return False
    entries: Entries = {}
    built = _build(small, entries)
    while built is not None and (left := other_shapes(small, built)):
        for candidate in _candidates(small, built, entries):
            closer = _build(small, entries | candidate)
            if closer is not None and len(other_shapes(small, closer)) < len(left):
                entries, built = entries | candidate, closer
                break
        else:
            return False
    if built is None:
        return False
    if entries:
        built.load_state_dict(small.state_dict(), assign=True)
        built.to(inputs.images.device)  # buffers that are not saved
        with evaluating(built), evaluating(small):
            if not agree(run(built, inputs), run(small, inputs)):
                return False
        for name, value in entries.items():
            setattr(small.config, name, value)
    return True


def _build(small: PreTrainedModel, entries: Entries) -> nn.Module | None:
    """A model without weights of the changed config; None if there is none with the same modules."""

    def build() -> nn.Module:
        config = copy.deepcopy(small.config)
        for name, value in entries.items():
            setattr(config, name, value)
        model: nn.Module = type(small)(config)
        return model

    try:
        built = build_empty(build, type(small).__name__)
    except CheckpointError:
        return None
    return built if built.state_dict().keys() == small.state_dict().keys() else None


def _candidates(small: PreTrainedModel, built: nn.Module, entries: Entries) -> Iterator[Entries]:
    """Changes of the config that might bring `built` nearer to `small`."""
    shapes = other_shapes(small, built)
    tensors = {**dict(built.named_parameters()), **dict(built.named_buffers())}
    widths = {
        (old, new)
        for name, shape in shapes.items()
        for old, new in zip(tensors[name].shape, shape, strict=True)
        if old != new
    }
    if len(widths) > _MOST_WIDTHS:
        return
    if small.config.model_type == "timm_wrapper":
        arguments = small.config.model_args or {}
        ratios = {shape[0] / shape[1] for shape in shapes.values() if len(shape) == 2}
        yield from ({"model_args": {**arguments, "mlp_ratio": ratio}} for ratio in sorted(ratios))
        return
    known = {**small.config.to_dict(), **entries}
    numbers = {name: value for name, value in known.items() if type(value) in (int, float)}
    modules = dict(small.named_modules())
    for path, integers in other_integers(small, built).items():
        size = vars(modules[path]).get("head_dim")
        for attribute, heads in integers.items():
            before = vars(built.get_submodule(path))[attribute]
            yield from (
                {name: heads, "head_dim": size} for name, n in numbers.items() if n == before and type(size) is int
            )
    for old, new in sorted(widths):
        yield from ({name: new} for name, value in numbers.items() if value == old)
        for name, value in numbers.items():
            scaled = value * new / old
            yield {name: int(scaled) if type(value) is int and scaled == int(scaled) else scaled}
