"""The calibration data as a criterion sees it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, NonFiniteError, PxError
from .batches import images_of, labels_of, misfit, require_batches, require_images
from .outputs import Output, tensor_of
from .wrappers import paths_of_tensors

Batches = Iterable[Any]
"""A re-iterable of batches: a list, a DataLoader. A batch is a tensor [N, C, H, W], a pair
(images, labels), or a mapping with ``pixel_values`` and, where needed, ``labels`` or ``label``; labels are a tensor
or a list of whole numbers. Other tensors of a mapping that the model's ``forward`` names (``pixel_attention_mask``,
``input_ids``) go to it as they are."""


@dataclass(frozen=True)
class Inputs:
    """What the model is called with: images [N, ...], where paths start, and ``others`` by keyword.

    ``labels`` are those of the batch, if it has any; the model does not see them, and only `classes_of` checks them.
    ``number`` is the batch's, for messages.
    """

    images: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)
    labels: Tensor | None = None
    number: int | None = None

    def with_images(self, images: Tensor) -> Inputs:
        """Other images for the model, in place of these; without labels."""
        return Inputs(images, self.others, None, self.number)

    def parts(self, numbers: int) -> Iterator[Inputs]:
        """The same examples in order, in parts whose images hold at most ``numbers`` numbers, or are one image."""
        size = max(1, numbers // max(1, self.images[0].numel()))
        for start in range(0, len(self.images), size):
            part = slice(start, start + size)
            labels = None if self.labels is None else self.labels[part]
            others = {name: other[part] for name, other in self.others.items()}
            yield Inputs(self.images[part], others, labels, self.number)

    def probe(self) -> Inputs:
        """One example with all-ones images."""
        others = {name: other[:1] for name, other in self.others.items()}
        return Inputs(torch.ones_like(self.images[:1]), others, None, self.number)


def inputs_of(batches: Batches, model: nn.Module) -> Iterator[Inputs]:
    """The inputs of each batch on the device of ``model``, its images in the dtype of ``model``.

    Raises:
        DataError: ``batches`` is empty, exhausted, or a batch is not of a known form.
    """
    require_batches(batches)
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    count = 0
    for count, batch in enumerate(batches, start=1):
        images = images_of(batch, count - 1)
        labels = labels_of(batch, images, count - 1)
        require_images(images, model, count - 1)
        images = images.to(like.device, like.dtype)
        images = images.clone() if images.is_inference() else images
        others = _others(batch, model) if isinstance(batch, Mapping) else {}
        yield Inputs(
            images,
            {name: other.to(like.device) for name, other in others.items()},
            None if labels is None else labels.to(like.device),
            count - 1,
        )
    if count == 0:
        raise DataError(
            "batches is empty; at least one batch of images is needed to follow paths. If it was not empty the first "
            "time, it can be read only once: pass a DataLoader or a list."
        )


def _others(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The tensors beside images and labels that ``forward`` takes by name."""
    named = inspect.signature(model.forward).parameters.keys() - {"pixel_values", "labels"}
    return {name: value for name, value in batch.items() if name in named and isinstance(value, Tensor)}


def run(model: nn.Module, inputs: Inputs, output: Output = None) -> Tensor:
    """The logits [N, K] of ``model`` for ``inputs``, or another output of it: see `px_hf.model.outputs`.

    Raises:
        DataError: it returns none that can be scored for, or the images do not fit the model.
        InvalidArgumentError: it returns none of the name ``output``.
    """
    return tensor_of(call(model, inputs), model, output)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """What ``model`` returns for ``inputs``; of a model of images and texts that is given no text, its image features.

    Raises:
        DataError: the images do not fit the model.
    """
    keyword = "pixel_values" in inspect.signature(model.forward).parameters
    try:
        features = getattr(model, "get_image_features", None)
        if callable(features) and "input_ids" not in inputs.others:
            return _embeds(features(pixel_values=inputs.images))
        if keyword:
            return model(pixel_values=inputs.images, **inputs.others)
        return model(inputs.images, **inputs.others)
    except (ValueError, IndexError, TypeError, RuntimeError) as error:
        problem = None if isinstance(error, PxError) else misfit(inputs.images, model)
        if problem is None:
            raise
        which = "" if inputs.number is None else f" of batch {inputs.number}"
        raise DataError(f"the images{which} {problem} ({type(model).__name__}: {error})") from error


def _embeds(features: Any) -> dict[str, Any]:
    """What ``get_image_features`` returned, the embeddings by the name that they have in other models.

    transformers before version 5 returned the embeddings alone.
    """
    if not isinstance(features, Mapping):
        return {"image_embeds": features}
    return {"image_embeds": features.get("pooler_output"), **features}


def run_with(model: nn.Module, tensors: Mapping[str, Tensor], inputs: Inputs, output: Output = None) -> Tensor:
    """`run`, with ``tensors`` in place of the parameters and buffers of those names."""
    paths = paths_of_tensors(model)
    return torch.func.functional_call(
        _Run(model), {f"model.{paths[name]}": tensor for name, tensor in tensors.items()}, (inputs, output)
    )


class _Run(nn.Module):
    """`run` as a module, so that its parameters can be passed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs, output: Output) -> Tensor:
        return run(self.model, inputs, output)


def classes_of(inputs: Inputs, logits: Tensor, batch: int) -> Tensor:
    """The labels of the batch, int64 [N] for logits [N, K], for a criterion that cannot do without.

    Raises:
        DataError: there are none, they are not whole numbers, one for each image, or one is no class of ``logits``.
    """
    labels, classes = inputs.labels, logits.shape[1]
    if labels is None:
        raise DataError(
            f"batch {batch} has no labels, which this criterion needs; expected a pair (images, labels) or a mapping "
            "with 'pixel_values' and 'labels' (or 'label'): a tensor or a list of class indices."
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
