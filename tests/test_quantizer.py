"""Stock transformers loads the compact copy once px_hf is imported: whole, exact, or not at all."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from compact_oracle import read as oracle
from safetensors.torch import load_file, save_file
from test_hub import MODELS, contents, logits, pruned, timm_resnet, vit
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import px_hf as px
from px_hf.compact import CompactFile
from px_hf.compact.ahead import Ahead
from px_hf.compact.quantizer import CompactConfig

PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def stock(folder: Path, **more: object) -> PreTrainedModel:
    return AutoModelForImageClassification.from_pretrained(folder, subfolder="sparse", **more)


@pytest.mark.parametrize("max_shard_size", ["1GB", 4000], ids=["one file", "shards"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_stock_loading_gives_an_ordinary_model(
    make: Callable[[], PreTrainedModel], max_shard_size: int | str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, masks = pruned(make)
    px.save_pretrained(model, masks, tmp_path / "out", max_shard_size=max_shard_size)
    assert (tmp_path / "out/sparse/model.safetensors").exists() == (max_shard_size == "1GB")
    loaded = stock(tmp_path / "out")
    assert not [record for record in caplog.records if "LOAD REPORT" in record.message]
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    # Copies, since safetensors maps weights at addresses for which some kernels round differently.
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(copy.deepcopy(dense)))
    assert torch.equal(logits(px.from_pretrained(tmp_path / "out")), logits(copy.deepcopy(dense)))

    assert not loaded.training
    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded.config, "quantization_config")
    loaded.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert not any("px_mask" in name for name in load_file(tmp_path / "again/model.safetensors"))
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(copy.deepcopy(again)), logits(copy.deepcopy(dense)))
    px.save_pretrained(loaded, masks, tmp_path / "third")
    assert oracle(tmp_path / "third/sparse") == oracle(tmp_path / "out/sparse")


def test_it_trains_like_any_other_model_and_keeps_its_masks(tmp_path: Path) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out")
    loaded, masks = stock(tmp_path / "out"), px.Masks.from_pretrained(tmp_path / "out")
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    arguments = TrainingArguments(str(tmp_path / "run"), max_steps=2, use_cpu=True, report_to=[], save_strategy="no")
    data = [{"pixel_values": image, "labels": k % 3} for k, image in enumerate(torch.rand(8, 3, 16, 16))]
    Trainer(loaded, arguments, train_dataset=data, callbacks=[px.KeepMasks(masks)]).train()
    assert masks.revived(loaded) == {}
    assert not torch.equal(loaded.classifier.weight, model.classifier.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_and_device_map(dtype: torch.dtype, tmp_path: Path) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "out", dtype=dtype)
    for loaded in (
        stock(tmp_path / "out", dtype=dtype),
        stock(tmp_path / "out", dtype=dtype, device_map="cpu"),
        px.from_pretrained(tmp_path / "out", dtype=dtype),
        px.from_pretrained(tmp_path / "out", dtype=dtype, device_map="cpu"),
        px.from_pretrained(tmp_path / "out", dtype=str(dtype).removeprefix("torch.")),
    ):
        assert all(torch.equal(tensor, dense.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        assert loaded.dtype == dtype
    px.save_pretrained(dense, masks, tmp_path / "narrow")
    assert stock(tmp_path / "narrow").dtype == px.from_pretrained(tmp_path / "narrow").dtype == dtype


def test_the_backbone_alone(tmp_path: Path) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out")
    backbone = AutoModel.from_pretrained(tmp_path / "out", subfolder="sparse", add_pooling_layer=False)
    whole = model.state_dict()
    assert all(torch.equal(tensor, whole[f"vit.{name}"]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(px.CheckpointError, match=r"2 parameters of ViTModel .* 'pooler.dense.bias'"):
        AutoModel.from_pretrained(tmp_path / "out", subfolder="sparse")


# ------------------------------------------------------------------------------------------------- models of timm


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_of_timm_is_loaded_by_timm_by_transformers_and_by_px_hf(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    size = {"img_size": 16, "patch_size": 8} if "vit" in name else {}
    model = timm.create_model(name, num_classes=5, **size).to(dtype).eval()
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.8)
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path / "out", provenance={"criterion": "Magnitude()"}, max_shard_size=10_000)
    assert not list((tmp_path / "out").glob("*.bin"))
    assert len(list((tmp_path / "out/sparse").glob("*.safetensors"))) > 1

    expected = model(PIXELS.to(dtype))
    loaded = px.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.pretrained_cfg["architecture"] == name
    assert torch.equal(loaded(PIXELS.to(dtype)), expected)
    wide = px.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).to(dtype).eval()
    assert torch.equal(by_timm(PIXELS.to(dtype)), expected)
    for folder in ("", "sparse"):
        wrapped = AutoModelForImageClassification.from_pretrained(tmp_path / "out", subfolder=folder).eval()
        assert torch.equal(copy.deepcopy(wrapped)(PIXELS.to(dtype)).logits, expected)
        assert wrapped.config.px["criterion"] == "Magnitude()"
    assert px.Masks.from_pretrained(tmp_path / "out") == masks

    px.save_pretrained(
        loaded, masks, tmp_path / "again", provenance={"criterion": "Magnitude()"}, max_shard_size=10_000
    )
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


@pytest.mark.parametrize("loaded_first", [False, True])
def test_a_wrapped_model_of_timm_is_loaded_by_timm(loaded_first: bool, tmp_path: Path) -> None:
    model, masks = pruned(timm_resnet)
    if loaded_first:
        px.save_pretrained(model, masks, tmp_path / "first")
        model = stock(tmp_path / "first")
    px.save_pretrained(model, masks, tmp_path / "out")
    by_timm = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(by_timm(PIXELS), logits(copy.deepcopy(model)))


def test_what_does_not_apply_to_a_model_of_timm_is_an_error(tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=5)
    masks = px.prune(model, [], px.Random(seed=0), sparsity=0.5)
    masks.apply_(model)
    px.save_pretrained(model, masks, tmp_path / "out")
    with pytest.raises(px.InvalidArgumentError, match="device_map does not apply"):
        px.from_pretrained(tmp_path / "out", device_map="cpu")
    config = tmp_path / "out/sparse/config.json"
    for change, message in (
        ({"architecture": "test_vit"}, "parameters of VisionTransformer are not in the compact copy"),
        ({"architecture": "no_such_model"}, "knows no architecture 'no_such_model'"),
        ({"architecture": "local-dir:/tmp"}, "knows no architecture"),
        ({"architecture": ["test_resnet"]}, "knows no architecture"),
        ({"num_classes": 7}, "it would be random"),
        ({"num_classes": "five"}, "cannot be built"),
        ({"model_args": {"no_such_argument": 1}}, "cannot be built"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "tells timm what to read: checkpoint_path"),
        ({"model_args": {"pretrained": True}}, "tells timm what to read: pretrained"),
        ({"model_args": [1]}, "expected a mapping"),
    ):
        content = config.read_text()
        config.write_text(json.dumps(json.loads(content) | change))
        with pytest.raises(px.CheckpointError, match=message):
            px.from_pretrained(tmp_path / "out")
        config.write_text(content)
    assert isinstance(px.from_pretrained(tmp_path / "out"), nn.Module)


# --------------------------------------------------------------------------------------- never a model half loaded


def flip(folder: Path, tensor: str) -> None:
    """Change one byte of a stored tensor."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    start, _ = json.loads(content[8 : 8 + length])[tensor]["data_offsets"]
    content[8 + length + start] ^= 4
    file.write_bytes(content)


