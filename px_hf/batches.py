"""The calibration data as a criterion sees it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DataError, NonFiniteError

Batches = Iterable[Any]
"""A re-iterable of batches: a list, a DataLoader. A batch is a tensor [N, C, H, W], a pair
(images, labels), or a mapping with ``pixel_values`` and, where needed, ``labels``."""


def images_of(batches: Batches, model: nn.Module) -> Iterator[Tensor]:
    """The images of each batch, on the device and in the dtype of ``model``.

    Raises:
        DataError: ``batches`` is empty, exhausted, or a batch is not of a known form.
    """
    if isinstance(batches, (str, bytes, Tensor)) or not isinstance(batches, Iterable):
        raise DataError(
            f"batches is a {type(batches).__name__}; expected a re-iterable of batches, such as a DataLoader "
            "or a list of tensors [N, C, H, W]. Put a single batch into a list."
        )
    if isinstance(batches, Iterator):
        raise DataError(
            "batches is an iterator, which can be read only once, but every round reads it again; "
            "pass a DataLoader or list(batches)."
        )
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    count = 0
    for count, batch in enumerate(batches, start=1):
        yield _images(batch, count - 1).to(like.device, like.dtype)
    if count == 0:
        raise DataError("batches is empty; at least one batch of images is needed to follow paths.")


def _images(batch: Any, index: int) -> Tensor:
    images = batch
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise DataError(
                f"batch {index} is a mapping with keys {sorted(map(str, batch))}; expected 'pixel_values'."
            )
        images = batch["pixel_values"]
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        raise DataError(
            f"batch {index} holds images of type {type(images).__name__}; expected a tensor [N, C, H, W], a pair "
            "(images, labels) or a mapping with 'pixel_values'."
        )
    if not images.is_floating_point():
        raise DataError(f"the images of batch {index} are {images.dtype}; expected floats, as the network takes them.")
    if images.dim() < 2 or images.shape[0] == 0:
        raise DataError(f"the images of batch {index} have shape {tuple(images.shape)}; expected [N, C, H, W], N ≥ 1.")
    return images


def run(model: nn.Module, images: Tensor) -> Tensor:
    """The logits [N, K] of ``model`` for ``images``.

    Raises:
        DataError: the output is neither a tensor [N, K] nor has ``.logits``.
    """
    keyword = "pixel_values" in inspect.signature(model.forward).parameters
    output = model(pixel_values=images) if keyword else model(images)
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"{type(model).__name__} returned {shape}; expected a tensor [N, K] or an output with .logits."
        )
    return logits


def require_finite(logits: Tensor, batch: int) -> None:
    """Raises NonFiniteError if the network's own output is not finite."""
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            f"the network's output for batch {batch} is not finite. Check the images for NaN, and whether the model "
            f"can run in {logits.dtype}."
        )
