"""Score in the middle of training: what training has at hand is as it was afterwards.

    with undisturbed(model, batches):
        scores = criterion.score(model, batches)

A criterion leaves weights, gradients and modes alone (`px_hf.criteria`). What is left are random numbers, which the
batches may draw (a DataLoader does so each time it is read), and buffers: under DistributedDataParallel each process
has BatchNorm statistics of its own between steps, and would score a network of its own.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..distributed import processes
from .inputs import Batches
from .wrappers import unwrap


@contextmanager
def undisturbed(model: nn.Module, batches: Batches) -> Iterator[None]:
    """Random states and buffers of this process as they were, whatever is drawn or scored inside.

    Random states: of Python, NumPy, torch on the CPU and on the device of `model`, and of the generators that
    `batches`, a DataLoader, and its samplers hold. Inside, the buffers of `model` are those of the first process,
    which are also the ones that DistributedDataParallel hands to all at the next forward.
    """
    with _same_random_states(model, batches), _buffers_of_main(unwrap(model)):
        yield


@contextmanager
def _same_random_states(model: nn.Module, batches: Batches) -> Iterator[None]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    devices = [device] if device.type in ("cuda", "xpu") else []
    python, numpy = random.getstate(), np.random.get_state()
    drawn = [(generator, generator.get_state()) for generator in _generators(batches)]
    try:
        with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in drawn:
            generator.set_state(state)


def _generators(batches: Any) -> list[torch.Generator]:
    samplers = [getattr(batches, name, None) for name in ("sampler", "batch_sampler")]
    owners = [batches, *samplers, getattr(samplers[-1], "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return [generator for generator in found if isinstance(generator, torch.Generator)]


@contextmanager
def _buffers_of_main(model: nn.Module) -> Iterator[None]:
    if processes().world_size == 1:
        yield
        return
    own = [(buffer, buffer.clone()) for buffer in model.buffers() if buffer.is_floating_point()]
    try:
        for buffer, _ in own:
            shared = buffer.contiguous()
            dist.broadcast(shared, src=0)
            buffer.copy_(shared)
        yield
    finally:
        for buffer, value in own:
            buffer.copy_(value)
