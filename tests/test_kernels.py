"""Conversions to sparse kernels: same logits, what is skipped and why, and what is refused."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import timm
import torch
from networks import build, images, sizes
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import px_hf as px
from px_hf.kernels import blocks, csr, semi_structured

SPARSE_MODELS = ["mlp", "hf vit", "hf vit, eager", "timm vit", "torchvision vit"]


def sparse(name: str, sparsity: float = 0.95) -> nn.Module:
    model = build(name).eval()
    px.prune(model, [], px.Magnitude(), sparsity=sparsity, scope="layer", progress=False).apply_(model)
    return model


def logits(model: nn.Module, name: str, count: int = 7) -> torch.Tensor:
    x = images(count) if sizes(name) == 8 else torch.rand(count, 3, 32, 32)
    with torch.no_grad():
        output = model(x)
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", SPARSE_MODELS)
def test_csr_layers_give_the_same_logits(name: str) -> None:
    model = sparse(name)
    before = logits(model, name, 20)
    found = px.accelerate_csr_(model, min_weights=0)
    assert found.converted
    assert all(isinstance(model.get_submodule(layer), csr.CSRLinear) for layer in found.converted)
    torch.testing.assert_close(logits(model, name, 20), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(copy.deepcopy(model), name, 20), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["hf vit", "hf vit, eager", "timm vit"])
def test_block_layers_give_the_same_logits(name: str) -> None:
    model = build(name).eval()
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.8, scope="block:4", progress=False)
    masks.apply_(model)
    before = logits(model, name, 20)
    found = px.accelerate_blocks_(model, size=4, min_sparsity=0.1)
    assert {f"{layer}.weight" for layer in found.converted} <= set(masks)
    assert sum(model.get_submodule(layer).values.numel() for layer in found.converted) < masks.total // 3
    torch.testing.assert_close(logits(model, name, 20), before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(copy.deepcopy(model), name, 20), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 70, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_block_linear_against_the_dense_layer(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    """With a row of blocks that is empty, one that is whole, and blocks that are partly zeros."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 6, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight[2:4] = 0
        layer.weight[:2, 2:4] = 0
        layer.weight[0, 0] = 0
    x = torch.randn(shape, dtype=dtype)
    found = blocks.BlockLinear(layer, 2)
    assert found.values.numel() == 4 * (2 + 3)
    torch.testing.assert_close(found(x), layer(x).detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (64, 6), (65, 6), (2, 70, 6), (0, 6)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_csr_linear_against_the_definition(shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 3, bias=bias, dtype=dtype)
    with torch.no_grad():
        layer.weight[torch.rand(3, 6) < 0.6] = 0
        layer.weight[1] = 0  # an output without inputs
    x = torch.randn(shape, dtype=dtype)
    expected = [
        [sum(row[j] * layer.weight[i, j].item() for j in range(6)) + (layer.bias[i].item() if bias else 0.0)
         for i in range(3)] for row in x.reshape(-1, 6).tolist()
    ]  # fmt: skip
    found = csr.CSRLinear(layer)(x)
    assert found.shape == (*shape[:-1], 3)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype).view(*shape[:-1], 3), rtol=1e-5, atol=1e-6)


def test_what_is_skipped_is_said() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 40), nn.Linear(40, 5)).eval()
    with torch.no_grad():
        model[2].weight[:, 5:] = 0
    found = px.accelerate_csr_(model, min_weights=200)
    assert found.converted == ("2",)
    assert found.skipped == {"0": "not a linear layer", "3": "less than 85% sparse"}
    assert str(found) == ("1 layers converted, 2 skipped\n  1 not a linear layer: 0\n  1 less than 85% sparse: 3")
    assert not any(p.requires_grad for p in model.parameters())


