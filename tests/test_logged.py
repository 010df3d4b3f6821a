"""What trackers are told of the masks: a few numbers, by the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from networks import build, images
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import px_hf as px
from px_hf.runs.schedules import _put_first

ROWS = [{"pixel_values": image, "labels": torch.tensor(k % 4)} for k, image in enumerate(images(8))]
BATCHES = [(images(4), torch.tensor([0, 1, 2, 3]))]


class Tracker(TrainerCallback):
    """As those of `report_to`, which Trainer tells of a log before it tells the callbacks that it was given."""

    def __init__(self) -> None:
        self.told: list[dict[str, float]] = []

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self.told.append(dict(logs or {}))


def trained(callback: TrainerCallback, out: Path, model: Any) -> tuple[list[dict[str, float]], Trainer]:
    args = TrainingArguments(
        str(out), max_steps=4, logging_steps=1, eval_strategy="steps", eval_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    tracker = Tracker()
    trainer = Trainer(model, args, train_dataset=ROWS, eval_dataset=ROWS, callbacks=[tracker, callback])
    _put_first(trainer, callback)
    trainer.train()
    return tracker.told, trainer


def test_masks_that_are_kept(tmp_path: Path) -> None:
    model = build("hf vit")
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.7, progress=False)
    told, trainer = trained(px.KeepMasks(masks), tmp_path, model)
    of_training = [logs for logs in told if "loss" in logs]
    assert len(of_training) == 4
    densities = sorted(float(mask.float().mean()) for mask in masks.values())
    middle = len(densities) // 2
    median = densities[middle] if len(densities) % 2 else (densities[middle - 1] + densities[middle]) / 2
    for logs in [*of_training, *(logs for logs in trainer.state.log_history if "loss" in logs)]:
        assert logs["sparsity"] == masks.sparsity
        assert logs["layer_density_min"] == pytest.approx(densities[0])
        assert logs["layer_density_median"] == pytest.approx(median)
        assert logs["layer_density_max"] == pytest.approx(densities[-1])
    others = [logs for logs in told if "loss" not in logs]
    assert others
    assert not any("sparsity" in logs for logs in others)


def test_rounds(tmp_path: Path) -> None:
    pruning = px.GradualPruning(px.Magnitude(), BATCHES, sparsity=0.8, rounds=3, until=0.5)
    told, _ = trained(pruning, tmp_path, build("hf vit"))
    of_training = [logs for logs in told if "loss" in logs]
    assert [logs["pruning_round"] for logs in of_training] == [2, 3, 3, 3]
    sparsities = [logs["sparsity"] for logs in of_training]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == pruning.masks.sparsity == pytest.approx(0.8, abs=1e-3)
    assert all(logs["layer_density_min"] <= logs["layer_density_max"] for logs in of_training)
