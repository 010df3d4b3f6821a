"""Which process is this, and how many are there?"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .errors import LaunchError, PxError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """This process's ``rank`` among ``world_size``."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def processes() -> Processes:
    """The processes that work together: those of ``torch.distributed``, or this one alone.

    Under a launcher (``WORLD_SIZE`` > 1) that nobody has connected to yet, Accelerate connects.

    Raises:
        LaunchError: the launcher started several processes but each believes to be the only one.
    """
    connected = dist.is_available() and dist.is_initialized()
    launched = dist.get_world_size() if connected else int(os.environ.get("WORLD_SIZE", "1") or 1)
    if launched == 1:
        return Processes()
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    # A process group that a program made without Accelerate is as good; one that Accelerate made while
    # believing to be alone (a launch on CPU that does not say so) is not.
    if not connected or PartialState._shared_state:
        state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
        if state.num_processes != launched:
            raise LaunchError(
                f"{launched} processes were launched but Accelerate sees {state.num_processes}: each would work alone "
                "and write the same files. On CPU run `ACCELERATE_USE_CPU=true torchrun --nproc_per_node N script.py` "
                "or `ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N script.py`; for one "
                "process, unset WORLD_SIZE."
            )
    return Processes(dist.get_rank(), dist.get_world_size())


def same_everywhere(digest: bytes, model: nn.Module) -> bool:
    """Whether all processes call this with the same digest. The model's device is that of the collective."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    mine = torch.tensor(list(digest), dtype=torch.int64, device=device)
    highest, lowest = mine.clone(), mine.clone()
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN)
    return bool(torch.equal(highest, lowest))


@contextmanager
def in_contact(when: str) -> Iterator[None]:
    """What torch says where another process has gone, as an error that says what happened ``when`` and what to do.

    Raises:
        LaunchError: a collective failed inside.
    """
    try:
        yield
    except PxError:
        raise
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
        if not lost or not dist.is_initialized() or dist.get_world_size() == 1:
            raise
        raise LaunchError(
            f"process {dist.get_rank()} of {dist.get_world_size()} lost contact with another one {when}: that one has "
            "ended, by an error or because it was killed (out of memory?), or can no longer be reached. What it has "
            "written last says why. Nothing was written here, and the model is as it was: start all processes again. "
            f"(torch: {str(error).splitlines()[0]})"
        ) from error


_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer", "NCCL error", "Timed out waiting")
"""In the messages of backends that raise a plain RuntimeError."""


def raise_together(problem: PxError | None) -> None:
    """Raise on every process the first error that any of them has met, so that none waits for another in vain."""
    if processes().world_size > 1:
        from accelerate.utils import gather_object

        problem = next((error for error in gather_object([problem]) if error is not None), None)
    if problem is not None:
        raise problem


def on_main(function: Callable[[], Result]) -> Result:
    """What `function` returns on the main process, on every process; it runs on the main process alone.

    A `PxError` that it raises there is raised everywhere, so that no process waits for another in vain; of any other
    error the others are told by a `LaunchError`.
    """
    group = processes()
    if group.world_size == 1:
        return function()
    from accelerate.utils import broadcast_object_list

    told: list[Result | PxError | None] = [None]
    if group.is_main:
        try:
            told = [function()]
        except PxError as error:
            told = [error]
        except Exception as error:
            broadcast_object_list([LaunchError(f"the main process failed: {type(error).__name__}: {error}")])
            raise
    broadcast_object_list(told)
    if isinstance(told[0], PxError):
        raise told[0]
    return told[0]  # type: ignore[return-value]
