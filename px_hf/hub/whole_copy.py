"""A sharded model, gathered one tensor at a time on the first process: what is saved and pushed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..distributed import processes
from ..errors import CheckpointError, InvalidArgumentError
from ..model.empty import build_empty
from ..model.shards import whole
from . import timm_models


@torch.no_grad()
def whole_copy(model: nn.Module) -> nn.Module | None:
    """A plain copy of a model of transformers or timm on the CPU of the first process; None on the others.

    A collective: all processes call it. Beside its own shards a process needs memory for the largest tensor.

    Raises:
        InvalidArgumentError: the model is of neither library.
        CheckpointError: its config does not make a model with its parameters.
    """
    require_known(model)
    gathered: dict[Tensor, Tensor] = {}
    main = processes().is_main
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor not in gathered:
            found = whole(tensor)
            gathered[tensor] = found.to("cpu", copy=True) if main else torch.empty(0)
            del found
    if not main:
        return None
    plain = build_empty(lambda: rebuilt(model), type(model).__name__)
    for path, module in model.named_modules():
        try:
            place = plain.get_submodule(path.replace("_orig_mod.", "").removesuffix("_orig_mod"))
        except AttributeError as error:
            raise CheckpointError(
                f"The config of {type(model).__name__} makes no module {path!r}: the model was changed since it was "
                "built. Save it whole: gather its state_dict, and load that into a model that was changed alike."
            ) from error
        for name, parameter in module._parameters.items():
            if parameter is not None:
                place._parameters[name] = nn.Parameter(gathered[parameter], parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                place._buffers[name] = gathered[buffer]
    if isinstance(plain, PreTrainedModel):
        plain.tie_weights()
    return plain.train(model.training)


def require_known(model: nn.Module) -> None:
    """What can be saved and built anew.

    Raises:
        InvalidArgumentError: the model is neither of transformers nor of timm.
    """
    if isinstance(model, PreTrainedModel) or timm_models.is_timm_model(model):
        return
    if hasattr(model, "feature_info"):
        raise InvalidArgumentError(
            "timm does not load the file of a model that was made with features_only=True. Prune and save "
            "timm.create_model(name, pretrained=True, num_classes=0), and load that with features_only=True."
        )
    raise InvalidArgumentError(
        f"save_pretrained needs a model of transformers or timm, got {type(model).__name__}. Of another module "
        "save the state_dict, and the masks with masks.save()."
    )


def rebuilt(model: nn.Module, config: Mapping[str, Any] | None = None) -> nn.Module:
    """The model that the config of a model makes; `config`: that of a timm model, if it has been written already."""
    if isinstance(model, PreTrainedModel):
        return type(model)(copy.deepcopy(model.config))  # of a sharded model its own class: FSDPModule sees to that
    return timm_models.build(config or timm_models.config_of(model))
