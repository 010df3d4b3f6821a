"""What may be read from and written to the output folder of a run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import px_hf as px

from ..atomic import remove, whole
from ..masks_file import MASKS_FILE

FINISHED = ("config.json", "model.safetensors", "model.safetensors.index.json")
"""Files of a saved model; any of them says that the folder is taken."""

RUN_FILE = "run.json"
"""The settings that masks depend on and, once known, the dense results: what a resumed run must know."""

OPTIONAL = ("schedule", "distilled_from", "lora")
"""Settings that are told only where they apply: a run that tells one is not resumed without it."""

UNITS_FILE = "units.safetensors"
"""The masks by which units were taken out, of the model as it was: a resumed run takes out the same ones."""

TEACHER_FOLDER = "teacher"
"""The dense network of the run, if the pruned one learns from it: a resumed run need not train it again."""


def has_structure(out: Path) -> bool:
    """Whether the model saved in `out` is one that only px_hf can build, since no config expresses its widths."""
    return "structure" in json.loads((out / "config.json").read_text())["px"]


def find_checkpoint(out: Path, resume: str | None) -> str | None:
    """The checkpoint to resume from: the named one, or for "true" the newest whole one in `out`.

    Raises:
        CheckpointError: it is missing or half-written, or there is none.
    """
    if resume is None or resume.lower() == "false":
        return None
    if resume.lower() != "true":
        if problem := _incomplete(Path(resume)):
            raise px.CheckpointError(f"Cannot resume from {resume}: {problem}. Name a whole checkpoint folder.")
        return resume
    problems = {folder: _incomplete(folder) for folder in reversed(_checkpoints(out))}
    for folder, problem in problems.items():
        if problem is None:
            return str(folder)
    found = "; ".join(f"{folder.name}: {problem}" for folder, problem in problems.items()) or "there is none"
    raise px.CheckpointError(
        f"No whole checkpoint in {out} to resume from ({found}). Start again without --resume_from_checkpoint, "
        "or name another output_dir."
    )


def claim(out: Path, overwrite: bool, checkpoint: str | None) -> None:
    """Makes sure that nothing of an earlier run is lost or mixed up, unless told to overwrite it.

    Raises:
        OutputExistsError: `out` holds a finished model, or checkpoints of another run than the one resumed.
    """
    if not overwrite:
        if any((out / name).exists() for name in FINISHED):
            raise px.OutputExistsError(
                f"{out} already holds a model. Name another --output_dir, or pass --overwrite_output_dir."
            )
        if checkpoint is None and _checkpoints(out):
            raise px.OutputExistsError(
                f"{out} holds checkpoints of an interrupted run. Continue it with --resume_from_checkpoint true, "
                "or start again with --overwrite_output_dir."
            )


def begin(out: Path, run: Mapping[str, Any]) -> None:
    """Starts a new run in `out`: its record is written, and checkpoints of an overwritten run are removed.

    A later resume would take those for its own, and its teacher.
    """
    for folder in _checkpoints(out):
        shutil.rmtree(folder)
    remove(out / TEACHER_FOLDER)
    write_json(out / RUN_FILE, run)


def check_same_run(checkpoint: str, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the run that `checkpoint` is of, as far as it got; of a checkpoint that was moved, nothing.

    Raises:
        InvalidArgumentError: that run had other settings than `provenance`.
    """
    file = Path(checkpoint).parent / RUN_FILE
    if not file.is_file():
        return {"provenance": dict(provenance)}
    run: dict[str, Any] = json.loads(file.read_text())
    known = run["provenance"]
    differing = [
        f"{key}: {known.get(key)} then, {provenance.get(key)} now"
        for key in [*provenance, *(key for key in OPTIONAL if key not in provenance)]
        if known.get(key) != provenance.get(key)
    ]
    if differing:
        raise px.InvalidArgumentError(
            f"{checkpoint} is of a run with other settings ({'; '.join(differing)}). Resume with the same arguments, "
            "or start anew in another --output_dir."
        )
    return run


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """The file is whole or absent."""
    with whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _checkpoints(out: Path) -> list[Path]:
    """The Trainer's checkpoint folders, oldest first."""
    found = [path for path in out.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _incomplete(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    expected = ["optimizer.pt", "scheduler.pt", "trainer_state.json", MASKS_FILE]
    missing = [name for name in expected if not (folder / name).is_file()]
    weights = sorted([*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")])
    if missing or not weights:
        return f"half-written, {', '.join(missing or ['model.safetensors'])} is missing"
    for path in [*weights, folder / MASKS_FILE]:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path.name} is damaged: {error}"
    return None
