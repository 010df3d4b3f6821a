"""What the callbacks add to the checkpoints of transformers' Trainer, and to what it pushes to the Hub."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ..hub.card import TAGS
from ..hub.saving import save_for_trainer
from ..masks import Masks
from ..masks_file import MASKS_FILE
from ..model.adapters import plain_paths
from ..model.shards import is_sharded_model
from ..model.wrappers import unwrap


def checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    """Where this training writes the checkpoint of the step it is at."""
    return Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def save_in_checkpoint(args: TrainingArguments, state: TrainerState, model: nn.Module, masks: Masks) -> Path | None:
    """Add the masks to the checkpoint that Trainer has just written, on the process that saves: its folder."""
    folder = checkpoint_folder(args, state)
    if not args.should_save or not folder.is_dir():  # a hyperparameter search writes elsewhere
        return None
    if not is_sharded_model(model):
        save_by_module_names(model, folder)
    masks.save(folder / MASKS_FILE)
    return folder


def save_for_push(args: TrainingArguments, model: nn.Module, masks: Masks) -> None:
    """What Trainer pushes is its output folder: add what `save_pretrained` writes beside the dense weights."""
    model = unwrap(model)
    # Trainer pushes adapters, without the weights, or asks the main process alone for what all of them hold
    if args.should_save and (plain_paths(model) is not None or is_sharded_model(model)):
        masks.save(Path(args.output_dir or ".", MASKS_FILE))
        return
    if not args.should_save or not isinstance(model, PreTrainedModel):
        return
    save_for_trainer(model, masks, args.output_dir or ".")
    config = json.loads(Path(args.output_dir or ".", CONFIG_NAME).read_text(encoding="utf-8"))
    model.config.px = config["px"]  # Trainer is about to write the model's own config
    model.add_model_tags(list(TAGS))


def save_by_module_names(model: nn.Module, folder: Path) -> None:
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
