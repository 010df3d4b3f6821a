"""What px.shrink made is saved and loaded: by stock libraries where a config can express it, else by px_hf alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import networks
import pytest
import test_hub
import timm
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification, Dinov2Config, Dinov2ForImageClassification

import px_hf as px
from px_hf.errors import CheckpointError
from px_hf.masks import Masks
from px_hf.model.inputs import Inputs, run
from px_hf.model.targets import prunable
from px_hf.structured.units import trace_units


def dinov2() -> nn.Module:
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=8, patch_size=4,
        num_labels=5,
    )  # fmt: skip
    return Dinov2ForImageClassification(config)


MODELS: dict[str, tuple[Any, int]] = {
    "hf vit": (networks.hf_vit, 8),
    "hf dinov2": (dinov2, 8),
    "hf resnet": (networks.hf_resnet, 32),
    "timm vit, wrapped": (test_hub.timm_vit, 16),
    "timm resnet, wrapped": (test_hub.timm_resnet, 32),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=5), 160),
    "timm resnet": (lambda: timm.create_model("test_resnet", num_classes=5), 32),
}


def shrunken(name: str, scope: str = "structured", sparsity: float = 0.3) -> tuple[nn.Module, Masks, Tensor]:
    make, size = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    images = torch.randn(2, 3, size, size)
    masks = px.prune(model, [images], px.Random(), sparsity=sparsity, scope=scope, progress=False)
    return *px.shrink(model, masks, images), images


@torch.no_grad()
def logits(model: nn.Module, images: Tensor) -> Tensor:
    return run(model.eval(), Inputs(images))


@pytest.mark.parametrize("scope", ["structured", "structured:uniform"])
@pytest.mark.parametrize("name", MODELS)
def test_px_loads_what_it_saved(name: str, scope: str, tmp_path: Path) -> None:
    small, masks, images = shrunken(name, scope)
    px.save_pretrained(small, masks, tmp_path / "out")
    loaded = px.from_pretrained(tmp_path / "out")
    assert type(loaded) is type(small)
    assert torch.equal(logits(loaded, images), logits(small, images))
    px.save_pretrained(loaded, masks, tmp_path / "again")
    first, again = (json.loads((tmp_path / f / "config.json").read_text()) for f in ("out", "again"))
    assert first["px"].get("structure") == again["px"].get("structure")


STOCK = {"hf vit": "intermediate_size", "hf dinov2": "mlp_ratio", "timm vit, wrapped": "model_args"}


@pytest.mark.parametrize("name", STOCK)
def test_stock_loads_uniform_widths(name: str, tmp_path: Path) -> None:
    small, masks, images = shrunken(name, "structured:uniform", sparsity=0.25)  # DINOv2 takes whole ratios only
    px.save_pretrained(small, masks, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "structure" not in config["px"]
    dense = MODELS[name][0]().config.to_dict()
    differ = {k for k, v in config.items() if k in dense and v != dense[k] and k in (*STOCK.values(), "hidden_size")}
    assert differ == {STOCK[name]}
    stock = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(stock, images), logits(small, images))
    small.save_pretrained(tmp_path / "plain")  # transformers' own
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain, images), logits(small, images))


def test_timm_loads_uniform_widths_of_its_wrapped_model(tmp_path: Path) -> None:
    small, masks, images = shrunken("timm vit, wrapped", "structured:uniform")
    px.save_pretrained(small, masks, tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(model, images), logits(small, images))


def test_stock_loads_fewer_heads_if_every_layer_has_as_many(tmp_path: Path) -> None:
    """The config of ViT in transformers says `num_attention_heads` and `head_dim`."""
    torch.manual_seed(0)
    model, images = networks.hf_vit().eval(), networks.images()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in prunable(model).items()}
    for family in trace_units(model, Inputs(images[:1]), prunable(model)):
        for part in family.parts:
            if part.matrix and family.heads:
                masks[part.tensor].index_fill_(part.axis, part.index[0], False)
    small, rest = px.shrink(model, Masks(masks))
    assert (small.config.num_attention_heads, small.config.head_dim) == (1, 8)
    px.save_pretrained(small, rest, tmp_path)
    stock = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(stock, images), logits(small, images))


@pytest.mark.parametrize("name", ["hf vit", "hf resnet", "timm vit, wrapped", "timm resnet"])
def test_stock_refuses_what_its_config_cannot_express(name: str, tmp_path: Path) -> None:
    """Never random weights."""
    small, masks, _ = shrunken(name)
    px.save_pretrained(small, masks, tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    if name.startswith("timm"):
        with pytest.raises(RuntimeError, match="size mismatch"):
            timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    shutil.rmtree(tmp_path / "sparse")
    masks.save(tmp_path / "masks.safetensors")
    with pytest.raises(CheckpointError, match="size"):
        px.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["hf vit", "timm vit, wrapped", "timm vit"])
def test_transformers_builds_the_structure_of_the_compact_copy(name: str, tmp_path: Path) -> None:
    small, masks, images = shrunken(name)
    px.save_pretrained(small, masks, tmp_path)
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, subfolder="sparse")
    assert torch.equal(logits(loaded, images), logits(small, images))


def test_units_may_go_from_a_model_that_keeps_other_zeros(tmp_path: Path) -> None:
    model, images = networks.hf_vit().eval(), networks.images()
    units = px.prune(model, [images], px.Magnitude(), sparsity=0.2, scope="structured", progress=False)
    masks = px.select(px.Magnitude().score(model, masks=units), sparsity=0.6, within=units)
    small, rest = px.shrink(model, masks)
    assert 0.4 < rest.sparsity < 0.6
    px.save_pretrained(small, rest, tmp_path)
    loaded = px.from_pretrained(tmp_path)
    assert not rest.revived(loaded)
    assert torch.equal(logits(loaded, images), logits(small, images))
    assert Masks.from_pretrained(tmp_path) == rest


HUGE = 2**40
HOSTILE: dict[str, Any] = {
    "no mapping": [1, 2],
    "no counts": {"shapes": {}},
    "unknown tensor": {"shapes": {"vit.nothing": [1]}, "counts": {}},
    "larger": {"shapes": {"vit.layers.0.mlp.fc1.weight": [HUGE, 16]}, "counts": {}},
    "zero": {"shapes": {"vit.layers.0.mlp.fc1.weight": [0, 16]}, "counts": {}},
    "negative": {"shapes": {"vit.layers.0.mlp.fc1.weight": [-1, 16]}, "counts": {}},
    "truth": {"shapes": {"vit.layers.0.mlp.fc1.weight": [True, 16]}, "counts": {}},
    "dimensions": {"shapes": {"vit.layers.0.mlp.fc1.weight": [4, 4, 4]}, "counts": {}},
    "text": {"shapes": {"vit.layers.0.mlp.fc1.weight": "4"}, "counts": {}},
    "unknown module": {"shapes": {}, "counts": {"vit.nothing": {"training": 1}}},
    "unknown integer": {"shapes": {}, "counts": {"vit.layers.0.attention": {"forward": 1}}},
    "larger integer": {"shapes": {}, "counts": {"vit.layers.0.attention": {"num_attention_heads": 9}}},
    "another structure": {"shapes": {"vit.layers.0.mlp.fc1.weight": [4, 16]}, "counts": {}},
}


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("subfolder", ["", "sparse"])
def test_a_hostile_structure_is_an_error(attack: str, subfolder: str, tmp_path: Path) -> None:
    small, masks, _ = shrunken("hf vit")
    px.save_pretrained(small, masks, tmp_path)
    file = tmp_path / "sparse" / "config.json"
    config = json.loads(file.read_text())
    config["px"]["structure"] = HOSTILE[attack]
    file.write_text(json.dumps(config))
    load = AutoModelForImageClassification.from_pretrained if subfolder else px.from_pretrained
    with pytest.raises(CheckpointError):
        load(tmp_path, subfolder=subfolder)


def test_a_structure_that_is_missing_is_an_error(tmp_path: Path) -> None:
    small, masks, _ = shrunken("hf vit")
    px.save_pretrained(small, masks, tmp_path)
    file = tmp_path / "sparse" / "config.json"
    config = json.loads(file.read_text())
    del config["px"]["structure"]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="do not belong together"):
        px.from_pretrained(tmp_path)
