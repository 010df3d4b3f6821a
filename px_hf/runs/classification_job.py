"""A run on images of classes: the classifier, its data, its scores, and how they are shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
)

import px_hf as px

from ..controls import apply_control_
from ..data import Augment, CalibrationSet, ClassificationTask, Split, calibration_set
from ..data.embedded.characters import digits
from ..model.modes import evaluating
from ..plots import plot_training
from ..scopes import as_scope
from ..trainer.distillation_trainer import require_same_classes
from .arguments import DataArguments, FineTuneArguments
from .backbone import load_model, load_processor, require_trained_head
from .classifier_trainer import make_trainer
from .console import ClosingTable
from .html_report import Tile, spread
from .job import Job, MaskSource, Say, Scores
from .pruning_arguments import PruneArguments
from .saved_model import load as load_teacher
from .sparse_backbone import CARRIED, has_zeros, kept_masks, says_sparse


@dataclass(eq=False)
class ClassificationJob(Job):
    """A backbone with a new head for the classes of a data set."""

    prune_args: PruneArguments
    data_args: DataArguments

    @cached_property
    def processor(self) -> BaseImageProcessor:
        return load_processor(self.model_args)

    @cached_property
    def task(self) -> ClassificationTask:
        """Class names and splits, on at most as many examples as asked for."""
        args = self.data_args
        with self.training.main_process_first():
            task = args.read(digits, self.training.seed, self.model_args.cache_dir)
        return args.limited(task, self.training.seed)

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The splits train, validation and, where there is one, test, as tensors."""
        augment = Augment(self.pixels, self.data_args.random_crop, self.data_args.horizontal_flip)
        task = self.task
        found = {"train": task.train.with_pixels(augment), "validation": task.validation.with_pixels(self.pixels)}
        if task.test is not None:
            found["test"] = task.test.with_pixels(self.pixels)
        return found

    @property
    def example(self) -> Tensor:
        return self.splits["validation"][0]["pixel_values"][None]

    def load(self, say: Say) -> PreTrainedModel:
        if not self.training.trains:
            require_trained_head(self.model_args, self.task.labels)
        counts = [f"{len(split):,} {name} images" for name, split in self.splits.items()]
        model = self.network()
        if self.teacher is not None:
            require_same_classes(model, self.teacher)
        say(f"{self.model_args.model_name_or_path}: {model.num_parameters():,} parameters")
        say(f"{', '.join(counts)}, {len(self.task.labels)} classes")
        return model

    @cached_property
    def teacher(self) -> nn.Module | None:
        """The model that `--distill` names, if that is not the dense network of the run.

        Raises:
            CheckpointError: it cannot be loaded.
        """
        name = self.prune_args.distill
        if name is None or self.learns_from_dense:
            return None
        return load_teacher(name, self.model_args.trust_remote_code)

    @property
    def learns_from_dense(self) -> bool:
        return self.prune_args.distill_dense

    def network(self) -> PreTrainedModel:
        return load_model(self.model_args, self.task.labels, self.training)

    def mask_source(self, model: PreTrainedModel, say: Say) -> MaskSource:
        args, training = self.prune_args, self.training
        told: dict[str, Any] = {
            "base_model": self.model_args.short_name(),
            "base_revision": self.model_args.commit(),
            "dataset": self.data_args.short_name(),
            "dataset_id": self.data_args.hub_id(),
            "seed": training.seed,
        }
        told |= args.describe_lora()
        if args.distill is not None:
            told["distilled_from"] = Path(args.distill).name if Path(args.distill).is_dir() else args.distill
        if args.keep_masks:
            masks, how = kept_masks(self.model_args, model)
            return MaskSource(told | how, lambda: masks)
        if says_sparse(model.config) and not has_zeros(model, model.config):
            say(f"{self.model_args.short_name()}: {CARRIED}")
        elif says_sparse(model.config):
            say("The backbone is sparse already. It is pruned anew; --keep_masks would keep its masks.")
        batches = self.calibration()

        def find() -> px.Masks:
            found = args.find_masks(model, batches, args.sparsity, progress=not training.disable_tqdm)
            return apply_control_(args.control, model, found, training.seed)

        return MaskSource(told | args.describe() | {"calibration": batches.describe()}, find, batches)

    def calibration(self) -> CalibrationSet:
        """The training images that weights are scored on, without augmentation."""
        return calibration_set(
            self.task.train,
            self.task.labels,
            self.pixels,
            examples_per_class=self.prune_args.examples_per_class,
            seed=self.training.seed,
            batch_size=self.prune_args.scoring_batch_size,
        )

    def adapted(self, network: nn.Module) -> nn.Module:
        """With LoRA adapters if `--lora` asks for them.

        Raises:
            InvalidArgumentError: `--lora_targets` names no layer that can have one.
        """
        if not self.prune_args.lora:
            return network
        self.training.label_names = self.training.label_names or ["labels"]  # which Trainer cannot find out of peft
        return self.prune_args.adapted(network, self.training.seed)

    def trainer(self, model: nn.Module, training: FineTuneArguments, callbacks: list[TrainerCallback]) -> Trainer:
        return make_trainer(model, self.splits, training, self.processor, callbacks)

    def check_student(self, model: nn.Module) -> None:
        """Find out before anything is trained whether logits and hidden states of the teacher fit the student's.

        Raises:
            TargetError: they do not, or the teacher does not take the images of the student.
        """
        args = self.prune_args
        if self.teacher is None and not (self.learns_from_dense and args.distill_hidden):
            return
        distillation = args.distillation(self.network() if self.teacher is None else self.teacher)
        distillation.teacher.to(self.training.device)
        inputs = {"pixel_values": self.example.to(self.training.device)}
        with evaluating(model), torch.no_grad():
            outputs = model(**inputs, **({"output_hidden_states": True} if distillation.beta else {}))
        try:
            distillation.lesson(outputs, inputs)
        except (ValueError, RuntimeError, TypeError) as error:
            if isinstance(error, px.PxError):
                raise
            raise px.TargetError(
                f"The teacher {args.distill} cannot take the images of the model, "
                f"{list(self.example.shape)}: {error}. It must be one for the same size of images."
            ) from error

    def student(self, model: nn.Module, callbacks: list[TrainerCallback], dense: Path | None) -> Trainer:
        """With the teacher that `--distill` asks for."""
        teacher = self.stock(dense) if dense is not None else self.teacher
        distillation = None if teacher is None else self.prune_args.distillation(teacher)
        return make_trainer(model, self.splits, self.training, self.processor, callbacks, distillation)

    def evaluate(self, trainer: Trainer, name: str) -> dict[str, float]:
        """Loss and accuracy on the validation split and, where there is one, the test split."""
        results: dict[str, float] = {}
        for prefix, split in (("eval", "validation"), ("test", "test")):
            if split in self.splits:
                metrics = trainer.evaluate(self.splits[split], metric_key_prefix=prefix)
                results |= {key: metrics[key] for key in (f"{prefix}_accuracy", f"{prefix}_loss")}
        return results

    def held_out(self) -> Iterator[list[Image.Image]]:
        """Up to 256 images of the test split, or else the validation split."""
        split = self.task.test or self.task.validation
        for start in range(0, min(len(split), 256), 32):
            yield split.images(range(start, min(start + 32, len(split))))

    def guesses(self, model: nn.Module) -> list[str]:
        split = self.task.test or self.task.validation
        pixels = self.pixels(split.images(spread(len(split)))).to(self.training.device)
        with evaluating(model), torch.no_grad():
            found = model(pixel_values=pixels).logits.argmax(-1).tolist()
        return [self.task.labels[k] for k in found]

    def tiles(self, said: Mapping[str, list[str]]) -> list[Tile]:
        split = self.task.test or self.task.validation
        places = spread(len(split))
        return [
            Tile(image, self.task.labels[int(split.labels[place])], {who: words[k] for who, words in said.items()})
            for k, (place, image) in enumerate(zip(places, split.images(places), strict=True))
        ]

    def stock(self, folder: Path) -> nn.Module:
        trust = self.model_args.trust_remote_code
        return AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=trust)

    def scores(self, pruned: Scores, dense: Scores | None) -> dict[str, Any]:
        return {**pruned, **{f"dense_{name}": value for name, value in (dense or {}).items()}}

    def draw(self, out: Path, trainer: Trainer, found: px.Masks, results: Mapping[str, Any]) -> None:
        if not self.training.trains:
            return
        plot_training(
            trainer.state.log_history,
            out / "training_curve.png",
            title=f"{self.model_args.short_name()} on {self.data_args.short_name()}: {found.kept:,} of "
            f"{found.total:,} weights",
            dense_accuracy=results.get("dense_eval_accuracy"),
        )

    def table(self, out: Path, results: Mapping[str, Any]) -> Table:
        """Accuracy, sparsity, sizes, times."""
        compared = "dense_eval_accuracy" in results
        scope = results.get("scope")  # kept masks may not say how they were found
        caption = _CAPTIONS[scope is not None and as_scope(scope).whole_units]
        table = ClosingTable(out, compared=compared, caption=caption, show_header=compared)
        for name, key in (("test", "test_accuracy"), ("validation", "eval_accuracy")):
            if key in results:
                dense = f"{results[f'dense_{key}']:.2%}" if compared else ""
                table.row(f"accuracy, {name}", f"{results[key]:.2%}", dense)
        table.section()
        table.row("sparsity asked", f"{100 * results['sparsity_asked']:.6g} %")
        table.row("sparsity achieved", f"{100 * results['sparsity']:.6g} %")
        table.row("prunable weights kept", f"{results['weights_kept']:,}", f"{results['weights']:,}")
        table.row("parameters kept", f"{results['parameters_kept']:,}", f"{results['parameters']:,}")
        table.row("MACs per image, effective", f"{results['effective_macs']:,}", f"{results['macs']:,}")
        table.section()
        for label, size in results["file_bytes"].items():
            table.row(label, f"{size / 1e6:.2f} MB")
        table.section()
        for name, seconds in results["seconds"].items():
            table.row(f"time, {name.lower()}", f"{seconds:.1f} s")
        return table.table


_CAPTIONS = {
    False: "Effective: what a sparse runtime could skip. Dense kernels do not get faster.",
    True: "Effective: of the smaller model that was saved.",
}
"""By whether whole units were taken out."""
