"""The network of recipes/prune_segment.py: a segmentation model, or a backbone under a new UPerNet decoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSemanticSegmentation,
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    TimmBackbone,
    TimmBackboneConfig,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTImageProcessor,
    set_seed,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING, MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

import px_hf as px

from .arguments import FineTuneArguments, ModelArguments
from .backbone import load_processor, name_classes_

Item = TypeVar("Item")


def load_model(
    model_args: ModelArguments, decoder_size: int, labels: list[str], training: FineTuneArguments
) -> PreTrainedModel:
    """A segmentation model without auxiliary head, or a backbone under a new decoder; the same on every call.

    Raises:
        InvalidArgumentError: a model that is neither.
    """
    set_seed(training.seed)
    name, hub = model_args.model_name_or_path, model_args.hub()
    config = AutoConfig.from_pretrained(name, **hub)
    if type(config) in MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING:
        name_classes_(config, labels)
        if hasattr(config, "use_auxiliary_head"):
            config.use_auxiliary_head = False
        model = AutoModelForSemanticSegmentation.from_pretrained(
            name, config=config, ignore_mismatched_sizes=True, dtype=torch.float32, **hub
        )
        return model.to(training.device)
    backbone = load_backbone(model_args, config)
    upernet = UperNetConfig(backbone_config=backbone.config, hidden_size=decoder_size, use_auxiliary_head=False)
    name_classes_(upernet, labels)
    set_seed(training.seed)
    model = UperNetForSemanticSegmentation(upernet)
    model.backbone = backbone
    return nn.Module.to(model, training.device)


def load_backbone(model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """A pretrained backbone with four feature maps (or fewer, if it has no more), of transformers or timm.

    Raises:
        InvalidArgumentError: a model of another kind.
    """
    name, hub = model_args.model_name_or_path, model_args.hub()
    if config.model_type == "timm_wrapper":
        return timm_backbone(model_args, config.architecture)
    if type(config) not in MODEL_FOR_BACKBONE_MAPPING:
        raise px.InvalidArgumentError(
            f"{type(config).__name__} of {name} is neither a segmentation model nor a backbone of transformers. Name "
            "a SegFormer, UPerNet, DPT or BEiT, a ResNet, Swin, ConvNeXt or DINOv2, or a model of timm."
        )
    config.out_features = four_of(list(config.stage_names)[1:])
    backbone_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone looks for local folders on the Hub
    return backbone_class.from_pretrained(name, config=config, dtype=torch.float32, **hub)


def timm_backbone(model_args: ModelArguments, architecture: str) -> PreTrainedModel:
    """The feature maps of a model of timm, as transformers' TimmBackbone, which needs the architecture's name alone.

    Raises:
        InvalidArgumentError: its weights fit only with other arguments than the architecture's own.
    """
    name = model_args.model_name_or_path
    source = f"local-dir:{name}" if Path(name).is_dir() else f"hf-hub:{name}@{model_args.model_revision}"
    pyramid: Any = timm.create_model(architecture, features_only=True)
    chosen = four_of(range(len(pyramid.feature_info.info)))
    pretrained = timm.create_model(
        source, pretrained=True, features_only=True, out_indices=chosen, cache_dir=model_args.cache_dir
    )
    config = TimmBackboneConfig(backbone=architecture)
    config.out_indices = chosen
    backbone = TimmBackbone(config)
    try:
        backbone._backbone.load_state_dict(pretrained.state_dict())
    except RuntimeError as error:
        raise px.InvalidArgumentError(f"{name} is not timm's {architecture} as it is: {error}") from error
    return backbone


def four_of(stages: Sequence[Item]) -> list[Item]:
    """The last four of a pyramid of up to seven stages; of more, four at equal distances that end with the last."""
    return list(stages[len(stages) - 1 :: -max(1, len(stages) // 4)][:4])[::-1]


def load_map_processor(model_args: ModelArguments, size: dict[str, int] | None = None) -> BaseImageProcessor:
    """The backbone's image processor, for images of another `size`, if it is given.

    Processors of timm crop, which maps do not bear: for those one with the same size and normalisation that does not.
    """
    processor = load_processor(model_args)
    if isinstance(processor, TimmWrapperImageProcessor):
        _, height, width = processor.data_config["input_size"]
        return ViTImageProcessor(
            size=size or {"height": height, "width": width},
            image_mean=list(processor.data_config["mean"]),
            image_std=list(processor.data_config["std"]),
        )
    return processor if size is None else load_processor(model_args, size=size)
