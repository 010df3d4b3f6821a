"""Models with random weights: sizes, times and memory do not depend on their values."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

VITS: dict[str, dict[str, Any]] = {
    "ViT-Ti/16": {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768},
    "ViT-S/16": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "ViT-B/16": {},
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "ViT-H/16": {"hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "intermediate_size": 5120},
}
TINY_VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
TINY_RESNET: dict[str, Any] = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 2],
    "layer_type": "basic",
}


def resnet(classes: int, **shape: Any) -> nn.Module:
    return ResNetForImageClassification(ResNetConfig(**{**shape, "num_labels": classes}))


def vit(classes: int, **shape: Any) -> nn.Module:
    return ViTForImageClassification(ViTConfig(**{**shape, "num_labels": classes}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": lambda: resnet(1000),
    "tiny ResNet": lambda: resnet(10, **TINY_RESNET),
    "tiny ViT": lambda: vit(10, **TINY_VIT),
    **{name: partial(vit, 1000, **shape) for name, shape in VITS.items()},
}
