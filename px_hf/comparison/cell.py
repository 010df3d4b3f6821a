"""One cell of the comparison: prune, look, fine-tune, look again."""

from __future__ import annotations

import functools
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import px_hf as px

from ..controls import apply_control_
from ..gradual import GradualPruner
from ..repair.by_name import REPAIRS
from .budget import Budget
from .measures import accuracy, forward_units, zero_shot
from .method import DENSE, Method
from .prepared_task import PreparedTask, load
from .training import Zeros, fine_tune


@dataclass(frozen=True)
class Cell:
    """One method (None: the dense network) at one sparsity and seed on one task, whose prepared data lie in `folder`.

    A method holds its criterion, so that a worker process needs no table of names.
    """

    model: str
    dataset: str
    method: Method | None
    sparsity: float
    seed: int
    budget: Budget
    folder: str = ""

    def key(self) -> dict[str, Any]:
        """What identifies the cell, wherever it is computed."""
        own = {name: getattr(self, name) for name in ("model", "dataset", "sparsity", "seed")}
        return {**own, "method": self.method.text if self.method else DENSE, **vars(self.budget)}

    def __str__(self) -> str:
        return f"{self.method.text if self.method else DENSE} at {self.sparsity:g}, seed {self.seed}"


@functools.lru_cache(maxsize=2)
def _task(folder: str) -> PreparedTask:
    return load(Path(folder))


def run_cell(cell: Cell) -> dict[str, Any]:
    """The line of the cell: its key, accuracies in [0, 1] on both splits, cost, seconds.

    A method that prunes gradually has no accuracy before fine-tuning, and its scoring is a part of the fine-tuning's
    seconds.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget, task, method = cell.budget, _task(cell.folder), cell.method
    splits = {"validation": task.validation, "test": task.test}
    model = task.dense_model(cell.seed, budget.head, device)
    result: dict[str, Any] = {"key": cell.key(), "zero_shot": None}
    seconds: dict[str, float] = {}
    masks: px.Masks | None = None
    batches = task.calibration(budget.examples_per_class, cell.seed, budget.scoring_batch_size) if method else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # empty layers are counted below
        if method is not None and not method.gradual:
            start = time.perf_counter()
            masks = prune_(model, batches, method, cell.sparsity, cell.seed)
            seconds["prune"] = round(time.perf_counter() - start, 2)
            if budget.recalibrate_batchnorm:
                px.recalibrate_batchnorm_(model, batches)
        if method is not None:
            result["forward_units"] = forward_units(model, batches, method)
        if method is None or not method.gradual:
            result["zero_shot"] = zero_shot(task, model, splits, budget.bf16)
        start = time.perf_counter()
        if budget.num_train_epochs > 0:
            kept = fine_tune(model, _zeros(cell, model, batches, masks), task.train, budget, cell.seed)
            masks = kept.masks if isinstance(kept, GradualPruner) else masks
            result["fine_tuned"] = {name: accuracy(model, data, budget.bf16) for name, data in splits.items()}
        seconds["fine_tune"] = round(time.perf_counter() - start, 2)
    if masks is not None:
        if masks.revived(model):
            raise px.TargetError(f"pruned weights came back: {masks.revived(model)}")
        result["masks"] = masks.fingerprint()
        result["empty_layers"] = sum(not bool(mask.any()) for mask in masks.values())
    return result | {"seconds": seconds}


def _zeros(cell: Cell, model: nn.Module, batches: list[dict[str, Tensor]], masks: px.Masks | None) -> Zeros:
    """What the method of a cell does while the model is fine-tuned."""
    method = cell.method
    if method is not None and method.gradual:
        return lambda optimizer, steps: px.gradual_pruning(
            optimizer, model, batches, method.criterion, sparsity=cell.sparsity, total_steps=steps,
            rounds=method.rounds, until=method.until, scope=method.scope, min_layer_density=method.min_layer_density,
        )  # fmt: skip
    if masks is not None:
        return lambda optimizer, steps: px.keep_masks(optimizer, model, masks)
    return lambda optimizer, steps: nullcontext()


def prune_(model: nn.Module, batches: list[dict[str, Tensor]], method: Method, sparsity: float, seed: int) -> px.Masks:
    """Prunes the model before it is fine-tuned, and returns the masks."""
    masks = px.prune(
        model, batches, method.criterion, sparsity=sparsity, rounds=method.rounds, scope=method.scope,
        min_layer_density=method.min_layer_density, progress=False,
    )  # fmt: skip
    masks = apply_control_(method.control, model, masks, seed)
    if repair := REPAIRS.get(method.repair):
        repair(model, masks, batches, False)
    masks.apply_(model)
    return masks
