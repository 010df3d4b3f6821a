"""The images that a network is pruned on: a task's, or a folder of unlabelled ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

import px_hf as px

from ..data import CalibrationSet, ClassificationTask, Preprocess, calibration_set
from ..data.split import to_rgb
from .arguments import FineTuneArguments, ModelArguments
from .downstream_tasks import DownstreamTask, find_tasks
from .scoring_arguments import ScoringArguments


@dataclass
class SourceArguments(ScoringArguments):
    """How weights are ranked, and unlabelled images to do it on."""

    topic: ClassVar[str] = "pruning"

    unlabelled_dir: str | None = field(
        default=None,
        metadata={"help": "Prune on a folder of images without labels, at any depth, by the model's own head."},
    )
    max_unlabelled: int = field(default=100, metadata={"help": "Score on at most so many unlabelled images."})


@dataclass(frozen=True)
class Source:
    """What the network is pruned on; `task`, `asked` and `labels` are None for unlabelled images."""

    name: str
    args: SourceArguments
    training: FineTuneArguments
    pixels: Preprocess
    task: ClassificationTask | None
    asked: DownstreamTask | None = None
    files: Sequence[Path] = ()

    @classmethod
    def read(
        cls,
        task_name: str | None,
        args: SourceArguments,
        model_args: ModelArguments,
        training: FineTuneArguments,
        pixels: Preprocess,
    ) -> Source:
        """The task of that name (see `find_tasks`), or for None the images of `--unlabelled_dir`.

        Raises:
            DataError: the task cannot be read, or there is no image.
        """
        if task_name is not None:
            (asked,) = find_tasks([task_name])
            task = asked.load(training.seed, model_args.cache_dir)
            return cls(asked.name, args, training, pixels, task, asked)
        folder, known = Path(args.unlabelled_dir or ""), Image.registered_extensions()
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in known and path.is_file())
        if not files:
            raise px.DataError(f"No images in {folder}.")
        generator = torch.Generator().manual_seed(training.seed)
        chosen = torch.randperm(len(files), generator=generator)[: args.max_unlabelled]
        return cls(folder.absolute().name, args, training, pixels, None, None, [files[i] for i in chosen.tolist()])

    @property
    def labels(self) -> list[str] | None:
        return None if self.task is None else self.task.labels

    def batches(self, share: int = 1) -> Sequence[Any]:
        """All of the scoring images, or one in `share` of them."""
        if self.task is not None:
            return list(self.calibration(self.task, share))
        files, size = self.files[::share], self.args.scoring_batch_size
        groups = (files[start : start + size] for start in range(0, len(files), size))
        return [{"pixel_values": self.pixels([_read(file) for file in group])} for group in groups]

    def calibration(self, task: ClassificationTask, share: int = 1) -> CalibrationSet:
        """The scoring images of a task, or one in `share` of them, of every class."""
        return calibration_set(
            task.train,
            task.labels,
            self.pixels,
            examples_per_class=max(1, self.args.examples_per_class // share),
            seed=self.training.seed,
            batch_size=self.args.scoring_batch_size,
        )


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return to_rgb(image)
    except Exception as error:  # as in px_hf.data: Pillow raises many kinds for bad files
        raise px.DataError(f"Unreadable image {file}: {type(error).__name__}: {error}. Remove it.") from error
