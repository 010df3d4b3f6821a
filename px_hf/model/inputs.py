"""The calibration data as a criterion sees it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError
from .wrappers import paths_of_tensors

Batches = Iterable[Any]
"""A re-iterable of batches: a list, a DataLoader. A batch is a tensor [N, C, H, W], a pair
(images, labels), or a mapping with ``pixel_values`` and, where needed, ``labels``. Other tensors of a
mapping that the model's ``forward`` names (``pixel_attention_mask``, ``input_ids``) go to it as they are."""


@dataclass(frozen=True)
class Inputs:
    """What the model is called with: images [N, ...], where paths start, and ``others`` by keyword.

    ``labels`` are those of the batch, if it has any; the model does not see them, and only `classes_of` checks them.
    """

    images: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None

    def parts(self, numbers: int) -> Iterator[Inputs]:
        """The same examples in order, in parts whose images hold at most ``numbers`` numbers, or are one image."""
        size = max(1, numbers // max(1, self.images[0].numel()))
        for start in range(0, len(self.images), size):
            part = slice(start, start + size)
            labels = None if self.labels is None else self.labels[part]
            yield Inputs(self.images[part], {name: other[part] for name, other in self.others.items()}, labels)

    def probe(self) -> Inputs:
        """One example with all-ones images."""
        return Inputs(torch.ones_like(self.images[:1]), {name: other[:1] for name, other in self.others.items()})


def inputs_of(batches: Batches, model: nn.Module) -> Iterator[Inputs]:
    """The inputs of each batch on the device of ``model``, its images in the dtype of ``model``.

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
        images = _images(batch, count - 1).to(like.device, like.dtype)
        images = images.clone() if images.is_inference() else images
        others = _others(batch, model) if isinstance(batch, Mapping) else {}
        labels = _labels(batch)
        yield Inputs(
            images,
            {name: other.to(like.device) for name, other in others.items()},
            None if labels is None else labels.to(like.device),
        )
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


def _labels(batch: Any) -> Tensor | None:
    labels = None
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        labels = batch[1]
    return labels if isinstance(labels, Tensor) else None


def _others(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors beside images and labels that ``forward`` takes by name."""
    named = inspect.signature(model.forward).parameters.keys() - {"pixel_values", "labels"}
    return {name: value for name, value in batch.items() if name in named and isinstance(value, Tensor)}


def run(model: nn.Module, inputs: Inputs) -> Tensor:
    """The logits [N, K] of ``model`` for ``inputs``.

    Raises:
        DataError: the output is neither a tensor [N, K] nor has ``.logits``.
    """
    keyword = "pixel_values" in inspect.signature(model.forward).parameters
    output = model(pixel_values=inputs.images, **inputs.others) if keyword else model(inputs.images, **inputs.others)
    logits = getattr(output, "logits", output)
    named_otherwise = getattr(output, "last_hidden_state", None)  # as transformers' PPLCNet does
    if isinstance(named_otherwise, Tensor) and named_otherwise.dim() == 2:
        logits = named_otherwise
    if isinstance(logits, (tuple, list)) and logits:
        logits = logits[0]
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(
            f"{type(model).__name__} returned {shape}; expected a tensor [N, K] or an output with .logits."
        )
    return logits


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs) -> Tensor:
    """`run`, with ``tensors`` in place of the parameters and buffers of those names."""
    paths = paths_of_tensors(model)
    return torch.func.functional_call(
        _Run(model), {f"model.{paths[name]}": tensor for name, tensor in tensors.items()}, (inputs,)
    )


class _Run(nn.Module):
    """`run` as a module, so that its parameters can be passed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return run(self.model, inputs)


def classes_of(inputs: Inputs, logits: Tensor, batch: int) -> Tensor:
    """The labels of the batch, int64 [N] for logits [N, K], for a criterion that cannot do without.

    Raises:
        DataError: there are none, they are not whole numbers, one for each image, or one is no class of ``logits``.
    """
    labels, classes = inputs.labels, logits.shape[1]
    if labels is None:
        raise DataError(
            f"batch {batch} has no labels, which this criterion needs; expected a pair (images, labels) or a mapping "
            "with 'pixel_values' and 'labels', both tensors."
        )
    if labels.shape != logits.shape[:1] + logits.shape[2:] or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"the labels of batch {batch} are {labels.dtype} of shape {tuple(labels.shape)}; expected class "
            f"indices of shape {tuple(logits.shape[:1] + logits.shape[2:])}."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"the labels of batch {batch} lie in {low} to {high}, but the network has classes 0 to {classes - 1}. "
            "Load it with a head for this task (num_labels)."
        )
    return labels.to(torch.int64)


def require_finite(logits: Tensor, batch: int) -> None:
    """The network's own output must be finite.

    Raises:
        NonFiniteError: it is not; names the batch.
    """
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(
            f"the network's output for batch {batch} is not finite. Check the images for NaN, and whether the model "
            f"can run in {logits.dtype}."
        )
