"""Which processes work together. Whole launches are in test_processes.py."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from px_hf.distributed import Processes, processes

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_USE_CPU")


@pytest.mark.parametrize("world_size", [None, "", "1"])
def test_alone(world_size: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    if world_size is not None:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    assert processes() == Processes(rank=0, world_size=1)
    assert processes().is_main


def test_a_process_group_of_one() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert processes() == Processes(rank=0, world_size=1)
    finally:
        dist.destroy_process_group()


def test_only_rank_0_is_the_main_one() -> None:
    assert [Processes(rank, 3).is_main for rank in range(3)] == [True, False, False]


def test_a_world_size_set_by_hand_is_an_error() -> None:
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    done = subprocess.run(
        [sys.executable, "-c", "from px_hf.distributed import processes; print(processes())"],
        env={**env, "WORLD_SIZE": "2", "RANK": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "LaunchError: 2 processes were launched but Accelerate sees 1" in done.stderr
    assert "for one process, unset WORLD_SIZE" in done.stderr
