"""What one batch holds, in whatever form: images, labels, and the part of it that does not fit the model.

What is unambiguous is taken as it is meant; for the rest an error names the batch and says what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

_INTO_BATCHES = "torch.utils.data.DataLoader(dataset, batch_size=32), or dataset.batch(32) of a datasets set"
_PROCESSED = "what the model's image processor returns: processor(images, return_tensors='pt')['pixel_values']"


def require_batches(batches: Any) -> None:
    """Something that can be read again and again, batch by batch.

    Raises:
        DataError: it is a single batch, a set of single examples that cannot be iterated over, or an iterator.
    """
    if isinstance(batches, Iterator):
        raise DataError(
            "batches is an iterator, which can be read only once, but every round reads it again; "
            "pass a DataLoader or list(batches)."
        )
    if isinstance(batches, (str, bytes, Tensor)) or not isinstance(batches, Iterable):
        examples = hasattr(batches, "__getitem__") and hasattr(batches, "__len__")
        single = isinstance(batches, (str, bytes, Tensor)) or not examples
        raise DataError(
            f"batches is a {type(batches).__name__}; expected a re-iterable of batches, such as a DataLoader or a "
            "list of tensors [N, C, H, W]. "
            + ("Put a single batch into a list." if single else f"It holds single examples: use {_INTO_BATCHES}.")
        )


def images_of(batch: Any, index: int) -> Tensor:
    """The images of a batch: itself, the first of a pair, or ``pixel_values`` of a mapping.

    Raises:
        DataError: they are no tensor of floats [N, ...].
    """
    images = batch
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise DataError(
                f"batch {index} is a mapping with keys {sorted(map(str, batch))}; expected 'pixel_values': "
                f"{_PROCESSED}."
            )
        images = batch["pixel_values"]
    elif isinstance(batch, (tuple, list)) and batch:
        images = batch[0]
    if not isinstance(images, Tensor):
        raise DataError(
            f"batch {index} holds images of type {type(images).__name__}; expected a tensor [N, C, H, W], a pair "
            f"(images, labels) or a mapping with 'pixel_values'. {_advice(images)}"
        )
    if not images.is_floating_point():
        raise DataError(
            f"the images of batch {index} are {images.dtype}; expected floats, as the network takes "
            f"them: {_PROCESSED}."
        )
    if images.dim() < 2 or images.shape[0] == 0:
        raise DataError(f"the images of batch {index} have shape {tuple(images.shape)}; expected [N, C, H, W], N ≥ 1.")
    return images


def _advice(images: Any) -> str:
    first = images[0] if isinstance(images, (list, tuple)) and images else images
    if type(first).__module__.split(".")[0] == "PIL":
        return f"Of PIL images take {_PROCESSED}."
    if isinstance(first, Tensor):
        return "Put the tensors into one: torch.stack(images)."
    if hasattr(first, "__array__"):
        return "Make a tensor of the array: torch.from_numpy(array), or dataset.with_format('torch')."
    return "A set of datasets gives tensors after dataset.with_format('torch')."


def labels_of(batch: Any, images: Tensor, index: int) -> Tensor | None:
    """The labels of a batch, if it has any that a tensor can hold: the second of a pair, ``labels`` or ``label``.

    Raises:
        DataError: there is one label and not one for each image, so the batch is a single example.
    """
    found: Any = None
    if isinstance(batch, Mapping):
        found = batch.get("labels", batch.get("label"))
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    labels = _tensor(found)
    if labels is None or labels.dim() > 0:
        return labels
    if images.dim() > 3 and len(images) == 1:
        return labels[None]
    raise single_example(images, index)


def _tensor(labels: Any) -> Tensor | None:
    if labels is None or isinstance(labels, (Tensor, str, bytes, Mapping)):
        return labels if isinstance(labels, Tensor) else None
    try:
        return torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):  # labels of another kind: texts, boxes
        return None


def single_example(images: Tensor, index: int) -> DataError:
    return DataError(
        f"batch {index} is a single example: its image has shape {tuple(images.shape)}, and batches hold [N, C, H, "
        f"W]. Put the examples into batches: {_INTO_BATCHES}; a single image is a batch as image[None]."
    )


def require_images(images: Tensor, model: nn.Module, index: int) -> None:
    """A convolution takes a single image too, and gives scores of something else.

    Raises:
        DataError: [C, H, W] for a model whose first layer is a convolution of C channels.
    """
    first = _first_layer(model)
    if images.dim() == 3 and isinstance(first, nn.Conv2d) and first.in_channels == images.shape[0]:
        raise single_example(images, index)


def misfit(images: Tensor, model: nn.Module) -> str | None:
    """What is wrong with images that the model fails on, as far as that can be seen."""
    first = _first_layer(model)
    if not isinstance(first, nn.Conv2d):
        return None
    shape = tuple(images.shape)
    if images.dim() != 4:
        return (
            f"have shape {shape}; expected [N, {first.in_channels}, H, W]. To a single image add a dimension by "
            "image[None], to grayscale images [N, H, W] by images[:, None]."
        )
    if images.shape[1] != first.in_channels:
        gray = " Turn grayscale images into RGB: image.convert('RGB') before the image processor." * (shape[1] == 1)
        return f"have {shape[1]} channel(s), and the model takes {first.in_channels}.{gray}"
    return None


def _first_layer(model: nn.Module) -> nn.Module | None:
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return next((module for module in model.modules() if isinstance(module, kinds)), None)
