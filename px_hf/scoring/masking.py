"""A weight with its pruned entries at zero."""

from __future__ import annotations

import torch
from torch import Tensor


def masked(weight: Tensor, mask: Tensor | None) -> Tensor:
    """``weight`` with its pruned entries at zero, detached."""
    weight = weight.detach()
    return weight if mask is None else torch.where(mask.to(weight.device), weight, 0.0)
