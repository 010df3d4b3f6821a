"""The sizes that layers hold as integers, beside the shapes of their tensors."""

from __future__ import annotations

from typing import Final

from torch import nn

CONVOLUTIONS: Final = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
BATCH_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
SIZED: Final = (nn.Linear, *CONVOLUTIONS, *BATCH_NORMS)
"""Modules whose integers `follow_shapes_` looks after."""


def follow_shapes_(module: nn.Module) -> None:
    """Make the sizes that a linear layer, a convolution or BatchNorm holds as integers those of its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, CONVOLUTIONS):
        first, second = module.weight.shape[:2]
        if module.groups == module.out_channels and not module.transposed:  # depthwise
            module.groups = first
        if module.transposed:
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, BATCH_NORMS):
        tensor = module.weight if module.weight is not None else module.running_mean
        module.num_features = module.num_features if tensor is None else len(tensor)
