"""Scoring, masks and training on a GPU; the same on the CPU, so that only the device is missing elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import build, images, sizes
from torch import nn

import px_hf as px

ROOT = Path(__file__).parent.parent
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
CRITERIA = {
    "px": px.PX(),
    "px-active": px.PX("active", power=0.25),
    "lamp": px.LAMP(),
    "snip": px.SNIP(),
    "wanda": px.Wanda(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
@pytest.mark.parametrize("name", ["hf vit", "hf resnet"])
def test_masks_are_those_of_the_cpu(name: str, criterion: px.Criterion, device: str) -> None:
    """But for scores at the border that differ in their last bits."""
    batch = nn.functional.interpolate(images(4), size=sizes(name)), torch.arange(4)
    expected = px.prune(build(name), [batch], criterion, sparsity=0.7, rounds=2, progress=False)
    model = build(name).to(device)
    masks = px.prune(model, [batch], criterion, sparsity=0.7, rounds=2, progress=False)
    assert masks.kept == expected.kept
    same = sum(int((masks.tensors[n] == mask).count_nonzero()) for n, mask in expected.tensors.items())
    assert same == expected.total if device == "cpu" else same > 0.999 * expected.total
    masks.apply_(model)
    assert not masks.revived(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_zeros_stay_in_training(device: str, dtype: torch.dtype) -> None:
    model = build("hf vit").to(device, dtype)
    masks = px.prune(model, [images(2)], px.PX(), sparsity=0.7, rounds=2, progress=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=device == "cuda")
    with px.keep_masks(optimizer, model, masks):
        for step in range(3):
            logits = model(images(4, seed=step).to(device, dtype)).logits.float()
            nn.functional.cross_entropy(logits, torch.arange(4, device=device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not masks.revived(model)


@pytest.mark.parametrize("device", DEVICES)
def test_the_benchmark_goes_through_every_row(device: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / "gpu.py"), "--quick", "--device", device]
    blocked = "import sys; sys.modules['datasets'] = sys.modules['evaluate'] = None"
    (tmp_path / "sitecustomize.py").write_text(blocked + "\n")  # a machine with a GPU may have neither
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command += ["--models", "tiny ViT", "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "out" / "benchmark_gpu.json").read_text())["rows"]
    assert len(rows) == 2 * 3 + 3
    missing = {row["what"]: row["not measured"] for row in rows if "found" not in row}
    if device == "cpu":
        assert list(missing) == ["CUDA fp16", "CUDA fp16, 2:4", "CUDA fp16, torch.compile"]
        assert set(missing.values()) == {"Unavailable: torch finds no GPU, which this row is about"}
    else:  # layers this small may be none for the kernels, and a compiler may be missing
        assert "CUDA fp16" not in missing
    found = {row["what"]: row["found"] for row in rows if "found" in row}
    for dtype in ("float32", "bfloat16"):
        assert min(found[f"scoring, {dtype}"]["ratio"].values()) > 0
        assert found[f"masks, {dtype}"]["LAMP"]["as on the CPU"] == 1
        assert "added, end to end" in found[f"keep_masks, {dtype}"]
    assert "| tiny ViT | masks, float32, Eq. 9: as on the CPU | 1 |" in (tmp_path / "out/benchmark_gpu.md").read_text()
