"""transformers' Trainer for semantic segmentation: the loss over pixels that count, and exact confusion counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import EvalPrediction, Trainer, TrainerCallback

from ..data.segmentation import SegmentationTask
from ..metrics.mean_iou.mean_iou import from_confusion
from .arguments import FineTuneArguments


@dataclass
class ConfusionCounts:
    """`compute_metrics` of a Trainer that gives it batch by batch the counts [N, K, K] of N images.

    `last` is those of all images, once Trainer has evaluated a split.
    """

    last: np.ndarray | None = None
    _collected: list[np.ndarray] = field(default_factory=list)

    def __call__(self, prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        self._collected.extend(np.asarray(prediction.predictions))
        if not compute_result:
            return {}
        self.last = np.stack(self._collected)
        self._collected.clear()
        found = from_confusion(self.last.sum(0))
        return {"mean_iou": found["mean_iou"], "overall_accuracy": found["overall_accuracy"]}


def make_trainer(
    model: nn.Module,
    task: SegmentationTask,
    training: FineTuneArguments,
    counts: ConfusionCounts,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """A Trainer that hands `counts` what it evaluates; `training` is to have `batch_eval_metrics`."""
    classes = len(task.labels)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        logits = resized(outputs.logits.float(), labels)
        return F.cross_entropy(logits, labels, reduction="sum") / num_items_in_batch  # pixels that count

    def confusions(logits: Any, labels: torch.Tensor) -> torch.Tensor:
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted = resized(logits, labels).argmax(1)
        pairs = torch.where(labels < 0, classes * classes, labels * classes + predicted).flatten(1)
        found = [torch.bincount(p, minlength=classes**2 + 1)[:-1] for p in pairs]
        return torch.stack(found).view(-1, classes, classes)

    return Trainer(
        model,
        training,
        train_dataset=task.train,
        eval_dataset=task.validation,
        compute_loss_func=loss,
        compute_metrics=counts,
        preprocess_logits_for_metrics=confusions,
        callbacks=callbacks,
    )


def resized(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`[N, K, h, w]` at the size of `labels` `[N, H, W]`."""
    return F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