QUERY = "vit.layers.0.attention.q_proj.weight"


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of the file and its metadata, leaving all else in order."""
    from safetensors import safe_open

    file = folder / "model.safetensors"
    with safe_open(file, "pt") as opened:
        described = json.loads(opened.metadata()["px_sparse"])
    tensors = {name: tensor for name, tensor in load_file(file).items() if name not in names}
    described["tensors"] = {name: entry for name, entry in described["tensors"].items() if name not in names}
    save_file(tensors, file, metadata={"format": "pt", "px_sparse": json.dumps(described)})


@pytest.mark.parametrize("load", [stock, px.from_pretrained], ids=["stock", "px_hf"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder, QUERY + ":px_mask"), "CRC-32 differs"),
        (lambda folder: flip(folder, QUERY + ":px_values"), "CRC-32 differs"),
        (lambda folder: flip(folder, "classifier.bias"), "CRC-32 differs"),
        (lambda folder: drop(folder, "classifier.bias"), "'classifier.bias': they would be random"),
        (lambda folder: drop(folder, QUERY + ":px_mask", QUERY + ":px_values"), "they would be random"),
        (lambda folder: drop(folder, QUERY + ":px_mask"), "without its counterpart"),
        (lambda folder: edit(folder / "config.json", num_hidden_layers=3), "they would be random"),
        (lambda folder: edit(folder / "config.json", intermediate_size=24), "config and weights do not belong|random"),
        (lambda folder: edit(folder / "config.json", model_type="resnet"), "they would be random"),
        (lambda folder: pruned(vit)[0].save_pretrained(folder / "x") or (folder / "x/model.safetensors").replace(
            folder / "model.safetensors"), "not a compact file of px_hf"),
    ],
)  # fmt: skip
def test_a_damaged_copy_is_never_loaded(
    damage: Callable[[Path], object], message: str, load: Callable[[Path], nn.Module], tmp_path: Path
) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out")
    damage(tmp_path / "out/sparse")
    with pytest.raises(px.CheckpointError, match=message):
        load(tmp_path / "out")


def test_it_does_not_prune(tmp_path: Path) -> None:
    settings = {"config": vit().config, "quantization_config": CompactConfig()}
    with pytest.raises(px.InvalidArgumentError, match=r"does not prune. Use px_hf.prune"):
        AutoModelForImageClassification.from_pretrained(tmp_path, **settings)


# -------------------------------------------------------------------------------------------------- registration

LOAD = """
import sys
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], subfolder="sparse")
print("zeros", sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1))
print("warnings" if "px_hf.compact.quantizer" not in sys.modules else "registered", sys.meta_path[0])
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import px_hf",
        pytest.param("import transformers, px_hf", marks=pytest.mark.slow),
        "from transformers import AutoModelForImageClassification\nimport px_hf",
        pytest.param("import px_hf, importlib\nimportlib.reload(px_hf)", marks=pytest.mark.slow),
    ],
)
def test_registration_in_either_order_of_imports(imports: str, tmp_path: Path) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out")
    zeros = sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)
    code = f"import sys\nbefore = list(sys.meta_path)\n{imports}\n{LOAD}assert sys.meta_path[0] is before[0]\n"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:px_hf", "-c", code, tmp_path / "out"],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"zeros {zeros}\nregistered" in done.stdout


