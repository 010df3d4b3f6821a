"""Keep masks through training by transformers' Trainer, and with its checkpoints.

    trainer = Trainer(model, ..., callbacks=[KeepMasks(masks)])

`px_hf.keep` does the keeping.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import CheckpointError, InvalidArgumentError
from ..keep import MaskKeeper, keep_masks
from ..masks import Masks
from ..masks_file import MASKS_FILE
from ..model.adapters import plain_paths
from ..model.wrappers import unwrap
from .checkpoint import checkpoint_folder, save_for_push, save_in_checkpoint
from .logged import add_to_logs, sparsity_logs


class KeepMasks(TrainerCallback):
    """Keeps the masks through training by transformers' Trainer, and with its checkpoints.

    ```python
    trainer = Trainer(model, ..., callbacks=[KeepMasks(masks)])
    ```

    The model is masked when training begins, stays so after each step (see `keep_masks`), and is masked
    once more when training ends, after a best model may have been loaded. Each checkpoint folder gets the
    masks as `masks.safetensors`, and its weights by the names that Trainer looks for when it loads them again
    (see `px_hf.trainer.checkpoint`). What Trainer logs of the training has "sparsity", and "layer_density_min",
    "layer_density_median", "layer_density_max".

    What Trainer itself pushes to the Hub gets the compact copy too. `push_to_hub` does it in one commit, writes a
    better model card, and timm loads a timm model from it; TimmWrapper, left to Trainer, saves other names.

    Raises:
        CheckpointError: before the first step, training resumes from a checkpoint with other masks, with none, or with
            weights where the masks have zeros.
    """

    def __init__(self, masks: Masks) -> None:
        if not isinstance(masks, Masks):
            raise InvalidArgumentError(f"KeepMasks needs Masks, got {type(masks).__name__}.")
        self.masks = masks.whole()  # each process masks its rows of a sharded model; the files need all
        self._keeper: MaskKeeper | None = None
        self._logged = sparsity_logs(self.masks)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        records = cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list it is made from
        if state.global_step > 0:
            self._compare(kwargs["model"], checkpoint_folder(args, state), records.get(_RECORD))
        # Trainer writes this into trainer_state.json, so a checkpoint is known wherever it lies. A name
        # that is no callback's keeps Trainer from making a KeepMasks out of it.
        records[_RECORD] = self.masks.fingerprint()
        self._release()  # of a training that raised
        self._keeper = keep_masks(kwargs["optimizer"], kwargs["model"], self.masks)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        add_to_logs(self._logged, logs, state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        save_in_checkpoint(args, state, kwargs["model"], self.masks)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        save_for_push(args, kwargs["model"], self.masks)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.masks.apply_(kwargs["model"])
        self._release()

    def _release(self) -> None:
        if self._keeper is not None:
            self._keeper.remove()
            self._keeper = None

    def _compare(self, model: nn.Module, folder: Path, record: str | None) -> None:
        """Raise CheckpointError unless the checkpoint that was just loaded has these masks.

        Trainer does not tell a callback which folder it resumed from. The record is from that folder; the
        masks file can be looked at if `folder`, where this training would have written it, is there.
        """
        file = folder / MASKS_FILE
        if not file.is_file() and (folder.is_dir() or record is None):
            raise CheckpointError(
                f"{folder.name} has no masks: it was written without KeepMasks, or lost its {MASKS_FILE}. If its "
                f"weights were trained with these masks, say so by masks.save({str(file)!r}); otherwise start anew, "
                "without resume_from_checkpoint."
            )
        if record not in (None, self.masks.fingerprint()) or (file.is_file() and Masks.load(file) != self.masks):
            raise CheckpointError(
                f"{folder.name} was trained with other masks than those given to KeepMasks. Use its own, "
                f"Masks.load('.../{folder.name}/{MASKS_FILE}'), or start anew, without resume_from_checkpoint."
            )
        if plain_paths(unwrap(model)) is not None:
            return  # a checkpoint of peft holds adapters: the weights are not from it, and are masked next
        if revived := self.masks.revived(model):
            raise CheckpointError(
                f"{sum(revived.values())} weights that the masks prune are not zero in what Trainer loaded from "
                f"{folder.name}, for example in {next(iter(revived))!r}: it was trained without the masks, or "
                "Trainer could not load all of it (of missing keys it only warns). Start anew, without "
                "resume_from_checkpoint."
            )


_RECORD = "px_hf.masks"
