"""Contexts for scoring: eval mode, and no autocast for path sums."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from .wrappers import is_compiled


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in eval mode; each gets its own ``training`` flag back.

    Also leaves ``torch.inference_mode``, under which nothing can be differentiated, and runs what is compiled as it
    is written: rules must see every operation.
    """
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.inference_mode(False), _as_written(model):
            yield
    finally:
        for module, training in flags.items():
            module.training = training


def _as_written(model: nn.Module) -> AbstractContextManager[object]:
    return torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """Where the first parameter is; the CPU, if there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast: path sums, and their gradients, are never rounded to a lower precision."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
