"""One run that prunes and fine-tunes one network: its output folder, its record, and the checks at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedModel

import px_hf as px

from ..atomic import whole
from ..data import Preprocess
from ..distributed import on_main, processes
from ..downstream.attached import is_about
from ..downstream.page import read_results
from .arguments import FineTuneArguments
from .console import Phases
from .folder import (
    RUN_FILE,
    TEACHER_FOLDER,
    UNITS_FILE,
    begin,
    check_same_run,
    claim,
    find_checkpoint,
    has_structure,
    write_json,
)
from .job import Job, MaskSource
from .publishing import claim_repository, publish


@dataclass
class PruningRun:
    """Where a run writes and where it stands.

    `repo_id` is the repository that the finished model is pushed to, or None. `record` is what run.json holds.
    `teacher` is the folder of the dense network if it was saved for the pruned one to learn from.
    """

    out: Path
    checkpoint: str | None
    repo_id: str | None
    phase: Phases
    record: dict[str, Any] = field(default_factory=dict)
    teacher: Path | None = None

    @classmethod
    def claim(cls, training: FineTuneArguments) -> PruningRun:
        """A new run in `output_dir`, or the one that is resumed there.

        Raises:
            CheckpointError: there is no whole checkpoint to resume from.
            OutputExistsError: the folder holds what the run would replace or mix with its own.
            HubError: the model could not be pushed in the end.
        """
        out = Path(training.output_dir)
        checkpoint = find_checkpoint(out, training.resume_from_checkpoint)
        claim(out, training.overwrite_output_dir, checkpoint)
        return cls(out, checkpoint, claim_repository(training, out.name), Phases(quiet=not processes().is_main))

    def say(self, text: str) -> None:
        self.phase.say(text)

    def show(self, table: Table) -> None:
        self.phase.console.print(table)

    def masks(self, source: MaskSource, units: bool) -> px.Masks:
        """Those of the checkpoint, or those that `source` finds, with which the run begins in its folder.

        `units`: they take out whole units, so that checkpoints are of a smaller model than they are of.

        Raises:
            InvalidArgumentError: the checkpoint is of a run with other settings.
        """
        if self.checkpoint:
            self.begin(source)
            self.say(f"the masks of {self.checkpoint}")
            if units:
                return px.Masks.load(Path(self.checkpoint).parent / UNITS_FILE)
            return px.Masks.from_pretrained(self.checkpoint)
        masks = source.find()
        self.begin(source)
        if units and processes().is_main:
            masks.save(self.out / UNITS_FILE)
        return masks

    def begin(self, source: MaskSource) -> None:
        """Begin in the folder, or take up the record of the run that is resumed.

        Raises:
            InvalidArgumentError: the checkpoint is of a run with other settings.
        """
        if self.checkpoint:
            self.record = check_same_run(self.checkpoint, source.provenance)
            folder = Path(self.checkpoint).parent / TEACHER_FOLDER
            self.teacher = folder if "teacher" in self.record and folder.is_dir() else None
            return
        self.record = {"provenance": source.provenance}
        if processes().is_main:
            begin(self.out, self.record)

    def shrink(self, network: nn.Module, found: px.Masks, example: Tensor) -> tuple[nn.Module, px.Masks]:
        """The smaller network that is left without the units that `found` prunes, and its masks."""
        small, masks = px.shrink(network, found, example)
        parameters = sum(parameter.numel() for parameter in small.parameters())
        self.say(f"whole units are taken out: {parameters:,} parameters are left")
        return small, masks

    def train_dense(self, job: Job) -> None:
        """Train the unpruned network, unless the run that is resumed has done so, and save it if it is to teach."""
        if "dense" in self.record and (self.teacher is not None or not job.learns_from_dense):
            return
        with self.phase("Fine-tune dense"):
            network, scores = job.train_dense()
            if job.learns_from_dense:
                self.teacher = self.out / TEACHER_FOLDER
                on_main(partial(_save_stock, network, self.teacher))
                self.record["teacher"] = TEACHER_FOLDER
            self.note(dense=scores, dense_said=job.guesses(network))

    def note(self, **found: Any) -> None:
        """Record what a resumed run need not find again."""
        self.record |= found
        if processes().is_main:
            write_json(self.out / RUN_FILE, self.record)

    def save(self, job: Job, model: nn.Module, masks: px.Masks, provenance: Mapping[str, Any]) -> None:
        """Write the model, its masks and its image processor."""
        px.save_pretrained(
            model,
            masks,
            self.out,
            image_processor=job.processor,
            provenance=provenance,
            overwrite=job.training.overwrite_output_dir,
        )

    def check(self, job: Job, model: nn.Module, masks: px.Masks) -> None:
        """Load what was saved, and compare it with the model that was trained.

        Raises:
            CheckpointError: a pruned weight is not zero there, or predictions differ.
        """
        difference = check_saved(self.out, job, model, masks)
        by = "px_hf" if has_structure(self.out) else "stock transformers"
        self.say(f"{by} loads {self.out}: zeros where promised, logits differ by {difference:.1g}")

    def written(self) -> dict[str, Any]:
        """Sizes of the files of weights, and the seconds of each phase."""
        patterns = ("*.safetensors", "sparse/*.safetensors")
        files = [file for pattern in patterns for file in sorted(self.out.glob(pattern))]
        sizes = {file.relative_to(self.out).as_posix(): file.stat().st_size for file in files}
        return {"file_bytes": sizes, "seconds": self.phase.seconds}

    def push(
        self,
        job: Job,
        model: nn.Module,
        masks: px.Masks,
        *,
        provenance: Mapping[str, Any],
        results: Mapping[str, float],
        report: px.Report,
    ) -> None:
        """Push to the repository that was claimed, and say where the commit is.

        A report of recipes/evaluate_downstream.py on this very model, in the output folder, goes along.

        Raises:
            HubError: nothing was pushed; it says how to push without training again.
        """
        assert self.repo_id is not None
        found = read_results(self.out)
        evaluation = self.out if found is not None and is_about(found, model, masks) else None
        try:
            address = publish(
                model,
                masks,
                self.repo_id,
                job.training,
                image_processor=job.processor,
                provenance=provenance,
                results=results,
                model_report=report,
                evaluation=evaluation,
            )
        except px.HubError as error:
            raise px.HubError(
                f"{error} The finished model is in {self.out}. To push it without training again, run the same "
                "command with --resume_from_checkpoint true --overwrite_output_dir."
            ) from error
        self.say(address)


def _save_stock(model: PreTrainedModel, folder: Path) -> None:
    """As transformers saves it; the folder is whole or absent."""
    with whole(folder) as unfinished:
        model.save_pretrained(unfinished)


def size_of_smaller(model: nn.Module, masks: px.Masks, example: Tensor) -> dict[str, Any]:
    """What whole units have left of the MACs and parameters: all of those that `model` has."""
    found = px.report(model, masks, example)
    return {"effective_macs": found.macs, "parameters_kept": found.parameters}


@torch.no_grad()
def check_saved(out: Path, job: Job, model: nn.Module, masks: px.Masks) -> float:
    """The largest difference of a logit between `model` and what stock transformers loads from `out`.

    A model whose structure no config can express is loaded by px_hf.

    Raises:
        CheckpointError: a pruned weight is not zero there, or predictions differ.
    """
    trust, device = {"trust_remote_code": job.model_args.trust_remote_code}, job.training.device
    loaded = px.from_pretrained(out, **trust) if has_structure(out) else job.stock(out)
    if masks.revived(loaded):
        raise px.CheckpointError(f"Pruned weights are not zero in {out}: {masks.revived(loaded)}.")
    pixels = Preprocess(AutoImageProcessor.from_pretrained(out, **trust))
    loaded.to(device).eval()
    model.eval()
    difference = 0.0
    for images in job.held_out():
        expected = model(pixel_values=job.pixels(images).to(device)).logits
        logits = loaded(pixel_values=pixels(images).to(device)).logits
        difference = max(difference, float((logits - expected).abs().max()))
        if not torch.allclose(logits, expected, rtol=1e-3, atol=1e-3):
            raise px.CheckpointError(f"The model loaded from {out} gives other logits, by up to {difference}.")
    return difference
