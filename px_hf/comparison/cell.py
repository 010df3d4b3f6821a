"""One cell of the comparison: prune, look, fine-tune, look again."""

from __future__ import annotations

import functools
import json
import re
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import get_cosine_schedule_with_warmup, set_seed

import px_hf as px

from ..controls import CONTROLS, apply_control_
from ..scopes import as_scope
from .prepared import Pixels, Task, load, set_head_

DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """`name:key=value:...`: a criterion of `px.CRITERIA` with settings of its own and of its pruning.

    Keys are the fields of the criterion (`px-active:power=0.5`) and `rounds`, `scope`, `min_layer_density`,
    `control`.
    """

    criterion: px.Criterion
    rounds: int
    scope: str
    min_layer_density: float = 0.0
    control: str = "none"

    @classmethod
    def parse(cls, text: str, rounds: int) -> Method:
        """**Raises** `InvalidArgumentError` for an unknown name, key or value."""
        name, *settings = re.split(
            r":(?!\d|uniform)", text
        )  # the colons of scope=2:4 and scope=structured:uniform divide nothing
        if name not in px.CRITERIA:
            raise px.InvalidArgumentError(
                f"Method {text!r}: no criterion {name!r}; there are {', '.join(px.CRITERIA)}."
            )
        criterion = px.CRITERIA[name]
        own = {f.name for f in fields(criterion)}  # type: ignore[arg-type]
        found: dict[str, Any] = {"rounds": rounds, "scope": criterion.scope}
        for setting in settings:
            key, equals, value = setting.partition("=")
            if key not in own | {f.name for f in fields(cls)} - {"criterion"} or not equals:
                raise px.InvalidArgumentError(
                    f"Method {text!r}: {setting!r} is no setting of it; expected key=value with a key of "
                    f"{', '.join([*sorted(own), 'rounds', 'scope', 'min_layer_density', 'control'])}."
                )
            if key in own:
                criterion = replace(criterion, **{key: _value(value)})  # type: ignore[type-var]
            else:
                found[key] = _value(value)
        method = cls(criterion, **found)
        method._check(text)
        return method

    def _check(self, text: str) -> None:
        try:
            as_scope(self.scope)
        except px.InvalidArgumentError as error:
            raise px.InvalidArgumentError(f"Method {text!r}: {error}") from error
        if self.control not in CONTROLS:
            raise px.InvalidArgumentError(f"Method {text!r}: expected a control of {', '.join(CONTROLS)}.")
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise px.InvalidArgumentError(f"Method {text!r}: rounds must be a whole number ≥ 1.")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@dataclass(frozen=True)
class Budget:
    """What is the same for all cells; every field changes results, so it is part of a cell's key."""

    max_train_samples: int | None
    max_eval_samples: int | None
    train_val_split: float
    report_on: str
    head: str
    examples_per_class: int
    scoring_batch_size: int
    rounds: int
    recalibrate_batchnorm: bool
    num_train_epochs: float
    batch_size: int
    optimizer: str
    learning_rate: float
    weight_decay: float
    random_shift: bool
    horizontal_flip: bool
    bf16: bool


@dataclass(frozen=True)
class Cell:
    """One method at one sparsity and seed on one task, whose prepared data lie in `folder`."""

    model: str
    dataset: str
    method: str
    sparsity: float
    seed: int
    budget: Budget
    folder: str = ""

    def key(self) -> dict[str, Any]:
        """What identifies the cell, wherever it is computed."""
        own = {name: getattr(self, name) for name in ("model", "dataset", "method", "sparsity", "seed")}
        return own | vars(self.budget)


@functools.lru_cache(maxsize=2)
def _task(folder: str) -> Task:
    return load(Path(folder))


