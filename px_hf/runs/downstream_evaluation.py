"""Runs models through tasks: probes on frozen features, fine-tuning with the zeros kept, results that can resume."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table
from transformers import PreTrainedModel, PrinterCallback, Trainer

import px_hf as px

from ..atomic import whole
from ..data import Augment, ClassificationTask, Preprocess
from ..data.check import read_all
from ..distributed import on_main, processes
from ..downstream.figure import plot_downstream
from ..downstream.page import FIGURE_FILE, METHODS, PAGE_FILE, RESULTS_FILE, accuracy_rows, markdown
from ..evaluation import PROBES, Examples, FeatureCache, classification_scores, head_inputs
from ..evaluation.features import features_key
from .arguments import FineTuneArguments
from .classifier_trainer import logits_of, make_trainer
from .console import Phases
from .downstream_tasks import DownstreamTask
from .folder import write_json
from .protocols import SGD, Protocol
from .subjects import Subject


@dataclass(frozen=True)
class DownstreamEvaluation:
    """How models are evaluated on tasks, and where the results go."""

    methods: list[str]
    training: FineTuneArguments
    pixels: Preprocess
    out: Path
    phases: Phases
    cache_dir: str | None = None
    protocol: Protocol | None = None

    def run(
        self,
        tasks: list[DownstreamTask],
        subjects_of: Callable[[DownstreamTask, ClassificationTask], list[Subject]],
        results: dict[str, Any],
        settings: dict[str, Any],
    ) -> int:
        """Evaluates the subjects of each task, fills `results` and writes the report; the number of failed tasks.

        What an earlier run with the same settings has found is taken over. A task that fails is in the report.

        Raises:
            OutputExistsError: the folder holds results of other settings.
        """
        results |= {"methods": self.methods, "subjects": [], "tasks": {}}
        for task in tasks:
            with self.phases(task.name):
                record: dict[str, Any] = {"results": {}, "error": None}
                try:
                    with self.training.main_process_first():
                        data = task.load(self.training.seed, self.cache_dir)
                    subjects = subjects_of(task, data)
                    known = {subject["name"] for subject in results["subjects"]}
                    results["subjects"] += [s.describe() for s in subjects if s.name not in known]
                    record = on_main(partial(self._begin, task, subjects, settings))
                    self._evaluate(task, data, subjects, record)
                except px.OutputExistsError:
                    raise
                except Exception as error:
                    if processes().world_size > 1 and not isinstance(error, px.PxError):
                        raise  # the other processes know nothing of it
                    named = "" if repr(task.name) in str(error) else f"Task {task.name!r}: "
                    record["error"] = f"{type(error).__name__}: {named}{error}"
                    self.phases.say(f"Failed. {record['error']}")
                results["tasks"][task.name] = record
        if self.protocol is not None:
            done = {name: each for name, each in results["tasks"].items() if not each["error"]}
            results["notes"] += self.protocol.notes({name: each["classes"] for name, each in done.items()})
        if processes().is_main:
            write_json(self.out / RESULTS_FILE, results)
            plot_downstream(results, self.out / FIGURE_FILE)
            with whole(self.out / PAGE_FILE) as unfinished:
                unfinished.write_text(markdown(results), encoding="utf-8")
            self._show(results)
        return sum(record["error"] is not None for record in results["tasks"].values())

    def notes(self, random: bool) -> list[str]:
        """What a reader must know to read the numbers; `random`: whether random masks are among the models."""
        probes = [METHODS[method] for method in self.methods if method in PROBES]
        told = []
        if probes:
            told.append(
                f"{', '.join(probes)}: on frozen features, the input of the classifier head; fitted on the training "
                "split, their one setting chosen on the validation split."
            )
        if "finetune" in self.methods:
            told.append(
                f"Fine-tuned: {self.training.num_train_epochs:g} epochs at a learning rate of "
                f"{self.training.learning_rate:g}, one seed ({self.training.seed}), a new head, pruned weights kept "
                "at zero, nothing chosen."
            )
        return [
            *told,
            "Intervals are for other test images of the same kind, not for other training seeds: Wilson's for "
            "accuracy and top-5, a bootstrap of 1,000 resamples for macro F1 and balanced accuracy.",
            "Calibration error: expected, of the predicted class, 15 bins of equal width, no interval.",
            *["Random: the dense model under a mask with the same density in each layer, drawn at random."] * random,
        ]

    @property
    def _sgd(self) -> SGD | None:
        return None if self.protocol is None else self.protocol.sgd

    def _training(self, task: DownstreamTask) -> FineTuneArguments:
        """With the learning rate of the task."""
        training = copy.copy(self.training)
        if self.protocol is not None:
            training.learning_rate = self.protocol.learning_rate(task.name, training.learning_rate)
        return training

    def _file(self, task: DownstreamTask) -> Path:
        return self.out / "tasks" / f"{task.name}.json"

    def _begin(self, task: DownstreamTask, subjects: list[Subject], more: dict[str, Any]) -> dict[str, Any]:
        """The record of a task so far, or a new one."""
        training, file = self.training, self._file(task)
        settings = more | {
            "subjects": {subject.name: subject.describe() for subject in subjects},
            "num_train_epochs": training.num_train_epochs,
            "max_steps": training.max_steps,
            "learning_rate": self._training(task).learning_rate,
            "batch_size": training.train_batch_size * training.gradient_accumulation_steps * processes().world_size,
            "seed": training.seed,
            "versions": {"px_hf": px.__version__, "torch": torch.__version__},
        }
        if training.overwrite_output_dir or not file.is_file():
            return {"settings": settings, "error": None, "results": {}}
        known: dict[str, Any] = json.loads(file.read_text())
        told = json.loads(json.dumps(settings))
        differing = [key for key, value in told.items() if known["settings"].get(key) != value]
        if differing:
            raise px.OutputExistsError(
                f"{file} holds results with other settings ({', '.join(differing)}). Name another --output_dir, or "
                "pass --overwrite_output_dir."
            )
        return known

    def _evaluate(
        self, task: DownstreamTask, data: ClassificationTask, subjects: list[Subject], record: dict[str, Any]
    ) -> None:
        """Fills `record["results"]`, and writes the record after each model and method."""
        assert data.test is not None
        record["classes"], record["test_split"] = len(data.labels), data.test.name
        record["dataset"] = task.data.short_name() if task.data.source() else f"px_hf/{task.name}"
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        record["examples"] = {name: len(split) for name, split in splits.items()}
        self.phases.say(f"{', '.join(f'{count:,} {name}' for name, count in record['examples'].items())} images")
        if not PROBES.keys() & set(self.methods):  # whose features need every image before anything is trained
            ready = [split.with_pixels(self.pixels) for split in splits.values()]
            read_all(ready, progress=not self.training.disable_tqdm)
        for subject in subjects:
            done = record["results"].setdefault(subject.name, {})
            probes = [method for method in self.methods if method in PROBES and method not in done]
            try:
                examples = self._features(subject, data) if probes else {}
                for method in probes:
                    done[method] = on_main(partial(probe, method, examples, len(data.labels), self.training.seed))
                    self._save(task, record)
                if "finetune" in self.methods and "finetune" not in done:
                    done["finetune"] = finetune(subject, task, data, self._training(task), self.pixels, self._sgd)
                    self._save(task, record)
            except px.PxError as error:
                raise type(error)(f"Task {task.name!r}, {subject.name}: {error}") from error
            shown = (f"{METHODS[m]} {100 * done[m]['scores']['accuracy']['value']:.1f}" for m in self.methods)
            self.phases.say(f"{subject.name}: {', '.join(shown)}")

    def _save(self, task: DownstreamTask, record: dict[str, Any]) -> None:
        if processes().is_main:
            write_json(self._file(task), record)

    def _features(self, subject: Subject, data: ClassificationTask) -> dict[str, Examples]:
        """Features and classes of every split, on the main process; elsewhere nothing."""
        model = subject.load(data.labels, self.training)
        cache, batch_size = FeatureCache(self.out / "features"), self.training.per_device_eval_batch_size
        progress = not self.training.disable_tqdm
        examples = {}
        for name, split in (("train", data.train), ("validation", data.validation), ("test", data.test)):
            assert split is not None
            split = split.with_pixels(self.pixels)
            key = on_main(partial(features_key, model, split, batch_size))
            compute = partial(head_inputs, model, split, batch_size=batch_size, progress=progress)
            if (found := cache.compute(key, compute)) is not None:
                examples[name] = Examples(found, split.labels)
        return examples

    def _show(self, results: dict[str, Any]) -> None:
        """The closing table."""
        table = Table(
            title=str(self.out), title_justify="left", caption_justify="left",
            caption="Test accuracy in % [95 % interval], then the share of the dense accuracy that is kept.",
        )  # fmt: skip
        table.add_column("task")
        table.add_column("model")
        for method in results["methods"]:
            table.add_column(METHODS[method], justify="right")
        for task, rows in accuracy_rows(results):
            for place, (name, cells) in enumerate(rows):
                table.add_row("" if place else task, name, *cells, end_section=place == len(rows) - 1)
        failed = {task: record["error"] for task, record in results["tasks"].items() if record["error"]}
        for task in failed:
            table.add_row(task, "failed", *["-"] * len(results["methods"]), end_section=True)
        self.phases.console.print(table)
        for error in failed.values():
            self.phases.say(error)


def probe(method: str, examples: dict[str, Examples], classes: int, seed: int) -> dict[str, Any]:
    """A probe fitted on train, chosen on validation, scored on test."""
    start = time.perf_counter()
    fitted = PROBES[method].fit(examples["train"], examples["validation"], classes)
    test = examples["test"]
    scores = classification_scores(
        fitted.scores(test.features), test.labels, probabilities=fitted.probabilities, seed=seed
    )
    return {
        "scores": scores,
        "chosen": fitted.chosen,
        "validation_accuracy": fitted.validation_accuracy,
        "note": fitted.note,
        "seconds": round(time.perf_counter() - start, 2),
    }


def finetune(
    subject: Subject,
    task: DownstreamTask,
    data: ClassificationTask,
    training: FineTuneArguments,
    pixels: Preprocess,
    sgd: SGD | None = None,
) -> dict[str, Any]:
    """Trained on train with the masks kept, scored on test: every test image once, however many processes."""
    start = time.perf_counter()
    model = subject.load(data.labels, training)
    zeros = subject.zeros(model)
    trainer = train(model, zeros, task, data, training, pixels, sgd)
    assert data.test is not None
    output = trainer.predict(data.test.with_pixels(pixels))
    if zeros is not None and (revived := zeros.masks.revived(model)):
        raise px.TargetError(f"{sum(revived.values())} pruned weights are not zero after training.")
    told = np.asarray(output.label_ids)
    if not np.array_equal(told, data.test.labels):
        raise RuntimeError(
            f"{len(told)} predictions do not belong to the {len(data.test)} test images in their order."
        )
    probabilities = torch.softmax(torch.from_numpy(logits_of(output.predictions).astype(np.float64)), -1).numpy()
    scores = classification_scores(probabilities, told, seed=training.seed)
    found = {} if subject.pruning is None or zeros is None else {"masks_sha256": zeros.masks.fingerprint()}
    return found | {"scores": scores, "seconds": round(time.perf_counter() - start, 2)}


def train(
    model: PreTrainedModel,
    zeros: px.KeepMasks | px.GradualPruning | None,
    task: DownstreamTask,
    data: ClassificationTask,
    training: FineTuneArguments,
    pixels: Preprocess,
    sgd: SGD | None = None,
) -> Trainer:
    """The Trainer that has trained the model on the training split, its zeros kept or made."""
    augment = Augment(pixels, task.data.random_crop, task.data.horizontal_flip)
    splits = {"train": data.train.with_pixels(augment), "validation": data.validation.with_pixels(pixels)}
    trainer = make_trainer(model, splits, copy.copy(training), callbacks=[] if zeros is None else [zeros], sgd=sgd)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer
