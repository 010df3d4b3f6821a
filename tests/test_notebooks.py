"""notebooks/: their code runs from the first cell to the last, with the demo ResNet and pictures made here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
DEMO = Path(__file__).parents[1] / "px_hf" / "demo" / "resnet"
PARAMETERS = {
    "prune_your_folder": f"MODEL, PHOTOS, OUT = {str(DEMO)!r}, 'photos', 'sparse'\nSPARSITY, EPOCHS = 0.8, 8",
    "prune_once_transfer": f"MODEL = {str(DEMO)!r}\nTASKS, SPARSITY, EPOCHS = dict(a='photos', b='flowers'), 0.7, 1",
    "publish": "FOLDER, REPOSITORY, DRY_RUN = 'sparse', 'me/sparse', True",
}
"""Instead of the cell tagged so. The last one publishes what the first one saved."""


def cells(name: str, kind: str) -> list[dict[str, object]]:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def program(name: str) -> str:
    parts = []
    for cell in cells(name, "code"):
        own = "parameters" in cell["metadata"].get("tags", [])  # type: ignore[attr-defined]
        parts.append(PARAMETERS[name] if own else "".join(cell["source"]))  # type: ignore[arg-type]
    return "\n\n".join(parts)


def test_every_notebook_is_run_and_holds_no_output() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(PARAMETERS)
    for name in PARAMETERS:
        assert sum("parameters" in cell["metadata"].get("tags", []) for cell in cells(name, "code")) == 1  # type: ignore[attr-defined]
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(name, "code"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of two classes, bright and dark, twice."""
    folder = tmp_path_factory.mktemp("notebooks")
    generator = np.random.default_rng(0)
    for task in ("photos", "flowers"):
        for label, level in (("bright", 200), ("dark", 50)):
            (folder / task / label).mkdir(parents=True)
            for k in range(20):
                values = generator.normal(level, 20, (12, 12, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(values).save(folder / task / label / f"{k}.png")
    return folder


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_code_runs(name: str, folder: Path) -> None:
    """In the order of the parameters: the last one needs what the first has saved."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program(name)], cwd=folder, env=env, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    if name == "prune_your_folder":
        assert "80.0% of the prunable weights are zero: all hold" in done.stdout
    if name == "publish":
        assert "80.0% sparse no problems" in done.stdout
