"""Run a model in eval mode and leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module of ``model`` in eval mode; each gets its own ``training`` flag back."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training
