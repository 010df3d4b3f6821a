"""Small networks that the property tests run over. A new architecture joins by adding a row."""

from __future__ import annotations

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3 * 64, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(),
        nn.Linear(8, 5, bias=False),
    )  # fmt: skip


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3, bias=False),
        nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5, bias=False),
    )  # fmt: skip


def hf_vit(attention: str = "sdpa") -> nn.Module:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4,
        num_labels=5, attn_implementation=attention,
    )  # fmt: skip
    return ViTForImageClassification(config)


def hf_resnet() -> nn.Module:
    config = ResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 2],
        layer_type="basic",
        num_labels=5,
        downsample_in_first_stage=True,
    )
    return ResNetForImageClassification(config)


def timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, depth=2, embed_dim=24, num_heads=2, num_classes=5
    )


def timm_resnet() -> nn.Module:
    return timm.create_model("resnet10t", num_classes=5, zero_init_last=False)


def torchvision_vit() -> nn.Module:
    model = torchvision.models.VisionTransformer(8, 4, 2, 2, 16, 24, num_classes=5)
    nn.init.normal_(model.heads.head.weight)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "hf vit": hf_vit,
    "hf vit, eager": lambda: hf_vit("eager"),
    "hf resnet": hf_resnet,
    "timm vit": timm_vit,
    "timm resnet": timm_resnet,
    "torchvision vit": torchvision_vit,
}

CONSERVING = ("mlp", "cnn")
"""Without biases, normalisation and branches: the scores of every layer add up to R."""


def build(name: str) -> nn.Module:
    """The network of that name with fixed random weights, and BatchNorm statistics unlike a fresh one's."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def images(count: int = 6, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sizes(name: str) -> int:
    return 32 if name in ("hf resnet", "timm resnet") else 8
