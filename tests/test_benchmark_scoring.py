"""recipes/benchmarks/scoring.py with tiny networks, in a process of its own."""

from __future__ import annotations

import importlib
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


def test_the_picture_of_growth_leaves_out_what_was_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "recipes" / "benchmarks"))
    growth = importlib.import_module("growth")
    known = {"model": "ViT-Ti/16", "step": "select", "weights": 6_000_000, "seconds": 0.5, "bytes": 2e7}
    unknown = {"model": "ViT-H/16", "step": "select", "weights": 600_000_000, "left out": "needs 10 GB"}
    seen = [{**known, "images": count, "step": "score, Eq. 9"} for count in (2, 4)]
    results = {"weights": [known, unknown], "images": seen, "seen by": "ViT-Ti/16"}
    assert "| ViT-Ti/16 | 6 M |  |  | 0.50 s, 0.02 GB |" in growth.table(results)
    growth.draw(results, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(growth.process_memory, "available", lambda: 1000)
    assert "left out" in growth.measure("ViT-Ti/16", "select", str(tmp_path), 1, 64)


@pytest.mark.slow
def test_growth(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "growth.py"), "--quick"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output_dir", str(tmp_path)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "benchmark_growth.json").read_text())
    assert len(results["weights"]) == 12
    assert all(row["seconds"] > 0 for row in [*results["weights"], *results["images"]])
    small, large = (row for row in results["weights"] if row["step"] == "score, active")
    assert large["bytes"] > 2 * small["bytes"]
    assert not list(tmp_path.glob("tmp*"))