def test_transformers_still_works_where_registration_fails() -> None:
    code = """
import sys, warnings
sys.modules["px_hf.compact.quantizer"] = None  # its import fails
import px_hf
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from transformers.quantizers import HfQuantizer
assert any("cannot tell this transformers" in str(warning.message) for warning in caught)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=200)


# --------------------------------------------------------------------------------------------------- decoding ahead


def test_each_pruned_tensor_is_decoded_once_and_in_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "out")
    read, calls = CompactFile.tensor, []

    def noted(file: CompactFile, name: str) -> torch.Tensor:
        calls.append((name, threading.current_thread() is threading.main_thread()))
        return read(file, name)

    monkeypatch.setattr(CompactFile, "tensor", noted)
    stock(tmp_path / "out")
    assert sorted(calls) == sorted((name, False) for name in masks)
    calls.clear()
    px.from_pretrained(tmp_path / "out")
    assert sorted(calls) == sorted((name, name not in masks) for name in model.state_dict())


def test_no_more_is_decoded_ahead_than_a_few_a_thread() -> None:
    begun, started = [], threading.Event()

    def decode(name: str) -> torch.Tensor:
        begun.append(name)
        if len(begun) == limit:
            started.set()
        if name == "7":
            raise px.CheckpointError("damaged")
        return torch.tensor(int(name))

    limit = Ahead.depth * min(8, os.cpu_count() or 1)
    names = [str(number) for number in range(limit + 40)]
    with Ahead(decode, names) as ahead:
        assert started.wait(60)
        assert sorted(begun, key=int) == names[:limit]
        assert ahead.get(names[-1]) == limit + 39  # one that is far ahead
        with pytest.raises(px.CheckpointError, match="damaged"):
            ahead.get("7")
        for name in names[:-1]:
            if name != "7":
                assert ahead.get(name) == int(name)
    assert sorted(begun, key=int) == names

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="early"), Ahead(decode, names):
        raise RuntimeError("early")
    assert threading.active_count() == before
