"""A backbone that px_hf pruned before: its masks, and how they were found."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

import px_hf as px

from ..hub.saving import OF_MASKS
from ..hub.timm_models import WRAPPER_PREFIX
from .arguments import ModelArguments


def is_sparse(config: PreTrainedConfig) -> bool:
    """Whether the configuration says that px_hf pruned the model."""
    told = getattr(config, "px", None) or {}
    return told.get("weights_kept", 0) < told.get("weights", 0)


def read_masks(model_args: ModelArguments, config: PreTrainedConfig) -> px.Masks:
    """The masks that came with the backbone, by the names that its weights have in transformers.

    Raises:
        CheckpointError: it has none.
    """
    hub = {key: value for key, value in model_args.hub().items() if key != "trust_remote_code"}
    masks = px.Masks.from_pretrained(model_args.model_name_or_path, **hub)
    if config.model_type != "timm_wrapper":
        return masks
    return px.Masks({f"{WRAPPER_PREFIX}{name.removeprefix(WRAPPER_PREFIX)}": mask for name, mask in masks.items()})


def kept_masks(model_args: ModelArguments, model: PreTrainedModel) -> tuple[px.Masks, dict[str, Any]]:
    """The masks of the backbone, and their provenance.

    Raises:
        CheckpointError: it has none, or they are not those of its weights.
        TargetError: they prune a head of another size than the task's.
    """
    name = model_args.model_name_or_path
    try:
        masks = read_masks(model_args, model.config)
    except px.CheckpointError as error:
        raise px.CheckpointError(f"--keep_masks needs a backbone that px_hf has pruned. {error}") from error
    if revived := masks.revived(model):
        raise px.CheckpointError(
            f"{sum(revived.values())} weights of {name} that its masks prune are not zero, for example in "
            f"{next(iter(revived))!r}: the masks are not those of this model."
        )
    told = getattr(model.config, "px", None) or {}
    how = {key: told[key] for key in OF_MASKS if key in told and not key.startswith("base_")}
    return masks, {**how, "masks_from": model_args.short_name(), "sparsity_asked": masks.sparsity}
