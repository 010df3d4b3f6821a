"""Any saved image classifier or backbone, by folder or id: px_hf's, transformers', timm's; and an image for it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor
from transformers.utils import CONFIG_NAME

import px_hf as px

from ..compact.files import find
from ..hub.kinds import class_of
from ..model.example import default_example
from .sparse_backbone import CARRIED, has_zeros, holds_masks, says_sparse


def load(name: str, trust_remote_code: bool = False) -> nn.Module:
    """The model of a folder or Hub repository, in eval mode: by px_hf if px_hf wrote it, else by its own library.

    A config that says "pruned" beside a dense model without masks was carried there by stock saving, and is warned of.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    path = find(name, CONFIG_NAME)
    if path is None:
        raise px.CheckpointError(f"{name!r} holds no {CONFIG_NAME}: it is no saved model.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if holds_masks(name):
            return px.from_pretrained(name, trust_remote_code=trust_remote_code).eval()
        if "architecture" in config and "model_type" not in config:
            source = "local-dir" if Path(name).is_dir() else "hf-hub"
            model: nn.Module = timm.create_model(f"{source}:{name}", pretrained=True)
        else:
            model = class_of(config).from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, px.PxError):
            raise
        raise px.CheckpointError(f"Cannot load {name!r}: {type(error).__name__}: {error}") from error
    if says_sparse(config) and not has_zeros(model, config):
        warnings.warn(f"{name}: {CARRIED}", stacklevel=2)
    return model.eval()


def example(name: str, model: nn.Module, image_size: int | None = None) -> Tensor:
    """One image [1, C, H, W] as the model takes it: of `image_size`, or of what its image processor or configuration
    says.

    Raises:
        InvalidArgumentError: none of them says anything.
    """
    if image_size is not None:
        return torch.zeros(1, 3, image_size, image_size)
    if find(name, "preprocessor_config.json") is not None:
        processor = AutoImageProcessor.from_pretrained(name)
        return processor(Image.new("RGB", (500, 500), "white"), return_tensors="pt")["pixel_values"]
    found = default_example(model)
    if found is None:
        raise px.InvalidArgumentError(f"Nothing says which images {name!r} takes. Pass --image_size.")
    return found
