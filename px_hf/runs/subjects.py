"""The models that are compared: a dense parent, pruned ones, and random masks as a control."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel, set_seed
from transformers.utils import logging

import px_hf as px

from ..controls import shuffle
from ..model.targets import head_modules
from .arguments import FineTuneArguments, ModelArguments
from .backbone import load_model
from .schedule_arguments import ScheduleArguments
from .scoring_arguments import ScoringArguments
from .sparse_backbone import CARRIED, download_of, has_zeros, holds_masks, read_masks, says_sparse


@dataclass(frozen=True)
class PruningInTraining:
    """`--schedule gradual`: how, and the images to score on."""

    args: ScheduleArguments
    batches: Sequence[Any]


@dataclass(frozen=True)
class Subject:
    """A backbone and its masks, or the pruning that makes them while it is fine-tuned.

    `kind` is "dense", "pruned" or "random"; `criterion` is what made the masks, or those that were shuffled.
    """

    name: str
    kind: str
    model: ModelArguments
    masks: px.Masks | None = None
    pruning: PruningInTraining | None = None
    criterion: str | None = None

    def describe(self) -> dict[str, Any]:
        """For the report: no folder of this machine."""
        own: dict[str, Any] = {"name": self.name, "kind": self.kind, "model": self.model.short_name()}
        own |= {"criterion": self.criterion} if self.criterion else {}
        if self.pruning is not None:
            return own | {"sparsity": self.pruning.args.sparsity} | self.pruning.args.describe()
        return own | {
            "sparsity": 0.0 if self.masks is None else self.masks.sparsity,
            "masks_sha256": None if self.masks is None else self.masks.fingerprint(),
        }

    def load(self, labels: list[str], training: FineTuneArguments) -> PreTrainedModel:
        """The masked model with a new head for `labels`, the same for all subjects of one architecture."""
        with _quiet_loading():  # that the head does not fit is known
            model = load_model(self.model, labels, training)
        set_seed(training.seed)
        for module in model.modules():  # in their order, which a set of them has not
            reset = getattr(module, "reset_parameters", None)
            if module in head_modules(model) and callable(reset):
                reset()
        if (masks := self.masks_for(model)) is not None:
            masks.apply_(model)
        return model

    def zeros(self, model: PreTrainedModel) -> px.KeepMasks | px.GradualPruning | None:
        """What keeps or makes the zeros of that model while Trainer trains it; None for a dense one."""
        if self.pruning is not None:
            return self.pruning.args.gradual_pruning(self.pruning.batches)
        masks = self.masks_for(model)
        return None if masks is None else px.KeepMasks(masks)

    def masks_for(self, model: PreTrainedModel) -> px.Masks | None:
        """The masks without those of the head, which is new."""
        if self.masks is None:
            return None
        head = {id(parameter) for module in head_modules(model) for parameter in module.parameters()}
        names = {name for name, parameter in model.named_parameters() if id(parameter) in head}
        return px.Masks({name: mask for name, mask in self.masks.items() if name not in names})

    def control(self, subjects: list[Subject], seed: int = 0) -> Subject | None:
        """The dense parent under a random mask with the densities of this one, if there are both."""
        dense = next((subject for subject in subjects if subject.kind == "dense"), None)
        if self.kind != "pruned" or self.masks is None or dense is None:
            return None
        shuffled = shuffle(self.masks, seed)
        return Subject(f"random {_percent(self.masks)}", "random", dense.model, shuffled, criterion=self.criterion)


def dense_and_pruned(model_args: ModelArguments, parent: str | None) -> tuple[list[Subject], list[str]]:
    """The dense parent, where it is known, and the model itself if it is pruned; and notes for the reader.

    Raises:
        CheckpointError: there is no such model, or a pruned one has no masks.
        InvalidArgumentError: a parent is named of a model that is not pruned.
    """
    try:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **model_args.hub())
    except (OSError, ValueError) as error:
        raise px.CheckpointError(f"Cannot load {model_args.model_name_or_path}: {error}") from error
    entry = getattr(config, "px", None) or {}
    carried = says_sparse(config) and _is_dense_again(model_args)
    if carried or not says_sparse(config):
        if parent:
            raise px.InvalidArgumentError(
                f"{model_args.model_name_or_path} is not a pruned model of px_hf: it has no parent."
            )
        return [Subject("dense", "dense", model_args)], [f"{model_args.short_name()}: {CARRIED}"] * carried

    masks = read_masks(model_args, config)
    model = Subject(f"pruned {_percent(masks)}", "pruned", model_args, masks)
    notes = []
    told = str(entry.get("base_model") or "")
    if parent is None and told and (Path(told).is_dir() or told.count("/") == 1):
        parent = told
    if parent is None:
        missing = f"{told!r} is not here" if told else "the model does not name it"
        return [model], [f"No dense parent to compare with: {missing} (--dense_model_name_or_path would be)."]
    revision = entry.get("base_revision") if parent == told else None
    dense = Subject(
        "dense", "dense", replace(model_args, model_name_or_path=parent, model_revision=revision or "main")
    )
    if entry.get("dataset"):
        notes.append(
            f"The pruned model has been fine-tuned on {entry['dataset']}; on frozen features its dense parent and the "
            "random mask have not."
        )
    return [dense, model], notes


def _is_dense_again(model_args: ModelArguments) -> bool:
    """Whether a model that its config calls pruned has neither masks nor their zeros."""
    if holds_masks(model_args.model_name_or_path, **download_of(model_args)):
        return False
    with _quiet_loading():
        model = AutoModelForImageClassification.from_pretrained(model_args.model_name_or_path, **model_args.hub())
    return not has_zeros(model, model.config)


def prune(
    dense: Subject,
    args: ScoringArguments,
    sparsity: float,
    training: FineTuneArguments,
    labels: list[str] | None,
    batches: Iterable[Any],
    name: str = "pruned {}",
) -> Subject:
    """`dense` pruned, without training, on `batches`, with a head for `labels` (None: its own)."""
    with _quiet_loading():
        model = load_model(dense.model, labels, training)
    masks = args.find_masks(model, batches, sparsity, progress=not training.disable_tqdm)
    made_by = repr(args.criterion_object())
    return Subject(name.format(_percent(masks)), "pruned", dense.model, masks, criterion=made_by)


def _percent(masks: px.Masks) -> str:
    return f"{100 * masks.sparsity:.1f}".removesuffix(".0") + " %"


@contextmanager
def _quiet_loading() -> Iterator[None]:
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()
