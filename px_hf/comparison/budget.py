"""What is the same for all methods that are compared."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """What is the same for all cells; every field changes results, so it is part of a cell's key."""

    max_train_samples: int | None
    max_eval_samples: int | None
    train_val_split: float
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