def run_cell(cell: Cell) -> dict[str, Any]:
    """The line of the cell: its key, accuracies in [0, 1], cost, seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget, task = cell.budget, _task(cell.folder)
    report = task.test if budget.report_on == "test" else task.validation
    model = task.dense_model(cell.seed, budget.head, device)
    result: dict[str, Any] = {"key": cell.key()}
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    masks = None
    if cell.method != DENSE:
        method = Method.parse(cell.method, budget.rounds)
        batches = task.calibration(budget.examples_per_class, cell.seed, budget.scoring_batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # empty layers are counted below
            masks = px.prune(
                model, batches, method.criterion, sparsity=cell.sparsity, rounds=method.rounds, scope=method.scope,
                min_layer_density=method.min_layer_density, progress=False,
            )  # fmt: skip
            masks = apply_control_(method.control, model, masks, cell.seed)
            masks.apply_(model)
            seconds["prune"] = round(time.perf_counter() - start, 2)
            result["forward_units"] = forward_units(model, batches, method)
        if budget.recalibrate_batchnorm:
            recalibrate_(model, batches)
        result["masks"] = masks.fingerprint()
        result["empty_layers"] = sum(not bool(mask.any()) for mask in masks.values())
    result["zero_shot"] = zero_shot(task, model, report, budget.bf16)
    start = time.perf_counter()
    if budget.num_train_epochs > 0:
        fine_tune(model, masks, task.train, budget, cell.seed)
        result["fine_tuned"] = accuracy(model, report, budget.bf16)
        if masks is not None and masks.revived(model):
            raise px.TargetError(f"pruned weights came back: {masks.revived(model)}")
    seconds["fine_tune"] = round(time.perf_counter() - start, 2)
    return result | {"seconds": seconds}


def forward_units(model: nn.Module, batches: list[dict[str, Tensor]], method: Method) -> float:
    """Cost of all scoring rounds: their multiplications, over those of a forward pass of one image."""
    rounds = method.rounds if method.criterion.iterative else 1
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


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: list[dict[str, Tensor]]) -> None:
    """BatchNorm statistics of the pruned network: the mean of those of the calibration batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's cumulative average
        norm.train()
    device = next(model.parameters()).device
    for batch in batches:
        model(pixel_values=batch["pixel_values"].to(device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


def zero_shot(task: Task, model: nn.Module, report: Pixels, bf16: bool = False) -> float | None:
    """Accuracy of the pruned backbone with the head that was fitted to the dense one; None if there is none."""
    if not task.head.exists():
        return None
    held = {name: value.clone() for name, value in model.state_dict().items()}
    set_head_(model, task.head)
    found = accuracy(model, report, bf16)
    model.load_state_dict(held)
    return found


@torch.no_grad()
def accuracy(model: nn.Module, data: Pixels, bf16: bool = False, batch_size: int = 250) -> float:
    """The share of `data` that the model classifies as labelled, under bfloat16 autocast if asked for."""
    model.eval()
    device = next(model.parameters()).device
    right = 0
    for start in range(0, len(data), batch_size):
        images, labels = data.batch(slice(start, start + batch_size), device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = model(pixel_values=images).logits
        right += int((logits.argmax(1) == labels).sum())
    return right / len(data)


def fine_tune(model: nn.Module, masks: px.Masks | None, data: Pixels, budget: Budget, seed: int) -> None:
    """A plain loop: the order of the data, the shifts and flips depend on `seed` alone, not on the method."""
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
    keeper = None if masks is None else px.keep_masks(optimizer, model, masks)
    order = np.empty(0, dtype=np.int64)
    for step in range(steps):
        if step % per_epoch == 0:
            order = rng.permutation(len(data))
        place = step % per_epoch * size
        images, labels = data.batch(np.sort(order[place : place + size]), device)
        images = vary(images, rng, budget)
        with torch.autocast(device.type, torch.bfloat16, enabled=budget.bf16):
            logits = model(pixel_values=images).logits
        loss = F.cross_entropy(logits.float(), labels)
        if not bool(torch.isfinite(loss)):
            raise px.NonFiniteError(f"the loss of step {step} is not finite: lower --learning_rate.")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if keeper is not None:
        keeper.remove()


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
