"""BatchNorm statistics of a pruned network."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """Sets the BatchNorm statistics to the means over the batches of what the model, as it is now, makes of them.

    The model is in eval mode afterwards.
    """
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    device = next(model.parameters()).device
    try:
        for batch in batches:
            model(pixel_values=batch["pixel_values"].to(device))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