def test_a_shared_layer_is_converted_once() -> None:
    layer = nn.Linear(8, 8)
    nn.init.zeros_(layer.weight)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    px.accelerate_csr_(model, min_weights=0)
    assert model[0] is model[2]
    assert isinstance(model[0], csr.CSRLinear)


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (build("mlp"), {"min_weights": 0}, px.TargetError, "converted to CSR .*less than 85% sparse: 1, 3, 5"),
        (sparse("mlp"), {}, px.TargetError, "3 smaller than 262,144 weights: 1, 3, 5"),
        (build("mlp"), {"min_sparsity": 1.5}, px.InvalidArgumentError, r"min_sparsity=1\.5"),
        (build("cnn").half(), {}, px.TargetError, "float16 and not float32"),
        (nn.Linear(3, 3), {"min_sparsity": 0.0, "min_weights": 0}, px.TargetError, "itself a linear layer"),
        (nn.Flatten(), {}, px.TargetError, "there is none"),
        (nn.Sequential(nn.Linear(3, 3)).to("meta"), {}, px.TargetError, "this one is on meta"),
    ],
)
def test_csr_refuses(model: nn.Module, settings, error: type[Exception], message: str) -> None:
    before = repr(model)
    with pytest.raises(error, match=message):
        px.accelerate_csr_(model, **settings)
    assert repr(model) == before


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        (build("mlp"), {"size": 1}, px.TargetError, "to blocks .*less than 60% zero blocks.*scope='block:1'"),
        (build("mlp"), {"size": 10**6}, px.TargetError, "without whole blocks of 1000000"),
        (build("mlp"), {"size": 0}, px.InvalidArgumentError, "size=0"),
        (build("mlp"), {"min_sparsity": -1}, px.InvalidArgumentError, "min_sparsity=-1"),
        (nn.Linear(4, 4), {"size": 4, "min_sparsity": 0}, px.TargetError, "itself a linear layer"),
        (nn.Sequential(nn.Linear(4, 4)).to("meta"), {}, px.TargetError, "accelerate_blocks_ is for .* on meta"),
    ],
)
def test_blocks_refuse(model: nn.Module, settings, error: type[Exception], message: str) -> None:
    before = repr(model)
    with pytest.raises(error, match=message):
        px.accelerate_blocks_(model, **settings)
    assert repr(model) == before


def half_24(rows: int = 32, columns: int = 64) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows).half()
    with torch.no_grad():
        layer.weight.unflatten(1, (-1, 4))[..., 1:3] = 0
    return layer


def three_of_four() -> nn.Linear:
    layer = half_24()
    with torch.no_grad():
        layer.weight[3, 4:7] = 1
    return layer


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (half_24(), None),
        (half_24().bfloat16(), None),
        (nn.Linear(64, 32).half(), "not 2:4"),
        (three_of_four(), "not 2:4"),
        (half_24().float(), "torch.float32 and not float16"),
        (nn.Linear(6, 32).half(), "divided by 4"),
    ],
)
def test_eligibility(layer: nn.Linear, reason: str | None) -> None:
    found = semi_structured.unfit(layer)
    assert found is None if reason is None else reason in str(found)


def test_what_prune_makes_is_eligible() -> None:
    model = build("hf vit").eval()
    px.prune(model, [], px.Magnitude(), sparsity=0.5, scope="2:4", progress=False).apply_(model)
    model.half()
    reasons = {name: semi_structured.unfit(m) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, reason in reasons.items() if reason} == {"classifier"}


def test_24_on_a_cpu_is_refused_and_the_model_stays() -> None:
    model = nn.Sequential(half_24())
    weight = model[0].weight
    with pytest.raises(px.TargetError, match=r"on an NVIDIA GPU, and it is on cpu.*accelerate_csr_"):
        px.accelerate_24_(model)
    assert model[0].weight is weight


def test_24_on_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Parameters(nn.Module):
        def parameters(self, recurse: bool = True):
            return iter([type("OnGpu", (), {"device": torch.device("cuda", 0)})()])

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(px.TargetError, match=r"8\.0 or more \(Ampere\), and Tesla T4 has 7\.5"):
        semi_structured.require_gpu(Parameters())


def test_what_torch_refuses_is_skipped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """On this CPU torch itself refuses every weight, which stands for a shape that its kernels do not take."""
    monkeypatch.setattr(semi_structured, "require_gpu", lambda model: None)
    model = nn.Sequential(half_24(), nn.Linear(32, 5).half())
    with pytest.raises(px.TargetError, match=r"1 not 2:4: 1; 1 refused by torch \(.*\): 0"):
        px.accelerate_24_(model)
    assert type(model[0].weight) is nn.Parameter


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_24_layers_give_the_same_logits_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256, image_size=32,
        patch_size=8, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config).eval()
    px.prune(model, [], px.Magnitude(), sparsity=0.5, scope="2:4", progress=False).apply_(model)
    model.to("cuda", dtype)
    x = torch.randn(5, 3, 32, 32, device="cuda", dtype=dtype)
    with torch.inference_mode():
        before = model(x).logits
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its API a prototype
        found = px.accelerate_24_(model)
    assert len(found.converted) == 2 * 6
    with torch.inference_mode():
        torch.testing.assert_close(model(x).logits, before, rtol=0.05, atol=0.02)


def test_csr_runs_in_a_timm_model_under_inference_mode_and_its_state_can_be_saved() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, depth=1, num_classes=5).eval()
    px.prune(model, [], px.Magnitude(), sparsity=0.9, progress=False).apply_(model)
    before = copy.deepcopy(model)
    px.accelerate_csr_(model, min_sparsity=0.5, min_weights=0)
    x = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), before(x), rtol=1e-4, atol=1e-5)
    torch.save(model.state_dict(), io.BytesIO())
