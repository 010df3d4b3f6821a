"""Tune a part of the weights by transformers' Trainer, and keep its checkpoints honest.

    trainer = Trainer(model, ..., callbacks=[TuneOnly(masks)])

`px_hf.tune` does the freezing.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, InvalidArgumentError
from ..masks import Masks
from ..tune import TICKET_FILE, Tuner, frozen_fingerprint, tune_only
from .checkpoint import checkpoint_folder, save_by_module_names


class TuneOnly(TrainerCallback):
    """Lets only the weights train that the masks keep, and those of the groups in `also`: see `tune_only`.

    ```python
    trainer = Trainer(model, ..., callbacks=[px.TuneOnly(masks)])
    trainer = Trainer(model, ..., callbacks=[px.KeepMasks(pruned), px.TuneOnly(ticket)])   # of a sparse model
    ```

    Each checkpoint folder gets the masks as `ticket.safetensors`. When training resumes, masks and frozen weights must
    be those that it began with.

    Raises:
        InvalidArgumentError: `masks` is not `Masks`.
        CheckpointError: before the first step, training resumes from a checkpoint that was tuned with other masks or
            without any, or whose frozen weights are others.
    """

    def __init__(self, masks: Masks, *, also: Collection[str] = ("head",)) -> None:
        if not isinstance(masks, Masks):
            raise InvalidArgumentError(f"TuneOnly needs Masks, got {type(masks).__name__}.")
        self.masks, self.also = masks, tuple(also) if not isinstance(also, str) else also
        self._tuner: Tuner | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()  # of a training that raised
        records = cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list it is made from
        frozen = frozen_fingerprint(kwargs["model"], self.masks, self.also)
        if state.global_step > 0:
            self._compare(records.get(_RECORD), frozen, checkpoint_folder(args, state))
        # As KeepMasks does: Trainer writes this into trainer_state.json, under a name that is no callback's.
        records[_RECORD] = {"masks": self.masks.fingerprint(), "frozen": frozen}
        self._tuner = tune_only(kwargs["optimizer"], kwargs["model"], self.masks, also=self.also)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = checkpoint_folder(args, state)
        if args.should_save and folder.is_dir():
            save_by_module_names(kwargs["model"], folder)
            self.masks.save(folder / TICKET_FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._release()

    def _release(self) -> None:
        if self._tuner is not None:
            self._tuner.remove()
            self._tuner = None

    def _compare(self, record: dict[str, str] | None, frozen: str, folder: Path) -> None:
        if record is None or record["masks"] != self.masks.fingerprint():
            what = "without TuneOnly" if record is None else "with other masks than those given to TuneOnly"
            raise CheckpointError(
                f"{folder.name} was trained {what}. Use its own, Masks.load('.../{folder.name}/{TICKET_FILE}'), or "
                "start anew, without resume_from_checkpoint."
            )
        if record["frozen"] != frozen:
            raise CheckpointError(
                f"The weights in {folder.name} that are not tuned are not those that training began with: they were "
                "changed, come from another base model, or Trainer could not load all of them (of missing keys it "
                "only warns). Start anew, without resume_from_checkpoint."
            )


_RECORD = "px_hf.ticket"
