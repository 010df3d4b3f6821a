"""The wheel: built from the sources, installed beside the libraries that are here, used far from the repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import px_hf as px

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools writes into the sources."""
    sources = tmp_path_factory.mktemp("sources")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    shutil.copytree(ROOT / "px_hf", sources / "px_hf", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*build, "--wheel-dir", str(sources / "dist"), str(sources)], check=True, timeout=200)
    (found,) = (sources / "dist").glob("px_hf-*.whl")
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; the libraries are those that are here, so that nothing is downloaded."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True, timeout=100)
    python = folder / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", "--quiet"]
    subprocess.run([*install, str(wheel)], check=True, timeout=100)
    (packages,) = (folder / "venv" / "lib").glob("*/site-packages")
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    torch.manual_seed(0)
    ResNetForImageClassification(config).save_pretrained(folder / "backbone")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "backbone")
    return folder


def call(folder: Path, *words: str, expect: int = 0) -> str:
    """What `px-hf words` prints in that folder."""
    launched = {"WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "VIRTUAL_ENV"}
    env = {key: value for key, value in os.environ.items() if key not in launched}
    env |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    command = [str(folder / "venv" / "bin" / "px-hf"), *words]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + (done.stderr if expect else "")


def test_what_is_in_the_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "px_hf").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if ".dist-info/" not in name} == here
    assert wheel.stat().st_size < 8e6


def test_the_command_prunes_in_two_processes_and_inspects(elsewhere: Path) -> None:
    assert "usage: px-hf COMMAND" in call(elsewhere, "--help")
    assert "Did you mean prune" in call(elsewhere, "purne", expect=2)
    printed = call(
        elsewhere,
        *("prune", "--num_processes", "2", "--model_name_or_path", "backbone", "--output_dir", "out"),
        *("--max_train_samples", "100", "--max_eval_samples", "20", "--num_train_epochs", "1", "--rounds", "2"),
        *("--examples_per_class", "2", "--compare_dense", "false", "--disable_tqdm", "true", "--use_cpu"),
    )
    assert "prunable weights kept" in printed
    masks = px.Masks.from_pretrained(elsewhere / "out")
    assert not masks.revived(AutoModelForImageClassification.from_pretrained(elsewhere / "out"))
    told = json.loads(call(elsewhere, "inspect", "out", "--json"))
    assert (told["ok"], told["weights_kept"]) == (True, masks.kept)
    shutil.rmtree(elsewhere / "out" / "sparse")
    assert "Problem" in call(elsewhere, "inspect", "out", expect=1)


def test_the_embedded_models_are_there(elsewhere: Path) -> None:
    printed = call(elsewhere, "inspect", "demo-vit")
    assert "ViTForImageClassification" in printed
    assert str(elsewhere) in printed.replace("\n", "")


@pytest.mark.slow
def test_an_error_in_a_launched_process_is_an_error(elsewhere: Path) -> None:
    words = ["prune", "--num_processes", "2", "--sparsity", "2"]
    assert "sparsity" in call(elsewhere, *words, "--output_dir", "never", expect=1)
    assert not (elsewhere / "never").exists()
