"""transformers' Trainer for classifiers: exact losses over accumulated batches and processes, offline metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import evaluate
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import BaseImageProcessor, EvalPrediction, Trainer, TrainerCallback

import px_hf as px

from ..data import Split
from ..metrics import metric_path
from .arguments import FineTuneArguments
from .protocols import SGD


def make_trainer(
    model: nn.Module,
    data: dict[str, Split],
    training: FineTuneArguments,
    processor: BaseImageProcessor | None = None,
    callbacks: list[TrainerCallback] | None = None,
    distillation: px.Distillation | None = None,
    sgd: SGD | None = None,
) -> Trainer:
    """A Trainer on the splits train and validation of `data`, which reports accuracy without the network.

    With `sgd` it trains by that, whatever `training` says of optimizer and schedule.

    Raises:
        TargetError: the teacher of `distillation` has other classes.
    """
    accuracy = evaluate.load(metric_path("accuracy"), keep_in_memory=True)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        # Trainer counts the examples of a whole step, and trusts models to divide by that; not all do.
        smoothing = training.label_smoothing_factor
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return total / num_items_in_batch

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        predicted = logits_of(prediction.predictions).argmax(-1)
        return accuracy.compute(predictions=predicted, references=prediction.label_ids)

    made: Any = Trainer
    if distillation is not None:
        made = partial(px.DistillationTrainer, distillation=distillation)
    elif sgd is not None:
        optimizer = (torch.optim.SGD, {"lr": training.learning_rate, "momentum": sgd.momentum})
        made = partial(_Stepped, drops=sgd.drops, optimizer_cls_and_kwargs=optimizer)
    return made(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_loss_func=loss,
        compute_metrics=metrics,
        processing_class=processor,
        callbacks=callbacks,
    )


class _Stepped(Trainer):
    """The learning rate becomes a tenth after each of these shares of the steps."""

    def __init__(self, *args: Any, drops: Sequence[float], **more: Any) -> None:
        super().__init__(*args, **more)
        self.drops = drops

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        places = [round(drop * num_training_steps) for drop in self.drops]
        self.lr_scheduler = LambdaLR(optimizer, lambda step: 0.1 ** sum(step >= place for place in places))
        return self.lr_scheduler


def logits_of(predictions: Any) -> np.ndarray:
    """[N, K], of what Trainer predicts: the first of several outputs."""
    return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)
