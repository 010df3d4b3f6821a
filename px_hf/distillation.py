"""Distillation: a sparse student that learns from a dense teacher, its logits and, if wanted, its hidden states.

    L = (1 - α) L_task + α τ² KL( softmax(z_t / τ) ‖ softmax(z_s / τ) ) + β Σ_l MSE(h_s^l, h_t^l) / MSE(h_t^l, 0)

| symbol | variable | meaning |
|---|---|---|
| z_s, z_t | `student.logits`, `teacher.logits` | logits of student and teacher, [N, K] or [N, K, ...] |
| h^l | `hidden_states[l]` | what layer l gives, [N, ...] |
| τ | `temperature` | > 0; τ² keeps the gradient's size as it was at 1 |
| α, β | `alpha`, `beta` | weights of logits, in [0, 1], and of hidden states, ≥ 0 |

The logits are those of Hinton et al. (2015, arXiv 1503.02531), the hidden states those of SquareHead (Kurtic et al.,
2023, arXiv 2310.06927). Chosen here: both are means over images (for dense predictions over places), with each image's
own MSE(h_t, 0) instead of the batch's, so that a batch can be split over accumulation steps and processes without
changing the loss. Layers count from the first after the embedding.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import InvalidArgumentError, TargetError
from .model.modes import evaluating


@dataclass(frozen=True, eq=False)
class Distillation:
    """What to learn from a teacher, and how much of it.

    ```python
    distillation = px.Distillation(teacher, alpha=0.5, temperature=2.0)
    trainer = px.DistillationTrainer(model, args, ..., distillation=distillation)      # with Trainer

    outputs = model(**batch)                                                           # in any other loop
    loss = distillation.loss(outputs.loss, outputs, batch)
    ```

    The teacher runs in eval mode and without gradients and is not changed.

    Args:
        teacher: any module whose output is a tensor [N, K, ...] or has ``.logits``, of the student's classes in their
            order; with ``beta`` > 0 its output must have ``.hidden_states`` of the student's shapes. For example the
            dense network, fine-tuned on the task.
        alpha: α, the weight of the teacher's logits, in [0, 1]; the task's own loss has 1 - α.
        temperature: τ > 0.
        beta: β ≥ 0, the weight of the hidden states. The student must then be called with
            ``output_hidden_states=True``, which `DistillationTrainer` does.
        layers: l, places in ``hidden_states``; default: all but the first, which is the embedding.

    Raises:
        InvalidArgumentError: a setting outside its range.
    """

    teacher: nn.Module
    alpha: float = 0.5
    temperature: float = 2.0
    beta: float = 0.0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.teacher, nn.Module):
            raise InvalidArgumentError(
                f"Distillation(teacher={self.teacher!r}): expected a torch.nn.Module, such as the fine-tuned dense "
                "network: AutoModelForImageClassification.from_pretrained(...)."
            )
        if not 0 <= self.alpha <= 1:
            raise InvalidArgumentError(f"Distillation(alpha={self.alpha!r}): expected a weight in [0, 1].")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise InvalidArgumentError(f"Distillation(temperature={self.temperature!r}): expected a number > 0.")
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise InvalidArgumentError(f"Distillation(beta={self.beta!r}): expected a weight ≥ 0.")

    def loss(self, task_loss: Tensor, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """L, a scalar, of the student's own loss and outputs for a batch of ``inputs``.

        Args:
            task_loss: L_task, a mean over the batch.
            outputs: what the student returned.
            inputs: what it was given, by keyword; the teacher gets the same without ``labels``.

        Raises:
            TargetError: the teacher has other classes or hidden states than the student, or one of them none.
        """
        return (1 - self.alpha) * task_loss + self.lesson(outputs, inputs)

    def lesson(self, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
        """L without (1 - α) L_task, a mean over the batch; arguments and errors are those of `loss`.

        For a task's loss that is no mean, such as a sum that was divided by the examples of several batches.
        """
        taught = self._taught(inputs)
        loss = _logits(outputs).new_zeros((), dtype=torch.float32)
        if self.alpha:
            loss = loss + self.alpha * logits_loss(_logits(outputs), _logits(taught), self.temperature)
        if self.beta:
            loss = loss + self.beta * hidden_loss(_hidden(outputs, "student"), _hidden(taught, "teacher"), self.layers)
        return loss

    def _taught(self, inputs: Mapping[str, Any]) -> Any:
        given = {name: value for name, value in inputs.items() if name != "labels"}
        if self.beta:
            given["output_hidden_states"] = True
        named = inspect.signature(self.teacher.forward).parameters
        with evaluating(self.teacher), torch.no_grad():  # in this order: the first leaves inference mode
            if "pixel_values" in given and "pixel_values" not in named:  # a plain module, which takes images
                return self.teacher(given["pixel_values"])
            return self.teacher(**given)


def logits_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``τ² KL(softmax(z_t / τ) ‖ softmax(z_s / τ))`` of logits [N, K, ...], the mean over all but K, in float32.

    Raises:
        TargetError: shapes differ.
    """
    if student.shape != teacher.shape:
        raise TargetError(
            f"the teacher's logits are {list(teacher.shape)} and the student's {list(student.shape)}: it has other "
            "classes, or another resolution. Distil from a teacher that was fine-tuned on the student's task."
        )
    log_s, log_t = (F.log_softmax(z.float().movedim(1, -1) / temperature, dim=-1) for z in (student, teacher))
    return temperature**2 * (log_t.exp() * (log_t - log_s)).sum(-1).mean()


def hidden_loss(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], layers: tuple[int, ...] | None = None
) -> Tensor:
    """``Σ_l MSE(h_s^l, h_t^l) / MSE(h_t^l, 0)``, the mean over images, in float32.

    Raises:
        TargetError: shapes differ, or there is no such layer.
    """
    shapes = [[list(h.shape) for h in states] for states in (student, teacher)]
    places = range(1, len(student)) if layers is None else layers
    if shapes[0] != shapes[1] or not all(-len(student) <= place < len(student) for place in places):
        raise TargetError(
            f"hidden states do not match: the student has {len(student)} of shapes {shapes[0]}, the teacher "
            f"{len(teacher)} of {shapes[1]}, layers={layers}. Use a teacher of the student's architecture, or beta=0."
        )
    total = student[0].new_zeros((), dtype=torch.float32)
    for place in places:
        s, t = (states[place].float().flatten(1) for states in (student, teacher))
        size = t.square().mean(1).clamp(min=torch.finfo(torch.float32).tiny)
        total = total + ((s - t).square().mean(1) / size).mean()
    return total


def _logits(outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise TargetError(
            f"distillation needs logits [N, K], got {type(outputs).__name__}. Expected a tensor or an output with "
            ".logits, from student and teacher."
        )
    return logits


def _hidden(outputs: Any, who: str) -> tuple[Tensor, ...]:
    states = getattr(outputs, "hidden_states", None)
    if not states:
        raise TargetError(
            f"beta > 0 needs hidden states, and the {who} returned none ({type(outputs).__name__}). Call the model "
            "with output_hidden_states=True, or distil from logits alone: beta=0."
        )
    return tuple(states)
