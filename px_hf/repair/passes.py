"""Passes of images through networks, on which something is measured; processes share the batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..distributed import processes, raise_together
from ..errors import PxError
from ..model.inputs import Batches, Inputs, inputs_of
from ..model.modes import device_of, evaluating, full_precision
from ..model.undisturbed import undisturbed


@contextmanager
def measuring(batches: Batches, *models: nn.Module) -> Iterator[None]:
    """All in eval mode, no autocast, random states as they were; an error of one process is one of all."""
    problem: PxError | None = None
    try:
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(evaluating(model))
            stack.enter_context(full_precision(device_of(models[0])))
            stack.enter_context(undisturbed(models[0], batches))
            yield
    except PxError as error:
        problem = error
    raise_together(problem)


def shares(batches: Batches, model: nn.Module) -> Iterator[tuple[Inputs, bool]]:
    """Every batch, and whether it is this process's: batch i is the work of process i mod N."""
    group = processes()
    for index, inputs in enumerate(inputs_of(batches, model)):
        yield inputs, index % group.world_size == group.rank


@contextmanager
def before(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """With forward pre-hooks."""
    with _removed([module.register_forward_pre_hook(hook) for module, hook in hooks.items()]):
        yield


@contextmanager
def after(hooks: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """With forward hooks."""
    with _removed([module.register_forward_hook(hook) for module, hook in hooks.items()]):
        yield


@contextmanager
def _removed(handles: list[RemovableHandle]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
