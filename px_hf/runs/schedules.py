"""When the network of a run is pruned: before it is fine-tuned, or in rounds while it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import px_hf as px

from ..plan import round_steps
from ..repair.by_name import REPAIRS
from .job import Job, MaskSource, Say
from .pruning_run import PruningRun


class Pruning(ABC):
    """The pruning of one network; settings and folder have been checked when the object is there.

    Attributes:
        model: what is trained.
        callbacks: what Trainer needs for it.
        provenance: all that the masks depend on.
        found: after `fine_tune`, the masks of the network as it was loaded.
        masks: likewise those of `model`, which is a smaller one if whole units were taken out.
    """

    model: nn.Module
    callbacks: list[TrainerCallback]
    provenance: dict[str, Any]
    found: px.Masks
    masks: px.Masks

    @abstractmethod
    def fine_tune(self, trainer: Trainer, checkpoint: str | None) -> None:
        """Train `model` with these callbacks, to the end, from a checkpoint on if there is one."""


class BeforeTraining(Pruning):
    """Masks that are found once and kept; units are taken out before training too."""

    def __init__(self, run: PruningRun, job: Job, network: PreTrainedModel, source: MaskSource) -> None:
        units = job.prune_args.takes_out_units
        with run.phase("Prune"):
            self.found = run.masks(source, units)
            run.say(f"{self.found.kept:,} of {self.found.total:,} weights kept")
            if run.checkpoint is None and (repair := REPAIRS.get(job.prune_args.repair)):
                repair(network, self.found, source.batches, not job.training.disable_tqdm)
                run.say(f"repaired without training: {job.prune_args.repair}")
            self.model, self.masks = network, self.found
            if units:
                self.model, self.masks = run.shrink(network, self.found, job.example)
        self.masks.apply_(self.model)
        self.callbacks = [px.KeepMasks(self.masks)]
        self.provenance = source.provenance

    def fine_tune(self, trainer: Trainer, checkpoint: str | None) -> None:
        _put_first(trainer, self.callbacks[0])
        trainer.train(resume_from_checkpoint=checkpoint)


class WhileTraining(Pruning):
    """Masks that `px.GradualPruning` makes while Trainer trains; units are taken out of the trained network.

    Raises:
        InvalidArgumentError: a setting outside its range, or more rounds than training has steps.
    """

    def __init__(self, run: PruningRun, job: Job, network: PreTrainedModel, source: MaskSource) -> None:
        args = job.prune_args
        self._run, self._job = run, job
        self._pruning = args.gradual_pruning(source.batches)
        round_steps(self._pruning.rounds, args.until, job.steps(network))
        run.begin(source)
        self.model = network
        self.callbacks = [self._pruning, RoundsShown(self._pruning, run.say)]
        self.provenance = source.provenance

    def fine_tune(self, trainer: Trainer, checkpoint: str | None) -> None:
        _put_first(trainer, self._pruning)
        trainer.train(resume_from_checkpoint=checkpoint)
        self.found = self.masks = self._pruning.masks
        if not self._pruning.finished:
            self.provenance = {**self.provenance, "ended_early": True}
            self._run.say(f"Training ended before the last round: {100 * self.found.sparsity:.4g} % are pruned.")
        if self._job.prune_args.takes_out_units and self.found.kept < self.found.total:
            self.model, self.masks = self._run.shrink(self.model, self.found, self._job.example)


def _put_first(trainer: Trainer, callback: TrainerCallback) -> None:
    """Before the trackers of `--report_to`, so that these are told its sparsity."""
    trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(callback))


class RoundsShown(TrainerCallback):
    """Says what each round has led to; is to come after the pruning among the callbacks."""

    def __init__(self, pruning: px.GradualPruning, say: Say) -> None:
        self._pruning, self._say, self._shown = pruning, say, 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._shown = self._pruning.rounds_made if state.global_step else 0
        self.on_step_end(args, state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        made = self._pruning.rounds_made
        if made > self._shown:
            sparsity = 100 * self._pruning.masks.sparsity
            with tqdm.external_write_mode():  # above the bar of Trainer
                self._say(
                    f"round {made} of {self._pruning.rounds} at step {state.global_step}: {sparsity:.1f} % sparse"
                )
        self._shown = made
