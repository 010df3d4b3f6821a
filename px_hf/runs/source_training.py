"""A backbone that is pruned while it learns the source task, before it is transferred to others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

import px_hf as px

from ..distributed import on_main
from .arguments import FineTuneArguments
from .downstream_evaluation import train
from .pruning_source import Source
from .schedule_arguments import ScheduleArguments
from .subjects import PruningInTraining, Subject

SOURCE_FOLDER = "source"
"""In the output folder: the network that has learned the source."""


def learned(
    dense: Subject,
    args: ScheduleArguments,
    source: Source,
    limits: dict[str, int | None],
    training: FineTuneArguments,
    processor: Any,
    out: Path,
) -> Subject:
    """`dense`, pruned by the schedule of `args` while it learns the source, and saved in the output folder.

    What an earlier run with the same settings has saved there is taken over.

    Raises:
        OutputExistsError: the folder holds a network of other settings.
    """
    assert source.asked is not None
    assert source.task is not None
    folder = out / SOURCE_FOLDER
    provenance = args.describe() | {
        "base_model": dense.model.short_name(),
        "dataset": source.name,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps,
        "learning_rate": training.learning_rate,
        "seed": training.seed,
        **limits,
    }
    if training.overwrite_output_dir or not folder.exists():
        given: dict[str, Any] = {name: limit for name, limit in limits.items() if limit is not None}
        task = replace(source.asked, data=replace(source.asked.data, **given))
        model = dense.load(source.task.labels, training)
        pruning = Subject("", "pruned", dense.model, pruning=PruningInTraining(args, source.batches())).zeros(model)
        assert pruning is not None
        train(model, pruning, task, task.data.limited(source.task, training.seed), training, source.pixels)
        save = partial(
            px.save_pretrained, model, pruning.masks, folder, image_processor=processor, provenance=provenance,
            overwrite=training.overwrite_output_dir,
        )  # fmt: skip
        on_main(save)
    elif differing := _differing(folder, provenance):
        raise px.OutputExistsError(
            f"{folder} holds a network that learned with other settings ({', '.join(differing)}). Name another "
            "--output_dir, or pass --overwrite_output_dir."
        )
    here = replace(dense.model, model_name_or_path=str(folder), model_revision="main")
    masks, made_by = px.Masks.from_pretrained(folder), repr(args.criterion_object())
    return Subject(f"pruned while learning {source.name}", "pruned", here, masks, criterion=made_by)


def _differing(folder: Path, provenance: dict[str, Any]) -> list[str]:
    known = getattr(AutoConfig.from_pretrained(folder), "px", None) or {}
    return [name for name, value in provenance.items() if known.get(name) != value]
