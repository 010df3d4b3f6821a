"""Prune while transformers' Trainer trains: `px_hf.gradual` as a callback.

    trainer = Trainer(model, ..., callbacks=[GradualPruning(PX(), batches, sparsity=0.9)])

Rounds go by Trainer's own count of steps, `state.global_step` of `state.max_steps`, and are made when a step has
ended, before Trainer evaluates or saves at it: a checkpoint of step n holds what the rounds up to n have pruned.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..criteria import Criterion
from ..errors import CheckpointError, InvalidArgumentError
from ..gradual import GradualPruner, require_own
from ..masks import Masks
from ..masks_file import MASKS_FILE
from ..model.inputs import Batches
from ..model.outputs import Output
from ..model.wrappers import unwrap
from ..plan import ROUNDS, UNTIL, Plan
from ..scopes import Scope
from .checkpoint import checkpoint_folder, save_for_push, save_in_checkpoint
from .logged import add_to_logs, sparsity_logs

CRITERION_FILE = "criterion.safetensors"
"""In a checkpoint between rounds: what a criterion that learns from round to round remembers."""

_RECORD = "px_hf.gradual_pruning"
"""In trainer_state.json, so that a checkpoint is known wherever it lies. Not the name of a callback, or Trainer would
make one out of it."""


class GradualPruning(TrainerCallback):
    """Prunes in rounds during the first part of training by transformers' Trainer, and keeps every zero.

    ```python
    pruning = px.GradualPruning(px.PX(), batches, sparsity=0.9)
    Trainer(model, ..., callbacks=[pruning]).train()
    px.save_pretrained(model, pruning.masks, "out")
    ```

    Schedule, rounds and what training sees of them are those of `px.gradual_pruning`. As with `KeepMasks`, each
    checkpoint holds the masks of its step as `masks.safetensors`, and what Trainer pushes gets the compact copy,
    with the sparsity that was reached by then. What Trainer logs of the training has "sparsity", "pruning_round", and
    "layer_density_min", "layer_density_median", "layer_density_max". Trackers of `report_to` are told of a log
    before callbacks that are given to Trainer. For theirs to have them too, put this one first:
    ``trainer.callback_handler.callbacks.insert(0, trainer.pop_callback(pruning))``, as recipes do.

    Resuming from any checkpoint gives the run that was not interrupted. Settings other than the checkpoint's, masks
    that cannot be found, or weights where they have zeros raise CheckpointError before the first step.

    The best model: before the last round the network is denser than it is to be. So the last round makes Trainer
    forget which evaluation was the best, and `load_best_model_at_end`, `save_strategy="best"` and early stopping
    compare those after it. A training that ends before warns, and `masks` and `finished` say what was reached.

    Args:
        criterion: what to score by, for example ``PX("active")``.
        batches: what to score on, as for `px.prune`: re-iterable, and not what Trainer itself reads.
        sparsity: fraction of the prunable weights that is pruned in the end, in [0, 1).
        rounds: T, between 1 and the number of training steps.
        until: the share of the training steps after which the last round is made, in (0, 1].
        scope, prune_head, min_layer_density, output: as for `px.prune`.

    Raises:
        InvalidArgumentError: a setting outside its range; when training begins, more rounds than steps.
        DataError: ``batches`` belongs to Trainer; when training begins, it is empty, read only once, or malformed.
        CheckpointError: when training resumes, see above.
    """

    def __init__(
        self,
        criterion: Criterion,
        batches: Batches,
        *,
        sparsity: float,
        rounds: int = ROUNDS,
        until: float = UNTIL,
        scope: str | Scope | None = None,
        prune_head: bool = False,
        min_layer_density: float = 0.0,
        output: Output = None,
    ) -> None:
        self._plan = Plan(criterion, sparsity, rounds, until, scope, prune_head, min_layer_density, output)
        require_own(batches)
        self._batches = batches
        self._pruner: GradualPruner | None = None
        self._masks: Masks | None = None
        self._finished = False
        self._made = 0
        self._logged: dict[str, float] = {}

    @property
    def masks(self) -> Masks:
        """What the rounds so far have left; they have the sparsity that was asked for once `finished`.

        Raises:
            InvalidArgumentError: training has not begun.
        """
        if self._masks is None:
            raise InvalidArgumentError(
                "GradualPruning has no masks yet: its first round is made when training begins. Call trainer.train()."
            )
        return self._masks

    @property
    def finished(self) -> bool:
        """Whether the last round has been made."""
        return self._finished

    @property
    def rounds_made(self) -> int:
        """How many rounds have been made, those before a resumed checkpoint included."""
        return self._made

    @property
    def rounds(self) -> int:
        """T, how many rounds there are to be."""
        return self._plan.rounds

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        require_own(self._batches, kwargs.get("train_dataloader"))
        if self._pruner is not None:  # of a training that raised
            self._pruner.release()
        model = kwargs["model"]
        saved = self._saved(args, state, model) if state.global_step > 0 else None
        self._masks, self._finished, self._made = None, False, 0
        self._pruner = GradualPruner(
            kwargs["optimizer"], model, self._batches, self._plan, state.max_steps, state=saved, count_steps=False
        )
        self._record(state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pruner is not None and self._pruner.reach(state.global_step):
            self._record(state)
            if self._finished:
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if self._masks is not None:
            add_to_logs({**self._logged, "pruning_round": self._made}, logs, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = save_in_checkpoint(args, state, kwargs["model"], self.masks)
        memory = self._pruner.state_dict()["criterion"] if self._pruner is not None else {}
        if folder is not None and memory:
            save_file(memory, folder / CRITERION_FILE, metadata={_RECORD: self.masks.fingerprint()})

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._masks is not None:  # pushed without training
            save_for_push(args, kwargs["model"], self._masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._pruner is None:
            return
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if best is not None and not self._finished:  # Trainer has loaded an earlier, denser model
            self._masks = next(_found_masks([Path(best)]), self.masks)
        self.masks.apply_(kwargs["model"])
        self._pruner.release()
        if not self._finished and state.is_world_process_zero:
            warnings.warn(
                f"{self._pruner.unfinished} Train to the end, or make until smaller."
                + (f" The best model so far, which was loaded, is {self.masks.sparsity:.4f} sparse." if best else ""),
                stacklevel=2,
            )

    def _record(self, state: TrainerState) -> None:
        """What is so far, here and in Trainer's state, which it writes into its checkpoints."""
        assert self._pruner is not None
        self._masks, self._finished = self._pruner.masks, self._pruner.finished
        self._logged = sparsity_logs(self._masks)
        saved = self._pruner.state_dict()
        self._made = saved["rounds"]
        records = cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list it is made from
        records[_RECORD] = {
            "settings": saved["settings"],
            "rounds": saved["rounds"],
            "masks": self._masks.fingerprint(),
            "names": list(self._masks),
            "memory": bool(saved["criterion"]),
        }

    def _saved(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> dict[str, Any]:
        """What `GradualPruner.load_state_dict` takes, of the checkpoint that Trainer has just loaded.

        Trainer does not tell a callback which folder that is. So the masks, of which the record has the fingerprint,
        are looked for where this training would have written them, in `args.resume_from_checkpoint`, and in the zeros
        of the weights.
        """
        folder = checkpoint_folder(args, state)
        record = cast(dict[str, Any], state.stateful_callbacks).get(_RECORD)
        if record is None:
            raise CheckpointError(
                f"{folder.name} was written without GradualPruning, so how far pruning had come is not known. Start "
                "anew, without resume_from_checkpoint; or, if it was pruned before, train on with KeepMasks and its "
                "masks."
            )
        folders = [folder]
        if isinstance(args.resume_from_checkpoint, str) and Path(args.resume_from_checkpoint).is_dir():
            folders.append(Path(args.resume_from_checkpoint))
        weights = dict(unwrap(model).named_parameters())
        zeros = {name: weights[name].detach() != 0 for name in record["names"] if name in weights}
        candidates = [*_found_masks(folders), *([Masks(zeros)] if zeros else [])]
        masks = next((found for found in candidates if found.fingerprint() == record["masks"]), None)
        if masks is None:
            raise CheckpointError(
                f"{folder.name} was trained with masks that were not found: not in {folder / MASKS_FILE}, nor are "
                "they where the weights that Trainer loaded are zero. Copy the checkpoint's folder, whole, to "
                f"{folder}, or start anew, without resume_from_checkpoint."
            )
        memory = _memory(folders, record["masks"]) if record["memory"] else {}
        return {
            "settings": record["settings"],
            "steps": state.global_step,
            "rounds": record["rounds"],
            "masks": masks,
            "criterion": memory,
        }


def _found_masks(folders: Sequence[Path]) -> Iterator[Masks]:
    for folder in folders:
        if (folder / MASKS_FILE).is_file():
            yield Masks.load(folder / MASKS_FILE)


def _memory(folders: Sequence[Path], fingerprint: str) -> Mapping[str, Tensor]:
    """What the criterion remembered when these masks were saved."""
    for file in (folder / CRITERION_FILE for folder in folders):
        try:
            with safe_open(file, framework="pt") as opened:
                if (opened.metadata() or {}).get(_RECORD) == fingerprint:
                    return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            continue
    raise CheckpointError(
        f"The criterion learns from round to round, and what it had learnt by this checkpoint was not found in "
        f"{', '.join(str(folder / CRITERION_FILE) for folder in folders)}. Copy the checkpoint's folder there, whole, "
        "or start anew, without resume_from_checkpoint."
    )
