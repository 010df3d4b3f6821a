"""What is measured in a cell: accuracies, and what the scoring cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import PreTrainedModel

from .fitted_head import set_head_
from .method import Method
from .pixels import Pixels
from .prepared_task import PreparedTask


def zero_shot(
    task: PreparedTask, model: PreTrainedModel, splits: Mapping[str, Pixels], bf16: bool = False
) -> dict[str, float] | None:
    """Accuracies of the pruned backbone with the head that was fitted to the dense one; None if there is none."""
    if not task.head.exists():
        return None
    held = {name: value.clone() for name, value in model.state_dict().items()}
    set_head_(model, task.head)
    found = {name: accuracy(model, data, bf16) for name, data in splits.items()}
    model.load_state_dict(held)
    return found


@torch.no_grad()
def accuracy(
    model: nn.Module, data: Pixels, bf16: bool = False, batch_size: int = 250, patches: Tensor | None = None
) -> float:
    """The share of `data` that the model classifies as labelled, under bfloat16 autocast if asked for.

    `patches`: those to read of each image, [N, k], for a model with `px.read_patches`.
    """
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(data), batch_size):
        images, labels = data.batch(slice(start, start + batch_size), device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            more = {} if patches is None else {"patches": patches[start : start + batch_size]}
            logits = model(pixel_values=images, **more).logits
        right += int((logits.argmax(1) == labels).sum())
    return right / len(data)


def forward_units(model: nn.Module, batches: list[dict[str, Tensor]], method: Method) -> float:
    """Cost of all scoring rounds: their multiplications, over those of a forward pass of one image."""
    rounds = method.rounds if method.criterion.iterative or method.gradual else 1
    with FlopCounterMode(display=False, custom_mapping=_GROUPED) as scoring:
        method.criterion.score(model, batches)
    one = batches[0]["pixel_values"][:1].to(next(model.parameters()).device)
    training = model.training
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model.eval()(one)
    model.train(training)
    return round(rounds * scoring.get_total_flops() / forward.get_total_flops(), 1)


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, **kwargs: Any
) -> int:
    """As much as the forward pass, for each of the two gradients that are asked for. torch's own count forgets that
    per-example gradients are computed as groups of one convolution, and is then too high by their number."""
    transposed, mask = rest[4], rest[7]
    return conv_flop_count(list(x), list(weight), list(gradient), transposed) * (int(mask[0]) + int(mask[1]))


_GROUPED = {torch.ops.aten.convolution_backward: _convolution_backward}
