"""One cell of the comparison: prune, look, fine-tune, look again."""

from __future__ import annotations

import functools
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import px_hf as px

from ..controls import apply_control_
from .budget import Budget
from .measures import accuracy, forward_units, zero_shot
from .method import DENSE, Method
from .prepared_task import PreparedTask, load
from .recalibrate import recalibrate_
from .training import fine_tune


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
    """The line of the cell: its key, accuracies in [0, 1], cost, seconds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    budget, task = cell.budget, _task(cell.folder)
    report = task.test if budget.report_on == "test" else task.validation
    model = task.dense_model(cell.seed, budget.head, device)
    result: dict[str, Any] = {"key": cell.key()}
    seconds: dict[str, float] = {}
    masks = None
    if cell.method is not None:
        batches = task.calibration(budget.examples_per_class, cell.seed, budget.scoring_batch_size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # empty layers are counted below
            start = time.perf_counter()
            masks = prune_(model, batches, cell.method, cell.sparsity, cell.seed)
            seconds["prune"] = round(time.perf_counter() - start, 2)
            result["forward_units"] = forward_units(model, batches, cell.method)
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


def prune_(model: nn.Module, batches: list[dict[str, Tensor]], method: Method, sparsity: float, seed: int) -> px.Masks:
    """Prunes the model before it is fine-tuned, and returns the masks."""
    masks = px.prune(
        model, batches, method.criterion, sparsity=sparsity, rounds=method.rounds, scope=method.scope,
        min_layer_density=method.min_layer_density, progress=False,
    )  # fmt: skip
    masks = apply_control_(method.control, model, masks, seed)
    masks.apply_(model)
    return masks
