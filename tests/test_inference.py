"""The inference benchmark on tiny models: its rows, its ratios, what does not run, its files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import inference
import inference_runtimes
import pytest
import sparse_cpu
import torch
from networks import build
from PIL import Image
from torch import nn

import px_hf as px

QUICK = ["--rounds", "2", "--threads", "1", "--clock", "cpu", "--image_size", "8"]


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    """A dense model as transformers saves it, and a pruned one that names it as its base."""
    model = build("hf vit").eval()
    model.save_pretrained(tmp_path / "dense")
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.75, scope="layer", progress=False)
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path / "pruned", provenance={"base_model": str(tmp_path / "dense")})
    return tmp_path / "dense", tmp_path / "pruned"


def test_rows_ratios_and_files(models: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--model_name_or_path", str(models[1]), "--prune", "2:4=0.5", "--batch_sizes", "1", "3"]
    names = ["eager", "eager, CSR", "ONNX Runtime", "CUDA fp16"]
    inference.main([*words, *QUICK, "--no_memory", "--runtimes", *names, "--output_dir", str(out)])
    found = json.loads((out / "inference.json").read_text())
    labels = ["dense", "2:4 50 %", "pruned"]
    assert [model["model"] for model in found["models"]] == labels
    dense, two_four, pruned = found["models"]
    assert dense["macs"] == two_four["macs"] == pruned["macs"] == dense["effective_macs"]
    assert pruned["effective_macs"] < two_four["effective_macs"] < dense["macs"]
    assert dense["sparsity"] < 0.01
    for runtime in ("eager", "ONNX Runtime"):
        rows = [row for row in found["rows"] if row["runtime"] == runtime]
        assert [(row["batch_size"], row["model"]) for row in rows] == [(n, label) for n in (1, 3) for label in labels]
        for row in rows:
            assert row["milliseconds"] > 0
            assert row["images_per_second"] * row["milliseconds"] == pytest.approx(1000 * row["batch_size"])
            assert row["of_dense"] == 1 if row["model"] == "dense" else 0.1 < row["of_dense"] < 10
    assert "smaller than" in found["not_run"]["eager, CSR, pruned"]  # tiny layers gain nothing
    if not torch.cuda.is_available():
        assert found["not_run"]["CUDA fp16, dense"] == "torch finds no GPU"
    with Image.open(out / "inference.png") as picture:
        low, high = picture.convert("L").getextrema()
        assert low < 100 < high


def test_peak_memory_in_a_process_of_its_own(models: tuple[Path, Path]) -> None:
    row = {"runtime": "eager", "batch_size": 2}
    found = inference.peak_of(row, str(models[0]), QUICK)
    assert found is None if not Path("/proc/self/clear_refs").exists() else 0 < found < 1000


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--rounds", "0"], px.InvalidArgumentError, "--rounds is 0"),
        (["--batch_sizes", "0"], px.InvalidArgumentError, "--batch_sizes has 0"),
        (["--architecture", "vit_huge_of_nobody"], px.InvalidArgumentError, "is no model of timm"),
        (["--prune", "2:4"], px.InvalidArgumentError, "sparsity"),
        (["--prune", "global=much"], px.InvalidArgumentError, "expected scope=sparsity"),
        (["--prune", "2:4=0.3"], px.InvalidArgumentError, "less than scope='2:4' prunes"),
        (["--model_name_or_path", "./no/such"], px.CheckpointError, "no/such"),
    ],
)
def test_bad_arguments(words: list[str], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        inference.main([*words, "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_parent_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(px.InvalidArgumentError, match="--dense_model_name_or_path"):
        inference.main(["--model_name_or_path", str(models[0]), "--output_dir", str(tmp_path / "out")])


def test_a_runtime_that_fails_says_why() -> None:
    class Broken(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no such thing\nas this")

    with pytest.raises(inference_runtimes.Unavailable, match=r"^ValueError: no such thing$"):
        inference_runtimes.prepare("eager", Broken(), torch.zeros(1, 3, 8, 8))


def test_the_sparse_kernels_are_compared_to_the_same_results(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_cpu, "LINEAR", ((8, 16),))
    monkeypatch.setattr(sparse_cpu, "CONVOLUTIONS", ((8, 3, 5),))
    monkeypatch.setattr(sparse_cpu, "BLOCK", 2)
    monkeypatch.setattr(sys, "argv", ["sparse_cpu.py", "--rounds", "1", "--sparsities", "0.9", "0.98"])
    sparse_cpu.main()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| 8 × 16 |")]) == 2 * (5 + 2)
    assert len([line for line in lines if line.startswith("| 8, 3 × 3, 5 × 5 |")]) == 2
    assert all(line.count("|") == 7 for line in lines if line)


def test_without_onnx_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    with pytest.raises(inference_runtimes.Unavailable, match="DependencyError: ONNX export needs onnxruntime"):
        inference_runtimes.prepare("ONNX Runtime", nn.Linear(2, 2), torch.zeros(1, 2))


def test_models_are_told_apart(tmp_path: Path) -> None:
    args = inference.parse(["--dense_model_name_or_path", "d", "--model_name_or_path", "a/x", "b/x"])
    assert inference.subjects(args, tmp_path) == {"dense": "d", "x": "a/x", "b/x": "b/x"}
    args.model_name_or_path = ["b/x", "x", "x"]
    with pytest.raises(px.InvalidArgumentError, match="names x twice"):
        inference.subjects(args, tmp_path)
