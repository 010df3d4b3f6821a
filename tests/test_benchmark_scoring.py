"""recipes/benchmarks/scoring.py with tiny networks, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "scoring.py"), "--quick", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, "--output_dir", str(out), *arguments], env=environment, capture_output=True, text=True, timeout=280
    )


def test_times_and_phases(tmp_path: Path) -> None:
    done = run(tmp_path, "--models", "tiny ResNet", "tiny ViT", "--skip", "memory", "processes")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark_scoring.json").read_text())
    assert results["models"].keys() == {"tiny ResNet", "tiny ViT"}
    for found in results["models"].values():
        assert set(found["ratios"]["ratio"]) == {
            "Eq. 9, dense", "Eq. 9, 80% pruned", "active, dense", "active, 80% pruned",
        }  # fmt: skip
        assert min(found["ratios"]["ratio"].values()) > 1
        assert sum(found["phases"]["share"].values()) == pytest.approx(1)
        assert found["phases"]["share"]["scoring"] > 0
        assert found["keeping masks"]["added, time inside the hooks"] > 0
    assert "| tiny ViT | active, dense, in dense forwards |" in done.stdout
    assert (tmp_path / "benchmark_scoring.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_memory_and_processes(tmp_path: Path) -> None:
    done = run(tmp_path, "--models", "tiny ResNet", "--skip", "ratios", "phases", "keeping")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "benchmark_scoring.json").read_text())["models"]["tiny ResNet"]
    assert all(peak > 0 for peak in found["memory"]["peak"].values())
    assert [entry["numbers sent by each"] for entry in found["processes"].values()] == [0, 11]
