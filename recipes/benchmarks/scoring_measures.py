"""What recipes/benchmarks/scoring.py measures: each function measures one thing on one model.

Times are CPU seconds of this process on a CPU, which other work on the machine disturbs least, and seconds between
synchronisations on CUDA. Compared alternatives run in turn, and the median of their ratios counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import process_memory
import torch
import torch.distributed as dist
from random_models import MODELS
from torch import Tensor, nn

import px_hf as px
from px_hf.ops.tracer import zeroed
from px_hf.scopes import Global
from px_hf.scoring.given import Given

CRITERIA = {"Eq. 9": px.PX(), "active": px.PX(paths="active", power=0.25)}


def build(name: str, device: str, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(device, getattr(torch, dtype)).eval()


def draw(model: nn.Module, name: str, count: int) -> Tensor:
    size = 32 if name.startswith("tiny") else 224
    parameter = next(model.parameters())
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images.to(parameter.device, parameter.dtype)


def random_masks(model: nn.Module, sparsity: float) -> px.Masks:
    return px.prune(model, [], px.Random(seed=0), sparsity=sparsity, progress=False)


def seconds(function: Callable[[], Any], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def infer(model: nn.Module, images: Tensor) -> None:
    model(images)


def ratios(model: nn.Module, images: Tensor, sparsity: float, repeats: int) -> dict[str, Any]:
    """Scoring of one batch, whole rounds but for the selection, in inference forwards of the dense model over it."""
    device = images.device.type
    states = {"dense": None, f"{sparsity:.0%} pruned": random_masks(model, sparsity).tensors}
    rows = {f"{name}, {state}": (c, mask) for name, c in CRITERIA.items() for state, mask in states.items()}
    forwards: list[float] = []
    found: dict[str, list[float]] = {row: [] for row in rows}
    infer(model, images)
    before = seconds(lambda: infer(model, images), device)
    for _ in range(repeats):
        for row, (criterion, mask) in rows.items():
            took = seconds(partial(criterion.score, model, [images], masks=mask), device)
            after = seconds(lambda: infer(model, images), device)
            found[row].append(2 * took / (before + after))
            forwards.append(after)
            before = after
    return {
        "dense forward, s": statistics.median(forwards),
        "ratio": {row: statistics.median(values) for row, values in found.items()},
        "spread": {row: [min(values), max(values)] for row, values in found.items()},
    }


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """What ``function`` adds to the memory of this process, or of the GPU, at the peak. On a CPU: Linux only."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    process_memory.restart_peak()
    before = process_memory.now()
    function()
    return process_memory.peak() - before


def peak(model: nn.Module, images: Tensor, what: str, sparsity: float, batches: int) -> int:
    """Of one inference forward ("forward"), or of scoring ``batches`` batches with the criterion called ``what``."""
    masks = random_masks(model, sparsity).tensors if sparsity else None
    device = images.device.type
    with torch.inference_mode():  # what is set up at the first use is nobody's
        model(images[:1])
    if what == "forward":
        return peak_bytes(lambda: infer(model, images), device)
    return peak_bytes(lambda: CRITERIA[what].score(model, [images] * batches, masks=masks), device)


@dataclass(frozen=True)
class _TimedPX(px.PX):
    """Eq. 9, and the seconds of each scoring."""

    spent: list[float] = field(default_factory=list)

    def formula(self, given: Given) -> dict[str, Tensor]:
        scores: dict[str, Tensor] = {}
        device = next(given.model.parameters()).device.type
        self.spent.append(seconds(lambda: scores.update(px.PX.formula(self, given)), device))
        return scores


@dataclass(frozen=True)
class _TimedGlobal(Global):
    """Scope "global", and the seconds of each selection."""

    spent: list[float] = field(default_factory=list)

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, **settings: Any) -> px.Masks:
        found: list[px.Masks] = []
        device = next(iter(scores.values())).device.type
        self.spent.append(seconds(lambda: found.append(Global.choose(self, scores, sparsity, **settings)), device))
        return found[0]


