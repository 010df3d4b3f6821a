"""One image to run a model on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from .inputs import Inputs, inputs_of


def example_of(model: nn.Module, example: Any = None) -> Inputs:
    """One image to run `model` on: the first of the batch `example`, or zeros of the size that the model names.

    Raises:
        DataError: there is neither.
    """
    example = default_example(model) if example is None else example
    if example is None:
        raise DataError(
            f"the configuration of {type(model).__name__} names no image size to run it on. Pass example=images, a "
            "batch as the model takes them."
        )
    return next(next(inputs_of([example], model)).parts(1))


def default_example(model: nn.Module) -> Tensor | None:
    """One image of zeros of the size that the model's configuration names, or None."""
    config = getattr(model, "config", None)
    config = getattr(config, "vision_config", config)  # of a model of images and texts
    size = getattr(config, "image_size", None)
    if size is not None:
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return torch.zeros(1, getattr(config, "num_channels", 3), height, width)
    timm_model = getattr(model, "timm_model", model)
    timm_config = getattr(timm_model, "pretrained_cfg", None) or getattr(timm_model, "default_cfg", None)
    input_size = (timm_config or {}).get("input_size")
    return None if input_size is None else torch.zeros(1, *input_size)
