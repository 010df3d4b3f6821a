"""The training of a cell: a plain loop, the same for every method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import get_cosine_schedule_with_warmup, set_seed

import px_hf as px

from .budget import Budget
from .pixels import Pixels

Zeros = Callable[[torch.optim.Optimizer, int], AbstractContextManager[Any]]
"""What keeps or makes zeros during training, given the optimizer and the number of steps."""


def fine_tune(
    model: nn.Module, zeros: Zeros, data: Pixels, budget: Budget, seed: int, patches: Tensor | None = None
) -> Any:
    """A plain loop: the order of the data, the shifts and flips depend on `seed` alone, not on the method.

    `patches`: those to read of each image, [N, k], for a model with `px.read_patches`.
    Returns what kept or made the zeros.
    """
    set_seed(seed)
    device = next(model.parameters()).device
    model.train()
    if device.type == "cpu" or budget.bf16:
        model.to(memory_format=torch.channels_last)
    decay = budget.weight_decay
    if budget.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(
            model.parameters(), budget.learning_rate, momentum=0.9, nesterov=True, weight_decay=decay
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), budget.learning_rate, weight_decay=decay)
    size = min(budget.batch_size, len(data))
    per_epoch = len(data) // size  # whole batches: BatchNorm dislikes a rest of one
    steps = max(1, round(per_epoch * budget.num_train_epochs))
    schedule = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    rng = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    with zeros(optimizer, steps) as kept:
        for step in range(steps):
            if step % per_epoch == 0:
                order = rng.permutation(len(data))
            place = step % per_epoch * size
            rows = np.sort(order[place : place + size])
            images, labels = data.batch(rows, device)
            more = {} if patches is None else {"patches": patches[rows]}
            images = vary(images, rng, budget)
            with torch.autocast(device.type, torch.bfloat16, enabled=budget.bf16):
                logits = model(pixel_values=images, **more).logits
            loss = F.cross_entropy(logits.float(), labels)
            if not bool(torch.isfinite(loss)):
                raise px.NonFiniteError(f"the loss of step {step} is not finite: lower --learning_rate.")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    return kept


def vary(images: Tensor, rng: np.random.Generator, budget: Budget) -> Tensor:
    """Light augmentation of a whole batch: a shift of up to an eighth, the border repeated, and mirroring."""
    n, _, height, width = images.shape
    if budget.random_shift:
        rows, columns = (
            torch.from_numpy(rng.integers(-(side // 8), side // 8 + 1, n)).to(images.device)
            for side in (height, width)
        )
        y = (torch.arange(height, device=images.device) + rows[:, None]).clamp(0, height - 1)
        x = (torch.arange(width, device=images.device) + columns[:, None]).clamp(0, width - 1)
        every = torch.arange(n, device=images.device)[:, None, None]
        images = images.permute(0, 2, 3, 1)[every, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
    if budget.horizontal_flip:
        mirrored = torch.from_numpy(rng.random(n) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
    return images.contiguous(memory_format=torch.channels_last)
