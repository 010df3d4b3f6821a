"""Distillation with transformers' Trainer: the loss of `px_hf.distillation` in place of the model's own.

    trainer = DistillationTrainer(model, args, ..., distillation=Distillation(teacher))

Trainer adds up the losses of micro-batches and averages gradients over processes. Where it knows how many labels all
of them have together, M, and a micro-batch has m of them, a mean over the micro-batch counts m/M, times the number of
processes if M is a sum over these, since averaging divides by it. Else Trainer divides by the accumulation steps.

A `compute_loss_func` of the task is told M, as by Trainer, and is to divide by it: its loss counts as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..distillation import Distillation
from ..errors import InvalidArgumentError, TargetError
from ..model.wrappers import unwrap


class DistillationTrainer(Trainer):
    """transformers' Trainer, which trains with a teacher.

    ```python
    teacher = AutoModelForImageClassification.from_pretrained("dense")
    trainer = px.DistillationTrainer(
        model, args, train_dataset=..., distillation=px.Distillation(teacher, alpha=0.5), callbacks=[pruning]
    )
    ```

    All arguments but `distillation` are Trainer's. The teacher is moved to the device of the training. The loss is the
    same however a batch is split into accumulation steps and processes. Evaluation reports the task's loss alone, as
    without a teacher, and does not run it.

    Raises:
        InvalidArgumentError: `distillation` is not a `Distillation`, or the teacher is the model itself.
        TargetError: the configs of teacher and model name other classes; at the first step, what `Distillation.loss`
            raises.
    """

    def __init__(self, *args: Any, distillation: Distillation, **kwargs: Any) -> None:
        if not isinstance(distillation, Distillation):
            raise InvalidArgumentError(
                f"distillation is a {type(distillation).__name__}; expected px.Distillation(teacher)."
            )
        super().__init__(*args, **kwargs)
        assert self.model is not None
        require_same_classes(unwrap(self.model), unwrap(distillation.teacher))
        self.distillation = distillation
        distillation.teacher.to(self.args.device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `Trainer.compute_loss`; while the model trains, the loss of `px_hf.distillation`."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        share = self._share(inputs, num_items_in_batch)
        given = dict(inputs)
        if self.distillation.beta:
            given["output_hidden_states"] = True
        # Without the number of items every model's loss is a mean over the micro-batch; a function wants it.
        scaled = self.compute_loss_func is not None
        items = num_items_in_batch if scaled else None
        task, outputs = super().compute_loss(model, given, return_outputs=True, num_items_in_batch=items)
        with self.accelerator.autocast():  # which Accelerate turns on inside the model alone
            lesson = self.distillation.lesson(outputs, inputs)
        loss = (1 - self.distillation.alpha) * (task if scaled else task * share) + lesson * share
        return (loss, outputs) if return_outputs else loss

    def _share(self, inputs: dict[str, Any], items: Tensor | int | None) -> Tensor | float:
        """What a mean over this micro-batch counts in the loss that Trainer adds up."""
        if items is None:  # Trainer divides by the accumulation steps, unless there is a function to do so
            return 1.0 if self.compute_loss_func is None else 1 / self.current_gradient_accumulation_steps
        items = items.flatten()[0] if isinstance(items, Tensor) else items
        here = inputs["labels"].ne(-100).sum()
        if not self.args.average_tokens_across_devices:
            return here / (items * max(1, self.args.n_gpu))
        return here / items * self.accelerator.num_processes


def require_same_classes(student: nn.Module, teacher: nn.Module) -> None:
    """By the names in their configs, as far as there are any.

    Raises:
        InvalidArgumentError: they are one and the same module.
        TargetError: they have other classes.
    """
    if student is teacher:
        raise InvalidArgumentError(
            "the teacher is the model that trains. Expected another one: load the network a second time, or "
            "copy.deepcopy(model) before it is pruned."
        )
    mine, theirs = (getattr(getattr(model, "config", None), "id2label", None) for model in (student, teacher))
    if not mine or not theirs:
        return
    named = not any(str(name).startswith("LABEL_") for name in [*mine.values(), *theirs.values()])
    if len(mine) != len(theirs) or (named and mine != theirs):
        raise TargetError(
            f"the teacher has other classes than the model: {len(theirs)} ({_shown(theirs)}) and {len(mine)} "
            f"({_shown(mine)}). Distil from a teacher that was fine-tuned on the same task, its classes in the same "
            "order."
        )


def _shown(names: dict[int, str]) -> str:
    return ", ".join(map(str, list(names.values())[:3])) + (", ..." if len(names) > 3 else "")
