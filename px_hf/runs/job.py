"""What a run that prunes and fine-tunes one network must be told of its kind: `Job`."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

import px_hf as px

from ..data import Preprocess
from ..model.inputs import Batches
from .arguments import FineTuneArguments, ModelArguments
from .html_report import Tile
from .pruning_arguments import SparsityArguments

Say = Callable[[str], None]
Scores = Mapping[str, Any]


@dataclass(frozen=True)
class MaskSource:
    """How the masks of a run are found, and all that they depend on, as JSON can say it.

    `find` finds them before training; `batches` is what the network is scored on.
    """

    provenance: dict[str, Any]
    find: Callable[[], px.Masks]
    batches: Batches = ()


@dataclass(eq=False)
class Job(ABC):
    """A kind of network with its data, its trainer and its scores.

    `px_hf.commands.prune_finetune.prune_and_fine_tune` tells what a run does with it. Data are read when first asked
    for.
    """

    model_args: ModelArguments
    prune_args: SparsityArguments
    training: FineTuneArguments

    @property
    @abstractmethod
    def processor(self) -> BaseImageProcessor:
        """The image processor, which is saved with the model."""

    @cached_property
    def pixels(self) -> Preprocess:
        """Images as the model takes them."""
        return Preprocess(self.processor)

    @property
    @abstractmethod
    def example(self) -> Tensor:
        """One image [1, C, H, W] as the model takes it."""

    @abstractmethod
    def load(self, say: Say) -> PreTrainedModel:
        """The network, after the data have been read; says how large they are."""

    @abstractmethod
    def network(self) -> PreTrainedModel:
        """The pretrained network with its new parts, the same on every call."""

    @abstractmethod
    def mask_source(self, model: PreTrainedModel, say: Say) -> MaskSource:
        """How the masks of `model` are found."""

    @abstractmethod
    def trainer(self, model: nn.Module, training: FineTuneArguments, callbacks: list[TrainerCallback]) -> Trainer:
        """A Trainer on the training split, which evaluates on the validation split."""

    @abstractmethod
    def evaluate(self, trainer: Trainer, name: str) -> dict[str, Any]:
        """The scores of the trained model on the splits that are not trained on; `name` is "dense" or "pruned"."""

    @abstractmethod
    def held_out(self) -> Iterator[list[Image.Image]]:
        """Some images that are not trained on, in batches: what the saved model says of them is compared."""

    @abstractmethod
    def stock(self, folder: Path) -> nn.Module:
        """The model saved in `folder`, loaded by transformers alone."""

    @abstractmethod
    def scores(self, pruned: Scores, dense: Scores | None) -> dict[str, Any]:
        """What `evaluate` found of both, as all_results.json tells it."""

    @abstractmethod
    def draw(self, out: Path, trainer: Trainer, found: px.Masks, results: Mapping[str, Any]) -> None:
        """Writes the figures of this kind of run."""

    @abstractmethod
    def table(self, out: Path, results: Mapping[str, Any]) -> Table:
        """The closing table, of what is in all_results.json."""

    def guesses(self, model: nn.Module) -> list[str]:
        """What a trained network says of the images that the report shows; nothing for kinds without such a grid."""
        return []

    def tiles(self, said: Mapping[str, list[str]]) -> list[Tile]:
        """Those images, with what the networks say of them, by the names of the networks."""
        return []

    @property
    def learns_from_dense(self) -> bool:
        """Whether the dense network of the run is the teacher of the pruned one."""
        return False

    def check_student(self, model: nn.Module) -> None:
        """Find out before anything is trained whether a teacher fits the pruned network, if there is one."""
        return

    def adapted(self, network: nn.Module) -> nn.Module:
        """What is trained in the place of `network`: itself, or a PeftModel around it."""
        return network

    def student(self, model: nn.Module, callbacks: list[TrainerCallback], dense: Path | None) -> Trainer:
        """The Trainer of the pruned network; `dense` holds the teacher if that is the dense network of the run."""
        return self.trainer(model, self.training, callbacks)

    def train_dense(self) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The unpruned network after the same training, and its scores."""
        unsaved, network = copy.copy(self.training), self.network()
        unsaved.save_strategy, unsaved.run_name = SaveStrategy.NO, f"{unsaved.run_name}-dense"
        trainer = self.trainer(self.adapted(network), unsaved, [])
        if self.training.trains:
            trainer.train()
        trained: Any = trainer.model
        scores = self.evaluate(trainer, "dense")
        return network if trained is network else trained.merge_and_unload(), scores

    def steps(self, model: nn.Module) -> int:
        """How many steps of the optimizer the training of `model` takes."""
        elsewhere = copy.copy(self.training)
        with TemporaryDirectory() as elsewhere.output_dir:  # Trainer makes its folder at once
            trainer = self.trainer(model, elsewhere, [])
            return trainer.set_initial_training_values(elsewhere, trainer.get_train_dataloader())[-1]
