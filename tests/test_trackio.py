"""trackio as it is, on this machine: `--report_to trackio` is told of the masks by the step."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipe import PLAIN, environment, settings

pytest.importorskip("trackio")

READ = """
import json
from trackio.sqlite_storage import SQLiteStorage
told = {run: SQLiteStorage.get_logs(project, run)
        for project in SQLiteStorage.get_projects() for run in SQLiteStorage.get_runs(project)}
print(json.dumps(told, default=str))
"""


def test_a_run_tells_sparsity_densities_and_rounds(folder: Path) -> None:
    words = settings(folder, "tracked", "--report_to", "trackio", "--logging_steps", "2", "--num_train_epochs", "2")
    words += ["--schedule", "gradual", "--sparsity", "0.8", "--compare_dense", "true"]
    known = environment(folder, TRACKIO_DIR=str(folder / "trackio"))
    for command in (PLAIN + words, [sys.executable, "-c", READ]):
        done = subprocess.run(command, env=known, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told.keys() == {"tracked", "tracked-dense"}
    of_training = [logs for logs in told["tracked"] if "train/loss" in logs]
    sparsities = [logs["train/sparsity"] for logs in of_training]
    assert sparsities == sorted(sparsities)
    assert sparsities[-1] == pytest.approx(0.8, abs=1e-3)
    assert [logs["train/pruning_round"] for logs in of_training][-1] == 3
    assert all(0 <= logs["train/layer_density_min"] <= logs["train/layer_density_max"] <= 1 for logs in of_training)
    assert any("eval/accuracy" in logs for logs in told["tracked"])
    assert not any("train/sparsity" in logs for logs in told["tracked-dense"])
