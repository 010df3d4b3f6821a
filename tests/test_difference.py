"""The difference to a base model: back to the bit, small, refused to another base, and damaged files refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import HubServer
from networks import build
from safetensors.torch import load_file, save_file
from test_finetune import batch, train, vit
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import px_hf as px
from px_hf.tickets.difference import ABOUT_FILE, DIFFERENCE_FILE


def tuned(base: nn.Module) -> tuple[nn.Module, px.Masks]:
    model = copy.deepcopy(base)
    ticket = px.select_trainable(model, [], px.Magnitude(), fraction=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with px.tune_only(optimizer, model, ticket):
        train(model, optimizer)
    return model, ticket


def same(a: nn.Module, b: nn.Module) -> bool:
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        value.dtype == states[1][name].dtype
        and torch.equal(value.reshape(-1).view(torch.uint8), states[1][name].reshape(-1).view(torch.uint8))
        for name, value in states[0].items()
    )


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path, Path]:
    """A tuned model, the folder of its base, and that of the difference."""
    vit().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model, _ = tuned(base)
    px.save_difference(model, base, tmp_path / "out")
    return model, tmp_path / "base", tmp_path / "out"


def test_it_is_small_and_comes_back_to_the_bit(saved: tuple[nn.Module, Path, Path]) -> None:
    model, base, out = saved
    assert (out / DIFFERENCE_FILE).stat().st_size < 0.5 * (base / "model.safetensors").stat().st_size
    assert same(px.from_pretrained(out), model)
    again = AutoModelForImageClassification.from_pretrained(base)
    px.apply_difference_(again, out)
    assert same(again, model)
    stored = load_file(out / DIFFERENCE_FILE)
    assert "vit.layernorm.weight" not in stored
    assert "classifier.weight" in stored


def test_a_new_head_of_other_classes(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    start = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base", num_labels=7, id2label={i: f"class {i}" for i in range(7)}, ignore_mismatched_sizes=True
    )
    model, _ = tuned(start)
    px.save_difference(model, base, tmp_path / "out")
    found = px.from_pretrained(tmp_path / "out")
    assert same(found, model)
    assert found.config.id2label[6] == "class 6"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_and_signs_of_zero(tmp_path: Path, dtype: torch.dtype) -> None:
    base = vit().to(dtype)
    model = copy.deepcopy(base)
    with torch.no_grad():
        base.vit.layernorm.bias.zero_()
        model.vit.layernorm.bias.zero_()[3] = -0.0
        model.vit.layernorm.weight[2] = float("nan")
    px.save_difference(model, base, tmp_path)
    px.apply_difference_(base, tmp_path)
    assert same(base, model)


def test_buffers_and_timm_models(tmp_path: Path) -> None:
    base = build("timm resnet")
    model = copy.deepcopy(base).train()
    model(torch.randn(4, 3, 32, 32))  # statistics of BatchNorm alone
    px.save_difference(model, base, tmp_path)
    px.apply_difference_(base, tmp_path)
    assert same(base, model)


def test_another_base_is_refused_and_left_alone(saved: tuple[nn.Module, Path, Path]) -> None:
    model, folder, out = saved
    base = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        base.vit.layernorm.bias[0] += 1
    before = copy.deepcopy(base)
    for wrong, match in (
        (base, "another base model"),
        (vit().bfloat16(), "shape or dtype"),
        (build("cnn"), "cnn|as it is"),
    ):
        with pytest.raises(px.CheckpointError, match=match):
            px.apply_difference_(wrong, out)
    assert same(base, before)
    base.save_pretrained(folder)
    with pytest.raises(px.CheckpointError, match="another base model"):
        px.from_pretrained(out)
    with pytest.raises(px.CheckpointError, match="another base model"):
        px.apply_difference_(model, out)  # twice


def write(out: Path, change: Any) -> None:
    from safetensors import safe_open

    with safe_open(out / DIFFERENCE_FILE, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(out / DIFFERENCE_FILE)
    change(tensors, metadata)
    save_file(tensors, out / DIFFERENCE_FILE, metadata=metadata)


def first(tensors: dict[str, Tensor], ending: str) -> str:
    return next(name for name in sorted(tensors) if name.endswith(ending))


def shorter(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = first(tensors, ":px_values")
    tensors[name] = tensors[name][:-1].clone()


def other_values(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors[first(tensors, ":px_values")] += 1


def other_shape(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    metadata["px_sparse"] = metadata["px_sparse"].replace("[16,16]", "[16,1048576]", 1)


def other_dtype(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    name = first(tensors, ":px_values")
    tensors[name] = tensors[name].half()


def extra(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors["vit.other"] = torch.zeros(2)


@pytest.mark.parametrize("change", [shorter, other_values, other_shape, other_dtype, extra])
def test_a_damaged_file_is_refused(saved: tuple[nn.Module, Path, Path], change: Any) -> None:
    _, base, out = saved
    write(out, change)
    model = AutoModelForImageClassification.from_pretrained(base)
    before = copy.deepcopy(model)
    with pytest.raises(px.CheckpointError):
        px.apply_difference_(model, out)
    assert same(model, before)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 2}', '{"version": true, "base_sha256": "", "base_model": 3, "base_revision": null}'],
)
def test_a_damaged_description_is_refused(saved: tuple[nn.Module, Path, Path], text: str) -> None:
    model, _, out = saved
    (out / ABOUT_FILE).write_text(text)
    with pytest.raises(px.CheckpointError):
        px.from_pretrained(out)
    with pytest.raises(px.CheckpointError):
        px.apply_difference_(model, out)


def test_bad_input(saved: tuple[nn.Module, Path, Path], tmp_path: Path) -> None:
    model, folder, out = saved
    base = AutoModelForImageClassification.from_pretrained(folder)
    with pytest.raises(px.TargetError, match="not one weight differs"):
        px.save_difference(base, copy.deepcopy(base), tmp_path / "none")
    with pytest.raises(px.OutputExistsError, match="already holds"):
        px.save_difference(model, base, out)
    px.save_difference(model, base, out, overwrite=True)
    with pytest.raises(px.CheckpointError, match="holds no difference"):
        px.apply_difference_(base, folder)
    about = json.loads((out / ABOUT_FILE).read_text())
    (out / ABOUT_FILE).write_text(json.dumps({**about, "base_model": None}))
    with pytest.raises(px.InvalidArgumentError, match="apply_difference_"):
        px.from_pretrained(out)
    (out / ABOUT_FILE).write_text(json.dumps({**about, "base_model": str(tmp_path / "gone")}))
    with pytest.raises(px.CheckpointError, match="cannot be loaded"):
        px.from_pretrained(out)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4
def test_from_the_hub(hub: HubServer, tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    model, _ = tuned(base)
    px.push_difference(model, base, "alice/digits", base_model=str(tmp_path / "base"), token="hf_alice")
    assert same(px.from_pretrained("alice/digits"), model)
    assert model(**batch()).logits.shape == (8, 3)
