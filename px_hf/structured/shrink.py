"""Take units out of a model: a new, smaller one of the same class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import TargetError
from ..masks import Masks
from ..model.adapters import require_merged
from ..model.example import example_of
from ..model.inputs import run, run_with
from ..model.modes import evaluating
from ..model.targets import prunable
from ..model.wrappers import unwrap
from .cut import cut, kept_entries, smaller_copy
from .express import express_in_config_
from .heads import agree, with_counts
from .units import trace_units, unread


@torch.no_grad()
def shrink(model: nn.Module, masks: Masks, example: Any = None) -> tuple[nn.Module, Masks]:
    """A new model without the units that `masks` prune, and what is left of the masks, which fits it.

    ```python
    masks = px.prune(model, batches, px.PX(), sparsity=0.5, scope="structured")
    small, masks = px.shrink(model, masks)      # smaller tensors; the logits that masks.apply_(model) would give
    px.save_pretrained(small, masks, "out")
    ```

    A unit goes if all weights that read it are pruned, by whatever scope: whatever it computes, from its bias or its
    BatchNorm too, then reaches nothing. One unit of a layer always stays. Other pruned weights are zero in the new
    model and pruned in the masks that are returned.

    The new model is of the same class, and trains, saves and runs as any other. Where its config can say how wide it
    is (layers of equal `intermediate_size`), it does, and stock `from_pretrained` loads what is saved; otherwise
    `px.save_pretrained` notes the shapes and `px.from_pretrained` reads them. `model` is not changed.

    `example`: a batch as the model takes it; the first image of it is run, in eval mode, to find the units and to
    compare the two models. By default zeros of the size that the configuration names.

    Raises:
        TargetError: the masks do not fit the model or prune no unit, or the smaller model does not compute what the
            masked one does.
        DataError: there is no example.
    """
    model = unwrap(model)
    require_merged(model, "px.shrink")
    parameters = masks.match(model)
    inputs = example_of(model, example)
    families = trace_units(model, inputs, prunable(model, prune_head=True))
    stays = {family: ~unread(family, masks.tensors) for family in families}
    if not (gone := [family for family in families if not bool(stays[family].all())]):
        raise TargetError(
            "the masks prune no unit whole, so there is nothing to take out. px.prune(..., scope='structured') prunes "
            "whole units."
        )
    found = with_counts(model, inputs, gone)
    stays = {family: ~unread(family, masks.tensors) for family in found}
    kept = kept_entries(model, stays)
    small = smaller_copy(model, kept, stays, masks.tensors)
    rest = Masks({name: cut(mask, kept.get(name, {})) for name, mask in masks.tensors.items()})
    masked = {name: p.masked_fill(~masks.tensors[name].to(p.device), 0) for name, p in parameters.items()}
    with evaluating(model), evaluating(small):
        expected = run_with(model, masked, inputs)
        if not agree(run(small, inputs), expected):
            raise TargetError(
                f"a smaller {type(model).__name__} does not compute what the masked one does. Please report this: the "
                "units of this architecture were not understood. The masks themselves are right."
            )
    express_in_config_(small, inputs)
    return small, rest
