"""What a saved model is, by what its `config.json` says: which class builds it, and what the Hub calls its task."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Kind:
    """`loader`: the class of transformers that loads it; `task`: the Hub's name of it; `what`: in words."""

    loader: str
    task: str
    what: str


_CLASSIFIER = Kind("AutoModelForImageClassification", "image-classification", "Image classifier")
_BY_ENDING = {
    "ForSemanticSegmentation": Kind(
        "AutoModelForSemanticSegmentation", "image-segmentation", "Semantic segmentation model"
    ),
    "ForObjectDetection": Kind("AutoModelForObjectDetection", "object-detection", "Object detector"),
    "Backbone": Kind("AutoBackbone", "image-feature-extraction", "Backbone"),
    "Model": Kind("AutoModel", "image-feature-extraction", "Backbone without a classifier"),
}


def kind_of(config: Mapping[str, Any]) -> Kind:
    """A classifier, unless the first of its architectures (of timm: its number of classes) says otherwise."""
    name = _architecture(config)
    if name.endswith("ModelWithProjection"):  # which no auto class knows
        return Kind(name, "image-feature-extraction", "Backbone without a classifier")
    if name.endswith("Model") and "text_config" in config and "vision_config" in config:
        return Kind("AutoModel", "zero-shot-image-classification", "Model of images and texts")
    if "architecture" in config and "model_type" not in config and config.get("num_classes") == 0:
        return Kind("timm", _BY_ENDING["Model"].task, _BY_ENDING["Model"].what)
    return next((kind for ending, kind in _BY_ENDING.items() if name.endswith(ending)), _CLASSIFIER)


def class_of(config: Mapping[str, Any], built: PreTrainedConfig | None = None) -> Any:
    """What loads the model of a `config.json`: an auto class, or of a model without a head the class itself.

    `built`: the same as an object of transformers; a class for another kind of config is not taken.
    """
    kind = kind_of(config)
    found = getattr(transformers, _architecture(config), None)
    own = isinstance(found, type) and issubclass(found, PreTrainedModel) and "auto_map" not in config
    fits = built is None or isinstance(built, getattr(found, "config_class", None) or ())
    if own and fits and kind != _CLASSIFIER and not kind.loader.endswith("Segmentation"):
        return found
    return getattr(transformers, kind.loader, transformers.AutoModel)


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""
