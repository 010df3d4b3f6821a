"""A backbone that px_hf pruned before: its masks, and how they were found."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

import px_hf as px

from ..compact.files import find, find_compact
from ..hub.kinds import kind_of
from ..hub.saving import OF_MASKS
from ..hub.timm_models import WRAPPER_PREFIX
from ..masks_file import MASKS_FILE
from ..model.empty import build_empty
from .arguments import ModelArguments
from .backbone import HEADLESS, require_classifier

CARRIED = (
    "its config says that px_hf pruned it, an entry that stock saving carries along, but its weights do not have "
    "those zeros: it is taken as an ordinary dense model."
)


def says_sparse(config: PreTrainedConfig | Mapping[str, Any]) -> bool:
    """Whether the configuration says that px_hf pruned the model; whether it still is sparse, `has_zeros` says."""
    told = _told(config)
    return told.get("weights_kept", 0) < told.get("weights", 0)


def has_zeros(model: nn.Module, config: PreTrainedConfig | Mapping[str, Any]) -> bool:
    """Whether most of the zeros are there that the configuration speaks of: a new head has none."""
    told = _told(config)
    promised = told.get("weights", 0) - told.get("weights_kept", 0)
    zeros = sum(weight.numel() - int(weight.count_nonzero()) for weight in model.parameters() if weight.dim() > 1)
    return 2 * zeros >= promised


def _told(config: PreTrainedConfig | Mapping[str, Any]) -> dict[str, Any]:
    told = config.get("px") if isinstance(config, Mapping) else getattr(config, "px", None)
    return told or {}


def holds_masks(name: str, **download: Any) -> bool:
    """Whether a folder or repository holds masks: a compact copy, or a file of masks.

    Raises:
        CheckpointError: there is no such folder or repository.
    """
    return find_compact(name, **download) is not None or find(name, MASKS_FILE, **download) is not None


def read_masks(model_args: ModelArguments, config: PreTrainedConfig) -> px.Masks:
    """The masks that came with the backbone, by the names that its weights have in transformers.

    Raises:
        CheckpointError: it has none.
    """
    masks = px.Masks.from_pretrained(model_args.model_name_or_path, **download_of(model_args))
    if config.model_type != "timm_wrapper":
        bare = kind_of(config.to_dict()).task in HEADLESS
        return _of_classifier(masks, config, model_args.model_name_or_path) if bare else masks
    return px.Masks({f"{WRAPPER_PREFIX}{name.removeprefix(WRAPPER_PREFIX)}": mask for name, mask in masks.items()})


def _of_classifier(masks: px.Masks, config: PreTrainedConfig, name: str) -> px.Masks:
    """The masks of a backbone by the names that its weights have under a classifier; what it lacks has none.

    Raises:
        CheckpointError: transformers has no classifier with this backbone, or it holds none of the weights.
    """
    kind = require_classifier(config, name)
    weights = dict(build_empty(lambda: kind(copy.deepcopy(config)), name).named_parameters())
    for level in (f"{kind.base_model_prefix}.", ""):
        found = {level + key: mask for key, mask in masks.tensors.items() if level + key in weights}
        if found:
            return px.Masks(found)
    raise px.CheckpointError(f"{kind.__name__} has none of the weights that the masks of {name} are about.")


def download_of(model_args: ModelArguments) -> dict[str, Any]:
    """What of the arguments is for the download."""
    return {key: value for key, value in model_args.hub().items() if key != "trust_remote_code"}


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
