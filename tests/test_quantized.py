"""Pruned, then quantized to int8: zeros stay, MACs are counted, and what needs plain weights says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TorchAoConfig, ViTConfig, ViTForImageClassification

import px_hf as px

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def pruned() -> tuple[nn.Module, px.Masks]:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16,
                  patch_size=8, num_labels=3)
    ).eval()  # fmt: skip
    masks = px.prune(model, [X], px.Magnitude(), sparsity=0.5, progress=False)
    masks.apply_(model)
    return model, masks


def needing_plain_weights(model: nn.Module, masks: px.Masks, folder: Path) -> dict[str, Any]:
    parameters = [nn.Parameter(torch.zeros(1)), *(p for p in model.parameters() if p.requires_grad)]
    optimizer = torch.optim.SGD(parameters, 0.1)
    return {
        "apply": lambda: masks.apply_(model),
        "prune": lambda: px.prune(model, [X], px.PX(), sparsity=0.6, progress=False),
        "score": lambda: px.Magnitude().score(model),
        "save": lambda: px.save_pretrained(model, masks, folder / "out"),
        "keep": lambda: px.keep_masks(optimizer, model, masks),
    }


@pytest.mark.filterwarnings("ignore")  # of torchao, for this torch
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao_keeps_every_zero(config: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, masks = pruned()
    before, macs = model(X).logits, px.report(model, masks).to_dict()
    px.save_pretrained(model, masks, tmp_path / "plain")
    model = px.from_pretrained(tmp_path / "plain")
    quantization.quantize_(model, getattr(quantization, config)())
    torch.testing.assert_close(model(X).logits, before, atol=0.05, rtol=0)
    assert masks.revived(model) == {}
    assert px.report(model, masks).to_dict() == macs
    torch.testing.assert_close(model(X).logits, before, atol=0.05, rtol=0)  # quantized as before
    for name, mask in masks.items():
        assert not model.get_parameter(name).dequantize()[~mask].any()
    inverse = px.Masks({name: ~mask for name, mask in masks.items()})
    assert sum(inverse.revived(model).values()) > 0.9 * inverse.total / 2
    for call in needing_plain_weights(model, masks, tmp_path).values():
        with pytest.raises(px.TargetError, match=r"needs plain weights.*quantize it last"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")  # of torchao, for this torch
@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_stock_transformers_saves_and_loads_it(config: str, tmp_path: Path) -> None:
    """The example of docs/SAVING.md."""
    quantization = pytest.importorskip("torchao.quantization")
    model, masks = pruned()
    px.save_pretrained(model, masks, tmp_path / "plain")
    settings = TorchAoConfig(getattr(quantization, config)(version=2))
    quantized = ViTForImageClassification.from_pretrained(tmp_path / "plain", quantization_config=settings)
    quantized.save_pretrained(tmp_path / "int8")
    masks.save(tmp_path / "int8/masks.safetensors")
    back = ViTForImageClassification.from_pretrained(tmp_path / "int8")
    assert torch.equal(back(X).logits, quantized(X).logits)
    assert px.Masks.from_pretrained(tmp_path / "int8") == masks
    assert masks.revived(back) == {}
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "int8")]
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch moves this to torchao
def test_modules_of_torchs_own_quantization(tmp_path: Path) -> None:
    if "none" in torch.backends.quantized.engine:
        pytest.skip("torch was built without int8 kernels")
    model, masks = pruned()
    found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    for name, mask in masks.items():
        weight = found.get_submodule(name.removesuffix(".weight")).weight().dequantize()
        assert not weight[~mask].any()
    for call in [*needing_plain_weights(found, masks, tmp_path).values(), lambda: px.report(found, masks)]:
        with pytest.raises(px.TargetError, match=r"needs plain weights.*quantize it last"):
            call()


def test_int8_in_onnx_keeps_every_zero(tmp_path: Path) -> None:
    """The example of docs/SAVING.md."""
    onnx = pytest.importorskip("onnx")
    quantization = pytest.importorskip("onnxruntime.quantization")
    layer = nn.Sequential(nn.Flatten(), nn.Linear(768, 32), nn.ReLU(), nn.Linear(32, 5))
    torch.manual_seed(0)
    masks = px.prune(layer, [X], px.Magnitude(), sparsity=0.75, progress=False)
    masks.apply_(layer)
    px.export_onnx(layer, tmp_path / "model.onnx", example=X)
    quantization.quantize_dynamic(tmp_path / "model.onnx", tmp_path / "int8.onnx",
                                  weight_type=quantization.QuantType.QInt8, per_channel=True)  # fmt: skip
    tensors = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "int8.onnx").graph.initializer}
    codes = [t for t in tensors.values() if str(t.dtype) == "int8" and t.ndim == 2 and t.size == 32 * 768]
    assert len(codes) == 1
    assert int((codes[0] != 0).sum()) <= int(masks["1.weight"].sum())
    assert (tmp_path / "int8.onnx").stat().st_size < 0.5 * (tmp_path / "model.onnx").stat().st_size
