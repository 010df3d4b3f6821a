"""Weights on a grid of 8 bits: what rounding does, and the compact copy that holds codes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import compact_oracle
import pytest
import torch
from test_compact import forge, read, same
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import px_hf as px
from px_hf.compact import CompactFile, write_compact

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                       patch_size=8, num_labels=3)  # fmt: skip
    return ViTForImageClassification(config).eval()


def pruned(sparsity: float = 0.5) -> tuple[nn.Module, px.Masks]:
    model = vit()
    masks = px.prune(model, [X], px.Magnitude(), sparsity=sparsity, progress=False)
    masks.apply_(model)
    return model, masks


def version(folder: Path) -> int:
    found: int = json.loads((folder / "config.json").read_text())["quantization_config"]["version"]
    return found


# -------------------------------------------------------------------------------------------------------- rounding


def nearest(row: list[float]) -> list[float]:
    """Of one row, slowly: what is nearest among all 255 multiples of a scale of 16 significant bits."""
    largest = max(abs(w) for w in row)
    if largest == 0:
        return row
    fraction, exponent = math.frexp(largest / 127)
    scale = round(fraction * 2**16) / 2**16 * 2.0**exponent
    return [min((code * scale for code in range(-127, 128)), key=lambda w: abs(w - value)) for value in row]


@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("layer", [nn.Linear(9, 5), nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose1d(3, 4, 2)])
def test_every_weight_becomes_the_nearest_multiple(layer: nn.Module, size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(layer.weight.shape, generator=generator) * size
    weight.view(-1)[::3] = 0
    weight[-1] = 0
    layer.weight.data.copy_(weight)
    bias = layer.bias.clone()
    errors = px.round_to_int8_(nn.Sequential(layer))
    expected = torch.tensor([nearest(row) for row in weight.reshape(len(weight), -1).double().tolist()])
    found = layer.weight.detach().reshape(len(weight), -1)
    torch.testing.assert_close(found.double(), expected.double(), rtol=2e-5, atol=0)
    assert not found[:, :][(weight == 0).reshape(found.shape)].any()
    assert torch.equal(layer.bias, bias)
    difference = (found.double() - weight.reshape(found.shape).double()).norm() / weight.double().norm()
    assert errors == {"0.weight": pytest.approx(float(difference))}
    assert 0 < errors["0.weight"] < 0.02


def test_rounding_again_changes_nothing_and_logits_hardly_move() -> None:
    model, masks = pruned()
    before = model(X).logits
    px.round_to_int8_(model)
    torch.testing.assert_close(model(X).logits, before, atol=0.02, rtol=0)
    assert not torch.equal(model(X).logits, before)
    assert masks.revived(model) == {}
    assert set(px.round_to_int8_(model).values()) == {0.0}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda model: model.bfloat16(), px.TargetError, r"float32, and 13 are of another dtype.*model.float\(\)"),
        (lambda model: model.classifier.weight.data.fill_(math.nan), px.NonFiniteError, "classifier.weight"),
    ],
)
def test_what_cannot_be_rounded_is_left_alone(change: Any, error: type[Exception], message: str) -> None:
    model = vit()
    change(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(error, match=message):
        px.round_to_int8_(model)
    assert all(same(p.detach(), before[name].detach()) for name, p in model.named_parameters())


def test_a_model_without_layers_is_an_error() -> None:
    with pytest.raises(px.TargetError, match="no prunable weights"):
        px.round_to_int8_(nn.BatchNorm2d(3))


# -------------------------------------------------------------------------------------------------------- the format


def state_on_the_grid() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    layers = nn.ModuleDict({"a": nn.Linear(40, 7), "b": nn.Conv2d(3, 8, 3), "c": nn.Linear(30, 20)})
    masks = {}
    for name, layer in layers.items():
        layer.weight.data.normal_(generator=generator)
        masks[f"{name}.weight"] = torch.rand(layer.weight.shape, generator=generator) > 0.6
        layer.weight.data[~masks[f"{name}.weight"]] = 0
    masks["a.weight"][2] = False  # a row of which nothing is kept
    layers["a"].weight.data[2] = 0
    px.round_to_int8_(layers)
    del masks["c.weight"]  # a whole tensor
    return {name: p.detach() for name, p in layers.state_dict().items()}, masks


@pytest.mark.parametrize("max_shard_size", ["1GB", 300], ids=["one file", "shards"])
def test_codes_give_back_every_bit_here_and_in_another_reader(max_shard_size: int | str, tmp_path: Path) -> None:
    state, masks = state_on_the_grid()
    assert write_compact(state, masks, tmp_path, max_shard_size=max_shard_size) == 2
    file = CompactFile.open(tmp_path)
    assert set(file.coded) == {"a.weight", "b.weight", "c.weight"}
    assert set(file.pruned) == {"a.weight", "b.weight"}
    tensors, found = read(tmp_path)
    assert found == px.Masks(masks)
    assert tensors.keys() == state.keys()
    assert all(same(tensors[name], tensor) for name, tensor in state.items())
    others, flat = compact_oracle.read(tmp_path)
    assert {name: bytes(state[name].reshape(-1).view(torch.uint8).numpy()) for name in state} == {
        name: content for name, (_, _, content) in others.items()
    }
    assert {name: mask.reshape(-1).tolist() for name, mask in masks.items()} == flat


@pytest.mark.parametrize("change", ["off the grid", "-0.0", "nan", "bfloat16", "a vector", "too few in a row"])
def test_what_codes_cannot_give_back_is_stored_as_it_is(change: str, tmp_path: Path) -> None:
    layer = nn.Linear(40, 7, bias=False)
    px.round_to_int8_(layer)
    weight = layer.weight.detach().clone()
    mask = torch.ones_like(weight, dtype=torch.bool)
    if change == "off the grid":
        weight[3, 3] += weight[3].abs().max() / 1000
    elif change in ("-0.0", "nan"):
        weight[3, 3] = float(change)
    elif change == "bfloat16":
        weight = weight.bfloat16()
    elif change == "a vector":
        weight, mask = weight[0], mask[0]
    else:
        mask[:, 1:] = False
        weight[:, 1:] = 0
    assert write_compact({"w": weight}, {"w": mask}, tmp_path) == 1
    tensors, _ = read(tmp_path)
    assert same(tensors["w"], weight)


SCALED = {
    "w:px_values": torch.tensor([1, -2, 3], dtype=torch.int8),
    "w:px_mask": torch.frombuffer(bytearray(b"\x46"), dtype=torch.uint8),
    "w:px_scales": torch.tensor([0.5, 2.0]),
}
ABOUT = {"w:px_mask": {"coding": "bits", "shape": [2, 4]}, "w:px_scales": {"shape": [2, 4]}}
WHOLE = {"w:px_values": torch.arange(6, dtype=torch.int8), "w:px_scales": torch.tensor([0.5, 2.0])}
THREE = {"w:px_scales": {"shape": [2, 3]}}


def test_the_examples_of_the_specification(tmp_path: Path) -> None:
    forge(tmp_path, SCALED, ABOUT, metadata={"version": 2})
    assert read(tmp_path)[0]["w"].tolist() == [[0, 0.5, -1, 0], [0, 0, 6, 0]]
    forge(tmp_path, WHOLE, THREE, metadata={"version": 2})
    file = CompactFile.open(tmp_path)
    assert file.tensor("w").tolist() == [[0, 0.5, 1], [6, 8, 10]]
    assert file.masks() == {}


@pytest.mark.parametrize(
    ("tensors", "about", "message"),
    [
        ({**SCALED, "w": torch.ones(2, 4)}, ABOUT, "both whole and pruned"),
        ({name: SCALED[name] for name in ("w:px_mask", "w:px_scales")}, ABOUT, "without its counterpart"),
        ({"w:px_scales": SCALED["w:px_scales"]}, ABOUT, "without its counterpart"),
        ({**SCALED, "w:px_values": torch.ones(3)}, ABOUT, "its values are not one dimension of I8"),
        ({**SCALED, "w:px_scales": torch.ones(2).double()}, ABOUT, "its scales are not one dimension of F32"),
        ({**SCALED, "w:px_scales": torch.ones(2, 1)}, ABOUT, "its scales are not one dimension"),
        ({**SCALED, "w:px_scales": torch.ones(3)}, ABOUT, "its scales are of other rows"),
        (SCALED, {**ABOUT, "w:px_scales": {"shape": [4, 2]}}, "its scales are of other rows"),
        (SCALED, {**ABOUT, "w:px_scales": {}}, "its metadata says"),
        (SCALED, {**ABOUT, "w:px_scales": {"shape": [2, -4]}}, "its metadata says"),
        ({**SCALED, "w:px_scales": torch.tensor([0.1, 1.0])}, ABOUT, "its scales are not finite"),
        ({**SCALED, "w:px_scales": torch.tensor([-1.0, 1.0])}, ABOUT, "its scales are not finite"),
        ({**SCALED, "w:px_scales": torch.tensor([math.inf, 1.0])}, ABOUT, "its scales are not finite"),
        ({**SCALED, "w:px_values": SCALED["w:px_values"][:2]}, ABOUT, "do not agree"),
        ({**WHOLE, "w:px_values": WHOLE["w:px_values"][:5]}, THREE, "another number of values"),
        (WHOLE, {"w:px_scales": {"shape": [2]}}, "its scales are not one dimension"),
    ],
)  # fmt: skip
def test_hostile_codes_are_refused(
    tensors: dict[str, Tensor], about: dict[str, Any], message: str, tmp_path: Path
) -> None:
    forge(tmp_path, tensors, about, metadata={"version": 2})
    with pytest.raises(px.CheckpointError, match=message):
        read(tmp_path)
    with pytest.raises(Exception):  # noqa: B017 - of whatever kind
        compact_oracle.read(tmp_path)


def test_codes_in_the_first_version_are_refused(tmp_path: Path) -> None:
    forge(tmp_path, SCALED, ABOUT)
    with pytest.raises(px.CheckpointError, match="as codes, and is said to be of format version 1"):
        CompactFile.open(tmp_path)
    with pytest.raises(AssertionError):
        compact_oracle.read(tmp_path)


def test_a_changed_byte_is_refused(tmp_path: Path) -> None:
    forge(tmp_path, SCALED, ABOUT, metadata={"version": 2})
    file = tmp_path / "model.safetensors"
    content = file.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    for place in range(data, len(content)):
        file.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(px.CheckpointError, match=r"CRC-32|scales|do not agree"):
            read(tmp_path)


# ------------------------------------------------------------------------------------------------- saved and loaded


@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_rounded_model_is_saved_in_a_byte_a_weight_and_loaded_by_all(sparsity: float, tmp_path: Path) -> None:
    model, masks = pruned(sparsity)
    px.save_pretrained(model, masks, tmp_path / "plain")
    px.round_to_int8_(model)
    px.save_pretrained(model, masks, tmp_path / "rounded")
    assert (version(tmp_path / "plain/sparse"), version(tmp_path / "rounded/sparse")) == (1, 2)
    size = {name: (tmp_path / name / "sparse/model.safetensors").stat().st_size for name in ("plain", "rounded")}
    head = model.classifier.weight
    rows = sum(4 * len(mask) for mask in masks.values()) + 4 * len(head)
    assert size["plain"] - size["rounded"] == pytest.approx(3 * (masks.kept + head.numel()) - rows, abs=3000)
    for found in (
        px.from_pretrained(tmp_path / "rounded"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "rounded"),
        AutoModelForImageClassification.from_pretrained(tmp_path / "rounded", subfolder="sparse"),
    ):
        assert all(same(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert px.Masks.from_pretrained(tmp_path / "rounded") == masks
    inspected = px.inspect(tmp_path / "rounded")
    assert not inspected.problems
    px.save_pretrained(px.from_pretrained(tmp_path / "rounded"), masks, tmp_path / "again")
    name = "sparse/model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "rounded" / name).read_bytes()


def test_training_takes_weights_off_the_grid(tmp_path: Path) -> None:
    model, masks = pruned()
    px.round_to_int8_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    px.keep_masks(optimizer, model, masks)
    model(X, labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    px.save_pretrained(model, masks, tmp_path / "out")
    assert version(tmp_path / "out/sparse") == 1


def test_stock_saving_over_a_rounded_model_is_noticed(tmp_path: Path) -> None:
    model, masks = pruned()
    px.round_to_int8_(model)
    px.save_pretrained(model, masks, tmp_path)
    model.classifier.bias.data += 1
    model.save_pretrained(tmp_path)
    with pytest.raises(px.CheckpointError, match="not the same"):
        px.from_pretrained(tmp_path)
