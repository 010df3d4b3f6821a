"""The pretrained backbone of a recipe: its image processor, and the model with a head for the task."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

import px_hf as px

from ..errors import listed
from ..hub.kinds import kind_of
from .arguments import FineTuneArguments, ModelArguments


def load_processor(model_args: ModelArguments, **changes: Any) -> BaseImageProcessor:
    """The image processor that comes with the backbone, with other settings where `changes` names them.

    Raises:
        CheckpointError: there is none.
    """
    name = model_args.model_name_or_path
    try:
        return AutoImageProcessor.from_pretrained(name, **model_args.hub(), **changes)
    except (OSError, ValueError) as error:
        raise px.CheckpointError(f"Cannot load the image processor of {name}: {error}") from error


def load_model(model_args: ModelArguments, labels: list[str] | None, training: FineTuneArguments) -> PreTrainedModel:
    """The backbone with a head for `labels` (None: its own); the same weights, also random ones, on every call.

    Raises:
        CheckpointError: transformers has no image classifier with this backbone.
    """
    set_seed(training.seed)
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.hub())
    require_classifier(config, model_args.model_name_or_path)
    if labels is None and kind_of(config.to_dict()).task in HEADLESS:
        labels = []  # whose logits are then the features
    if labels is not None:
        name_classes_(config, labels)
        if hasattr(config, "label_names"):
            config.label_names = list(labels)  # timm's, which TimmWrapper would save instead
    if getattr(config, "model_args", None):
        config.model_args.pop("num_classes", None)  # written by timm's push_to_hub, and refused by TimmWrapper
    model = AutoModelForImageClassification.from_pretrained(
        model_args.model_name_or_path,
        config=config,
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
        **model_args.hub(),
    )
    return model.to(training.device)


HEADLESS = ("image-feature-extraction", "zero-shot-image-classification")
"""Tasks of backbones that were saved without a classifier."""


def require_classifier(config: PreTrainedConfig, name: str) -> Any:
    """The class of transformers that is this backbone with a head; None if the model brings its own code.

    Raises:
        CheckpointError: there is none.
    """
    if getattr(config, "auto_map", None):
        return None
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING.get(type(config), None)
    if found is None:
        raise px.CheckpointError(
            f"{name} is a {config.model_type}, to which transformers adds no classifier of images, so it cannot be "
            "fine-tuned or evaluated here. Use the whole model (of CLIP and SigLIP the one of images and texts), or "
            "prune and evaluate it in Python: docs/BACKBONES.md."
        )
    return found[0] if isinstance(found, tuple) else found


def require_trained_head(model_args: ModelArguments, labels: list[str]) -> None:
    """For a model that is not fine-tuned: it must tell apart these classes, in this order.

    Where its config has no names, only ``LABEL_3`` and the like, their number is all that is compared.

    Raises:
        CheckpointError: its config names others.
    """
    config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.hub())
    own = [str(config.id2label[k]) for k in range(int(config.num_labels or 0))]
    unnamed = all(name == f"LABEL_{k}" for k, name in enumerate(own))
    if own == labels or (unnamed and len(own) == len(labels)):
        return
    how = "the same classes in another order" if sorted(own) == sorted(labels) else f"{len(own)} classes"
    raise px.CheckpointError(
        f"--num_train_epochs 0 keeps the head of {model_args.short_name()}, which was trained for {how} "
        f"({listed(own, 4)}); the data have {len(labels)} ({listed(labels, 4)}). Fine-tune it, or name a model of "
        "these classes in this order."
    )


def name_classes_(config: PreTrainedConfig, labels: list[str]) -> None:
    """The classes that the model is to tell apart, in the order of its logits."""
    config.id2label = dict(enumerate(labels))  # also sets num_labels
    config.label2id = {name: k for k, name in enumerate(labels)}
