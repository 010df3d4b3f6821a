"""Keep masks through training by transformers' Trainer, and with its checkpoints.

    trainer = Trainer(model, ..., callbacks=[KeepMasks(masks)])

`px_hf.keep` does the keeping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from .errors import CheckpointError, InvalidArgumentError
from .hub.card import TAGS
from .hub.saving import save_pretrained
from .keep import MaskKeeper, keep_masks
from .masks import Masks
from .masks_file import MASKS_FILE
from .model.wrappers import unwrap


class KeepMasks(TrainerCallback):
    """Keeps the masks through training by transformers' Trainer, and with its checkpoints.

    ```python
    trainer = Trainer(model, ..., callbacks=[KeepMasks(masks)])
    ```

    The model is masked when training begins, stays so after each step (see `keep_masks`), and is masked
    once more when training ends, after a best model may have been loaded. Each checkpoint folder gets the
    masks as `masks.safetensors`, and its weights by the names that Trainer looks for when it loads them again
    (see `_save_by_module_names`).

    What Trainer itself pushes to the Hub gets the compact copy too. `push_to_hub` does it in one commit, writes a
    better model card, and timm loads a timm model from it; TimmWrapper, left to Trainer, saves other names.

    Raises:
        CheckpointError: before the first step, training resumes from a checkpoint with other masks, with none, or with
            weights where the masks have zeros.
    """

    def __init__(self, masks: Masks) -> None:
        if not isinstance(masks, Masks):
            raise InvalidArgumentError(f"KeepMasks needs Masks, got {type(masks).__name__}.")
        self.masks = masks
        self._keeper: MaskKeeper | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        records = cast(dict[str, Any], state.stateful_callbacks)  # annotated as the list it is made from
        if state.global_step > 0:
            self._compare(kwargs["model"], _checkpoint(args, state), records.get(_RECORD))
        # Trainer writes this into trainer_state.json, so a checkpoint is known wherever it lies. A name
        # that is no callback's keeps Trainer from making a KeepMasks out of it.
        records[_RECORD] = self.masks.fingerprint()
        self._release()  # of a training that raised
        self._keeper = keep_masks(kwargs["optimizer"], kwargs["model"], self.masks)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = _checkpoint(args, state)
        if args.should_save and folder.is_dir():  # a hyperparameter search writes elsewhere
            _save_by_module_names(kwargs["model"], folder)
            self.masks.save(folder / MASKS_FILE)

    def on_push_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What Trainer pushes is its output folder: add what `save_pretrained` writes beside the dense weights."""
        model = unwrap(kwargs["model"])
        if not args.should_save or not isinstance(model, PreTrainedModel):
            return
        save_pretrained(model, self.masks, args.output_dir or ".", overwrite=True)
        config = json.loads(Path(args.output_dir or ".", CONFIG_NAME).read_text(encoding="utf-8"))
        model.config.px = config["px"]  # Trainer is about to write the model's own config
        model.add_model_tags(list(TAGS))

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
        if revived := self.masks.revived(model):
            raise CheckpointError(
                f"{sum(revived.values())} weights that the masks prune are not zero in what Trainer loaded from "
                f"{folder.name}, for example in {next(iter(revived))!r}: it was trained without the masks, or "
                "Trainer could not load all of it (of missing keys it only warns). Start anew, without "
                "resume_from_checkpoint."
            )


_RECORD = "px_hf.masks"


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _save_by_module_names(model: nn.Module, folder: Path) -> None:
    """Write the weights of a checkpoint anew if Trainer would not find them.

    transformers saves some models (ViT among them) under the parameter names of older versions, and Trainer
    loads a checkpoint to resume, or the best one, by the names of today: it leaves out all that it does not
    find, with a warning (transformers issue 48805).
    """
    weights = folder / SAFE_WEIGHTS_NAME
    if isinstance(model, PreTrainedModel) and weights.is_file():
        with safe_open(weights, framework="pt") as file:
            unknown = set(file.keys()) - model.state_dict().keys()
        if unknown:
            model.save_pretrained(folder, save_original_format=False)
