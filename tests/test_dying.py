"""A process that dies in a round: the others end with a clear error, and nothing is written."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_processes import HERE, environment

from px_hf.distributed import in_contact


def started(processes: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Without torchrun, which ends all when one has failed: as on several machines, or under another launcher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "dying_process.py"), *arguments],
            env=environment(**env, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


@pytest.mark.parametrize(
    ("processes", "how", "paths"),
    [
        (2, "killed", "active"),
        pytest.param(3, "killed", "all", marks=pytest.mark.slow),
        pytest.param(3, "raises", "active", marks=pytest.mark.slow),
    ],
)
def test_the_others_end_within_a_minute_and_say_why(processes: int, how: str, paths: str, tmp_path: Path) -> None:
    group = started(processes, str(tmp_path), how, paths)
    try:
        group[1].communicate(timeout=200)
        since = time.monotonic()
        for rank in {*range(processes)} - {1}:
            _, said = group[rank].communicate(timeout=60)
            assert time.monotonic() - since < 60
            assert group[rank].returncode == 1
            assert f"LaunchError: process {rank} of {processes} lost contact with another one in round 2 of 4" in said
            assert "start all processes again" in said
    finally:
        for process in group:
            process.kill()
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(RuntimeError, match=r"^Connection closed by peer$"), in_contact("alone"):
        raise RuntimeError("Connection closed by peer")
