"""ONNX files of every saved kind: run, compared, whole or absent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from networks import build, images, sizes
from torch import Tensor, nn
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

import px_hf as px
from px_hf.commands import export_onnx


def pictures(name: str, count: int) -> Tensor:
    return images(count) if sizes(name) == 8 else torch.rand(count, 3, 32, 32)


def run(path: Path, x: Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"pixel_values": x.numpy()})
    return found


@pytest.mark.parametrize("name", ["cnn", "hf vit", "hf resnet", "timm vit"])
def test_the_file_computes_the_same_at_any_batch_size(name: str, tmp_path: Path) -> None:
    model = build(name).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    found = px.export_onnx(model, tmp_path / "model.onnx", example=pictures(name, 1))
    assert model.training
    assert all(value.equal(state[key]) for key, value in model.state_dict().items())
    assert found.bytes == found.path.stat().st_size
    assert 0 <= found.difference < 1e-3
    model.eval()
    for count in (1, 5):
        x = pictures(name, count)
        with torch.no_grad():
            output = model(x)
        expected = getattr(output, "logits", output)
        np.testing.assert_allclose(run(found.path, x), expected.numpy(), rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def kinds() -> dict[str, Callable[[], nn.Module]]:
    config = TimmWrapperConfig(architecture="resnet10t", num_labels=5, model_args={})
    return {
        "hf": lambda: build("hf vit"),
        "timm": lambda: timm.create_model("resnet10t", num_classes=5),
        "TimmWrapper": lambda: TimmWrapperForImageClassification(config),
    }


@pytest.mark.parametrize("kind", ["hf", "timm", "TimmWrapper"])
def test_of_every_saved_kind(kind: str, tmp_path: Path) -> None:
    model = kinds()[kind]().eval()
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, scope="2:4", progress=False)
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path / "saved")
    loaded = px.from_pretrained(tmp_path / "saved")
    example = images(1) if kind == "hf" else torch.zeros(1, 3, 64, 64)
    found = px.export_onnx(loaded, tmp_path / "saved" / "model.onnx", example=example)
    assert found.difference < 1e-3
    assert (tmp_path / "saved" / "config.json").is_file()


def test_no_folder_of_this_machine_is_in_the_file(tmp_path: Path) -> None:
    found = px.export_onnx(build("hf vit"), tmp_path / "model.onnx", example=images(1))
    content = found.path.read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in content
    assert str(Path(__file__).parent).encode() not in content
    onnx.checker.check_model(str(found.path))


def test_half_precision(tmp_path: Path) -> None:
    found = px.export_onnx(build("hf vit").half(), tmp_path / "model.onnx")
    assert run(found.path, images(2, dtype=torch.float16)).dtype == np.float16


class Noisy(nn.Module):
    """Random, so that no file computes the same."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.rand(3)


class Branching(Noisy):
    """Looks at its data."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if float(x.sum()) > 0 else -self.layer(x)


X = torch.zeros(1, 4)


@pytest.mark.parametrize(
    ("model", "example", "error", "message"),
    [
        (build("hf resnet"), None, px.InvalidArgumentError, "names no image size"),
        (build("hf vit").bfloat16(), None, px.InvalidArgumentError, "bfloat16; ONNX export takes float32 or float16"),
        (nn.Linear(4, 3).to("meta"), X, px.InvalidArgumentError, "on meta"),
        (Noisy(), X, px.CheckpointError, "The exported Noisy gives other logits"),
        (Branching(), X, px.UnsupportedOpError, "cannot export Branching"),
    ],
)
def test_refusals_leave_nothing_behind(model, example, error, message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        px.export_onnx(model, tmp_path / "model.onnx", example=example)
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_only_if_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("mine")
    with pytest.raises(px.OutputExistsError, match="overwrite=True"):
        px.export_onnx(nn.Linear(4, 3), path, example=X)
    with pytest.raises(px.CheckpointError):
        px.export_onnx(Noisy(), path, example=X, overwrite=True)
    assert path.read_text() == "mine"
    px.export_onnx(nn.Linear(4, 3), path, example=X, overwrite=True)
    assert run(path, torch.zeros(2, 4)).shape == (2, 3)


def test_a_missing_library_is_named_before_any_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ImportError, match=r'needs onnxscript: pip install "px-hf\[export\]"'):
        px.export_onnx(nn.Linear(4, 3), tmp_path / "model.onnx", example=X)
    assert not list(tmp_path.iterdir())


def test_the_recipe(tmp_path: Path) -> None:
    model = build("hf resnet").eval()
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.9, progress=False)
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path / "one")
    words = ["--model_name_or_path", str(tmp_path / "one")]
    with pytest.raises(px.InvalidArgumentError, match="Nothing says which images"):
        export_onnx.main(words)
    with pytest.raises(px.CheckpointError, match=r"holds no config\.json"):
        export_onnx.main(["--model_name_or_path", str(tmp_path)])
    command = [sys.executable, str(Path(__file__).parents[1] / "recipes/export_onnx.py"), *words, "--image_size", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "MB" in done.stdout
    x = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        expected = model(x).logits.numpy()
    np.testing.assert_allclose(run(tmp_path / "one" / "model.onnx", x), expected, rtol=1e-3, atol=1e-4)
