"""The command `px-hf`: the programs of this package by short names, started as `accelerate launch` would start them.

    px-hf prune --model_name_or_path timm/resnet50.a1_in1k --train_dir photos/train
    px-hf prune --num_processes 4 ...

Nothing is imported before it is known which program is to run, so that help and errors in the name are quick.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InvalidArgumentError
from ..version import __version__
from . import run
from .quick_help import stored_page

ERROR_IN_USE = 2
"""The exit code of argparse."""


@dataclass(frozen=True)
class Program:
    """A module of this package with `main(argv)`, and a line about it. `launched`: it can run in several processes."""

    module: str
    about: str
    launched: bool = False


PROGRAMS = {
    "prune": Program("prune_finetune", "Prune a pretrained model, fine-tune it, save it, publish it.", launched=True),
    "inspect": Program("inspect_model", "What a saved model is: sparsity, layers, origin; whether its zeros hold."),
    "evaluate": Program("evaluate_downstream", "What a pruned model can still do on other tasks.", launched=True),
    "transfer": Program("transfer", "Prune once, fine-tune on many tasks.", launched=True),
    "segment": Program("prune_segment", "Prune and fine-tune for semantic segmentation.", launched=True),
    "compare": Program("compare_criteria", "Which criterion is best on your model and data?"),
    "export": Program("export_onnx", "Export saved models to ONNX."),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program that the first word names on the other words, and end the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        print(_help(), end="", file=sys.stderr)
        sys.exit(ERROR_IN_USE)
    name, *rest = words
    if name in ("-h", "--help", "help"):
        print(_help(), end="")
        sys.exit()
    if name in ("-V", "--version"):
        print(f"px_hf {__version__}")
        sys.exit()
    if name not in PROGRAMS:
        close = difflib.get_close_matches(name, PROGRAMS, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        print(f"px-hf: there is no {name!r}.{meant} `px-hf --help` lists what there is.", file=sys.stderr)
        sys.exit(ERROR_IN_USE)
    program = PROGRAMS[name]
    run(lambda words: _run(name, program, words), rest)


def _run(name: str, program: Program, words: list[str]) -> int | None:
    if (page := stored_page(name, words)) is not None:
        print(page, end="")
        return None
    if program.launched and "WORLD_SIZE" not in os.environ and not {"-h", "--help"} & {*words}:
        count, words = _processes(words)
        count = _devices() or 1 if count is None else count
        if count > 1:
            return _launched(count, name, words)
    module = importlib.import_module(f".{program.module}", __package__)
    failed: int | None = module.main(words)
    return failed


def _processes(words: list[str]) -> tuple[int | None, list[str]]:
    """What `--num_processes` says, and the other words.

    Raises:
        InvalidArgumentError: it is no positive number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--num_processes", "--num-processes", dest="count", default=None)
    found, others = parser.parse_known_args(words)
    if found.count is None:
        return None, others
    if not found.count.isdecimal() or int(found.count) < 1:
        raise InvalidArgumentError(f"--num_processes {found.count}: expected how many processes to start, 1 or more.")
    return int(found.count), others


def _devices() -> int:
    """How many accelerators this process sees."""
    import torch

    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def _launched(count: int, name: str, words: list[str]) -> int:
    """The exit code of `accelerate launch` of the same program: one process for each GPU, or without one on the CPU.

    Ctrl-C reaches the launcher from the terminal; it ends its processes, and is waited for.
    """
    environment = os.environ | ({} if _devices() else {"ACCELERATE_USE_CPU": "true"})
    settings = {"num_processes": count, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0"]
    launcher += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    with subprocess.Popen([*launcher, "-m", "px_hf", name, *words], env=environment) as child:
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        try:
            return child.wait()
        except KeyboardInterrupt:
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:  # this process alone was told
                child.terminate()
            raise


def _help() -> str:
    width = max(map(len, PROGRAMS))
    return "\n".join(
        [
            "usage: px-hf COMMAND [--name value ...]",
            "",
            "Find sparse subnetworks in pretrained vision models, fine-tune them, publish them.",
            "",
            *(f"  {name:{width}}  {program.about}" for name, program in PROGRAMS.items()),
            "",
            "`px-hf COMMAND --help` shows the most used options, with examples. prune, evaluate, transfer and",
            "segment run on all GPUs there are, or as --num_processes N. For several machines and other settings",
            "of the launcher: accelerate launch ... -m px_hf COMMAND ...",
            "",
        ]
    )
