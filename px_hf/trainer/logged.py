"""What the callbacks add to what Trainer logs of the training, and so to its trackers: a few numbers of the masks."""

from __future__ import annotations

from statistics import median

from transformers import TrainerState

from ..masks import Masks


def sparsity_logs(masks: Masks) -> dict[str, float]:
    """Sparsity of all masked weights; the least, the median and the greatest density of a layer. All in [0, 1]."""
    densities = masks.densities().values()
    return {
        "sparsity": masks.sparsity,
        "layer_density_min": min(densities),
        "layer_density_median": median(densities),
        "layer_density_max": max(densities),
    }


def add_to_logs(found: dict[str, float], logs: dict[str, float] | None, state: TrainerState) -> None:
    """Add them to what Trainer has logged of the training just now; nothing to other logs, as of evaluations.

    Callbacks are told of a log in their order: trackers that come before this one do not see what is added.
    """
    if logs is None or "loss" not in logs:
        return
    logs |= found
    if state.log_history:  # of which Trainer has made a copy before
        state.log_history[-1] |= found
