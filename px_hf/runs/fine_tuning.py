"""Fine-tuning in the recipes: transformers' Trainer with exact losses and offline metrics."""

from __future__ import annotations

from typing import Any

import evaluate
import torch
import torch.nn.functional as F
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerCallback

from ..data import Split
from ..metrics import metric_path
from .arguments import FineTuneArguments


def make_trainer(
    model: PreTrainedModel,
    data: dict[str, Split],
    training: FineTuneArguments,
    processor: BaseImageProcessor | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> Trainer:
    """A Trainer with exact losses over accumulated batches and processes, and accuracy without the network."""
    accuracy = evaluate.load(metric_path("accuracy"), keep_in_memory=True)

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
        # Trainer counts the examples of a whole step, and trusts models to divide by that; not all do.
        smoothing = training.label_smoothing_factor
        total = F.cross_entropy(outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return total / num_items_in_batch

    return Trainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_loss_func=loss,
        compute_metrics=lambda p: accuracy.compute(predictions=p.predictions.argmax(-1), references=p.label_ids),
        processing_class=processor,
        callbacks=callbacks,
    )