def phases(model: nn.Module, images: Tensor, batch_size: int, measured: int, rounds: int) -> dict[str, Any]:
    """Seconds of ``rounds`` rounds of Eq. 9 to 90 % sparsity, extrapolated from a pruning in ``measured`` rounds.

    The first round, with dense masks and all images, counts once; the others do with one image. Masking, the product
    of weights and masks, is a part of scoring; it is timed by itself. Overhead is all that `px.prune` does beside:
    checks, the bar, making `Masks`.
    """
    device = images.device.type
    batches = list(images.split(batch_size))
    criterion, scope = _TimedPX(), _TimedGlobal()
    whole = seconds(
        lambda: px.prune(model, batches, criterion, sparsity=0.9, rounds=measured, scope=scope, progress=False), device
    )
    masks = {name: mask.to(images.device) for name, mask in random_masks(model, 0.8).tensors.items()}
    parameters = dict(model.named_parameters())

    def mask_all() -> None:
        for name, kept in masks.items():
            zeroed(parameters[name].detach(), kept, kept.to(parameters[name].dtype))

    masking = statistics.median(seconds(mask_all, device) for _ in range(3)) * (rounds - 1)
    first, *later = criterion.spent
    total = {
        "scoring": first + (rounds - 1) * statistics.mean(later) - masking,
        "masking": masking,
        "selection": rounds * statistics.mean(scope.spent),
        "overhead": rounds * (whole - sum(criterion.spent) - sum(scope.spent)) / measured,
    }
    return {
        "images": len(images),
        "rounds": rounds,
        "rounds measured": measured,
        "seconds, extrapolated": sum(total.values()),
        "share": {name: value / sum(total.values()) for name, value in total.items()},
    }


def keeping_masks(model: nn.Module, images: Tensor, sparsity: float, repeats: int) -> dict[str, Any]:
    """What `px.keep_masks` adds to a training step with AdamW: with it and without it in turn."""
    device = images.device.type
    labels = torch.arange(len(images), device=images.device) % 10
    model = model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    masks = random_masks(model, sparsity)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(images).logits.float(), labels).backward()
        optimizer.step()

    step()  # makes the optimizer's state
    found: list[float] = []
    own: list[float] = []
    before = seconds(step, device)
    for _ in range(repeats):
        with px.keep_masks(optimizer, model, masks) as keeper, _timed(keeper, device) as spent:
            took = seconds(step, device)
        after = seconds(step, device)
        found.append(2 * took / (before + after) - 1)
        own.append(2 * sum(spent) / (before + after))
        before = after
    return {
        "batch size": len(images),
        "dense step, s": before,
        "added, end to end": statistics.median(found),
        "added, spread": [min(found), max(found)],
        "added, time inside the hooks": statistics.median(own),
    }


@contextmanager
def _timed(keeper: Any, device: str) -> Iterator[list[float]]:
    """The seconds that the hooks of a `MaskKeeper` spend, as they are spent."""
    spent: list[float] = []
    zero = keeper._zero

    def timed(*args: Any) -> None:
        spent.append(seconds(lambda: zero(*args), device))

    keeper._zero = timed
    yield spent
    del keeper._zero


def share_of_a_process(model: nn.Module, images: Tensor, batch_size: int, masks: px.Masks) -> dict[str, Any]:
    """One round of Eq. 9 on this process among those launched: seconds, and how many numbers it sent."""
    sent = 0
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    px.distributed.processes()  # connects
    batches = list(images.split(batch_size))
    infer(model, images[:1])
    dist.all_reduce = counting
    try:
        start, wall = time.process_time(), time.perf_counter()
        px.PX().score(model, batches, masks=masks.tensors)
        return {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall, "sent": sent}
    finally:
        dist.all_reduce = all_reduce
