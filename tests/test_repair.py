"""`px.reconstruct_`: least squares layer by layer. Blocks are in test_repair_blocks.py."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from networks import NETWORKS, build, sizes
from test_processes import environment
from torch import Tensor, nn
from transformers import SwinConfig, SwinForImageClassification

import px_hf as px
from px_hf.repair.calls import Geometry
from px_hf.repair.solver import solve


def small_swin() -> nn.Module:
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4, num_labels=5
    )
    return SwinForImageClassification(config)


MORE: dict[str, Callable[[], nn.Module]] = {
    "hf swin": small_swin,
    "timm small efficientnet": lambda: timm.create_model("test_efficientnet", num_classes=5),
    "timm small resnet": lambda: timm.create_model("test_resnet", num_classes=5),
    "timm small convnext": lambda: timm.create_model("test_convnext", num_classes=5),
}
"""Beside `NETWORKS`, of which the widest is left out: its least squares take a minute."""

TABLE = [name for name in (*NETWORKS, *MORE) if name != "timm resnet"]


def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MORE[name]() if name in MORE else build(name)


def smooth(count: int, size: int, seed: int = 3) -> Tensor:
    """Images whose pixels are correlated: others can take over from a pruned one."""
    x = torch.randn(count, 3, size + 2, size + 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return 3 * F.avg_pool2d(x, 3, stride=1)


def calibration(name: str, count: int = 20, seed: int = 3) -> list[Tensor]:
    return list(smooth(count, 32 if name in MORE else sizes(name), seed).float().split(5))


def some_masks(model: nn.Module, scope: str = "layer", sparsity: float = 0.5) -> px.Masks:
    return px.prune(model, [], px.Magnitude(), sparsity=sparsity, scope=scope, progress=False)


def kept_apart(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The images fitted to, and those held out: every fifth, from the second on."""
    x = torch.cat(batches)
    apart = torch.arange(len(x)) % 5 == 1
    return x[~apart], x[apart]


# -- the solver


def oracle(x: Tensor, missing: Tensor, mask: Tensor, ridge: Tensor) -> Tensor:
    """δ row by row, from the normal equations of the kept columns."""
    delta = torch.zeros_like(mask, dtype=torch.float64)
    for i, kept in enumerate(mask):
        columns = x[:, kept]
        matrix = columns.T @ columns + torch.diag(ridge[kept])
        delta[i, kept] = torch.linalg.solve(matrix, columns.T @ missing[:, i])
    return delta


@pytest.mark.parametrize("ridge", [1e-3, 0.1])
@pytest.mark.parametrize("rows", [100, 8])
def test_the_solver_solves_the_normal_equations_of_each_row(rows: int, ridge: float) -> None:
    torch.manual_seed(0)
    x, missing = torch.randn(3, rows, 12).double(), torch.randn(3, rows, 7).double()
    x[..., 4] *= 100  # an outlier feature
    x[1, :, 5] = 0  # an input that is always zero
    mask = torch.rand(3, 7, 12) < 0.5
    mask[0, 2] = False  # an output without weights
    gram = x.transpose(1, 2) @ x
    penalty = ridge * gram.diagonal(dim1=1, dim2=2)
    found = solve(gram, missing.transpose(1, 2) @ x, mask, penalty, iterations=60, tolerance=1e-12)
    assert not found[~mask].any()
    mask[1, :, 5] = False
    for g in range(3):
        torch.testing.assert_close(found[g], oracle(x[g], missing[g], mask[g], penalty[g]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"stride": 2}, {"padding": 1}, {"padding": "same", "dilation": 2}, {"padding": "valid"}, {"padding": (1, 2)},
     {"dilation": 2}, {"groups": 2}, {"groups": 4, "padding": 1, "stride": (2, 1)}],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 2, 3])
def test_patches_times_weights_are_the_convolution(size: int, arguments: dict[str, Any]) -> None:
    if size != 2 and any(isinstance(value, tuple) for value in arguments.values()):
        pytest.skip("tuples of two")
    torch.manual_seed(0)
    groups = arguments.get("groups", 1)
    x, weight = torch.randn(2, 4, *[9] * size).double(), torch.randn(8, 4 // groups, *[3, 5, 3][:size]).double()
    expected = getattr(F, f"conv{size}d")(x, weight, None, **arguments)
    rows = Geometry.of(weight, **arguments).unfold(x, weight)
    found = torch.einsum("gnd,god->gno", rows, weight.reshape(groups, 8 // groups, -1))
    found = found.reshape(groups, 2, -1, 8 // groups).permute(1, 0, 3, 2).reshape(expected.shape)
    torch.testing.assert_close(found, expected)


# -- one layer against the oracle


class One(nn.Module):
    """One layer, flattened: its outputs are the logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1) if isinstance(self.layer, nn.Linear) else x).flatten(1)


ONE = {
    "linear": lambda: nn.Linear(192, 5),
    "linear without a bias": lambda: nn.Linear(192, 5, bias=False),
    "convolution": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "stride, dilation": lambda: nn.Conv2d(3, 4, 2, stride=2, dilation=2, bias=False),
    "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "reflected": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
}


def objective(model: One, dense: One, start: One, x: Tensor, ridge: float) -> float:
    """‖model(x) - dense(x)‖² + Σ λ_j (w_j - start_j)²; Σ_x x_j² by the gradient of the layer on squared inputs."""
    squares = copy.deepcopy(model.layer)
    squares(x.flatten(1).square() if isinstance(model.layer, nn.Linear) else x.square()).sum().backward()
    with torch.no_grad():
        penalty = ridge * squares.weight.grad * (model.layer.weight - start.layer.weight).square()
        return float((model(x) - dense(x)).square().sum() + penalty.sum())


@pytest.mark.parametrize("kind", ONE)
def test_one_layer_is_the_least_squares_solution(kind: str) -> None:
    torch.manual_seed(0)
    model = One(ONE[kind]()).double()
    weight = model.layer.weight
    masks = px.Masks({"layer.weight": torch.rand(weight.shape) < 0.5})
    dense = copy.deepcopy(model)
    batches = list(smooth(400, 8).split(70))
    ridge = 0.05
    report = px.reconstruct_(model, masks, batches, ridge=ridge, iterations=2000, progress=False)

    # The same by rows of patches, made by the layer itself: each column is what one weight alone would give.
    fitted, _ = kept_apart(batches)
    mask, start = masks["layer.weight"], copy.deepcopy(dense)
    masks.apply_(start)
    missing = (dense(fitted) - start(fitted)).detach()
    unit = copy.deepcopy(dense)
    expected = start.layer.weight.detach().clone()
    biases: list[Tensor] = []
    outputs = dense.layer(fitted.flatten(1) if isinstance(dense.layer, nn.Linear) else fitted)
    for o in range(len(weight)):
        chosen = torch.nonzero(mask[o])
        columns = []
        for index in chosen:
            with torch.no_grad():
                nn.init.zeros_(unit.layer.weight)
                if unit.layer.bias is not None:
                    nn.init.zeros_(unit.layer.bias)
                unit.layer.weight[(o, *index)] = 1.0
                columns.append(unit(fitted).reshape(outputs.shape)[:, o].flatten())
        if dense.layer.bias is not None:
            columns.append(torch.ones_like(columns[0]))
        x = torch.stack(columns, dim=1)
        penalty = ridge * x.square().sum(0)
        if dense.layer.bias is not None:
            penalty[-1] = 0
        delta = torch.linalg.solve(x.T @ x + torch.diag(penalty), x.T @ missing.reshape(outputs.shape)[:, o].flatten())
        for index, value in zip(chosen, delta, strict=False):
            expected[(o, *index)] += value
        if dense.layer.bias is not None:
            biases.append(dense.layer.bias[o].detach() + delta[-1])
    weight_oracle, bias_oracle = expected, None if dense.layer.bias is None else torch.stack(biases)
    found = objective(model, dense, start, fitted, ridge)
    with torch.no_grad():
        unit.layer.weight.copy_(weight_oracle)
        if bias_oracle is not None:
            unit.layer.bias.copy_(bias_oracle)
    best = objective(unit, dense, start, fitted, ridge)
    assert best * (1 - 1e-9) <= found <= best * (1 + 1e-6) < 0.9 * objective(start, dense, start, fitted, ridge)
    assert report.layers[0].rows == len(fitted) * outputs[0, 0].numel()
    error = (model(fitted) - dense(fitted)).norm() / dense(fitted).norm()
    assert report.layers[0].error_after == pytest.approx(float(error), rel=1e-6)


# -- whole networks


class Tokens(nn.Module):
    """A class token before three of the image, and a linear layer that reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 64))
        self.layer = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        first = self.cls_token + tokens[:, :1].roll(7, 2)
        return self.layer(torch.cat((first, tokens), 1)).sum(1)


@pytest.mark.parametrize("weight", [1.0, 30.0])
def test_the_class_token_counts_as_often_as_it_is_told_to(weight: float) -> None:
    """Against the normal equations of rows that are there so many times."""
    torch.manual_seed(0)
    dense = Tokens().double()
    masks = some_masks(dense)
    name = "layer.weight"
    batches = [images[:, :, :8, :8] for images in smooth(60, 8).split(20)]
    model = copy.deepcopy(dense)
    px.reconstruct_(model, masks, batches, class_token=weight, iterations=200, progress=False)
    x, _ = kept_apart(batches)
    tokens = x.flatten(2)
    tokens = torch.cat((dense.cls_token.detach() + tokens[:, :1].roll(7, 2), tokens), 1)
    times = torch.ones(4, dtype=torch.long)
    times[0] = int(weight)
    rows = tokens.repeat_interleave(times, 1).flatten(0, 1)
    rows = torch.cat((rows, rows.new_ones(len(rows), 1)), 1)
    kept = masks.tensors[name]
    missing = rows[:, :-1] @ torch.where(kept, 0.0, dense.layer.weight.detach()).T
    ridge = 0.01 * rows.square().sum(0)
    ridge[-1] = 0
    delta = oracle(rows, missing, torch.cat((kept, kept.new_ones(5, 1)), 1), ridge)
    expected = torch.where(kept, dense.layer.weight.detach() + delta[:, :-1], 0.0)
    torch.testing.assert_close(model.layer.weight.detach(), expected, rtol=1e-2, atol=1e-3)
    other = copy.deepcopy(dense)
    px.reconstruct_(other, masks, batches, class_token=31 - weight, iterations=200, progress=False)
    assert (other.layer.weight - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", TABLE)
def test_what_is_promised_of_every_network(name: str) -> None:
    dense = network(name).train()
    masks = some_masks(dense)
    model = copy.deepcopy(dense)
    parent_given = name in ("mlp", "hf vit", "hf resnet")
    if parent_given:
        masks.apply_(model)
    model.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    parent = {key: value.clone() for key, value in dense.state_dict().items()}
    batches = calibration(name)
    state = torch.get_rng_state()
    report = px.reconstruct_(model, masks, batches, dense if parent_given else None, iterations=20, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, parent[key]) for key, value in dense.state_dict().items())
    after = model.state_dict()
    assert not masks.revived(model)
    biases = {key.removesuffix("weight") + "bias" for key in masks} | {
        key.removesuffix("weight") + "bias" for key in masks if key.endswith("in_proj_weight")
    } | {key.replace("in_proj_weight", "in_proj_bias") for key in masks}  # fmt: skip
    for key, value in after.items():
        if key in masks:
            assert not value[~masks[key]].view(torch.int32).any(), key  # +0.0, to the bit
        elif key not in biases:
            assert torch.equal(value, before[key]), key
    assert {layer.name for layer in report.layers} | report.skipped.keys() == set(masks)
    assert all(name.endswith("in_proj_weight") for name in report.skipped)  # nn.MultiheadAttention takes it apart
    assert all(layer.held_out_after <= layer.held_out_before for layer in report.layers)
    assert any(layer.repaired for layer in report.layers)


@pytest.mark.parametrize("name", ["hf vit", "hf resnet"])
def test_the_network_is_nearer_to_its_parent(name: str) -> None:
    model = build(name).eval()
    masks = some_masks(model)
    dense, pruned = copy.deepcopy(model), copy.deepcopy(model)
    masks.apply_(pruned)
    batches = calibration(name, 60)
    px.reconstruct_(model, masks, batches, ridge=1e-3, progress=False)
    fresh = torch.cat(calibration(name, 10, seed=4))

    def distance(one: nn.Module) -> float:
        with torch.no_grad():
            outputs = [getattr(m(fresh), "logits", m(fresh)) for m in (one, dense)]
        return float((outputs[0] - outputs[1]).norm())

    assert distance(model) < 0.8 * distance(pruned)


# -- what it is given


@pytest.mark.parametrize(
    ("setting", "message"),
    [({"method": "rows"}, "method='rows'"), ({"ridge": -1}, "ridge=-1"), ({"ridge": True}, "ridge=True"),
     ({"ridge": float("nan")}, "ridge=nan"), ({"iterations": 0}, "iterations=0"), ({"epochs": 1.5}, "epochs=1.5"),
     ({"rate": 0}, "rate=0"), ({"class_token": 0}, "class_token=0")],
)  # fmt: skip
def test_settings_are_checked(setting: dict[str, Any], message: str) -> None:
    model = build("cnn")
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.reconstruct_(model, some_masks(model), calibration("cnn"), progress=False, **setting)


def test_a_network_that_is_not_the_parent_is_an_error() -> None:
    dense = build("cnn")
    masks = some_masks(dense)
    model = copy.deepcopy(dense)
    with pytest.raises(px.TargetError, match="do not fit"):
        px.reconstruct_(model, masks, calibration("cnn"), build("mlp"), progress=False)
    masks.apply_(model)
    with pytest.raises(px.TargetError, match="Pass dense="):
        px.reconstruct_(model, masks, calibration("cnn"), progress=False)
    with torch.no_grad():
        dense[0].weight.mul_(2)
    with pytest.raises(px.TargetError, match=r"not the parent of the model: kept weights of 0\.weight"):
        px.reconstruct_(model, masks, calibration("cnn"), dense, progress=False)


def test_no_images_is_an_error() -> None:
    model = build("cnn")
    with pytest.raises(px.DataError, match="empty"):
        px.reconstruct_(model, some_masks(model), [], progress=False)


def test_what_is_not_finite_is_named_and_the_model_stays() -> None:
    model = build("cnn")
    masks = some_masks(model)
    with torch.no_grad():
        model[3].weight[0, 0, 0, 0] = float("inf")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(px.NonFiniteError, match=r"layer of 3\.weight"):
        px.reconstruct_(model, masks, calibration("cnn"), progress=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_too_few_images_give_a_warning() -> None:
    model = build("mlp")
    with pytest.warns(UserWarning, match=r"more inputs than samples.*1\.weight \(16 samples, 192 inputs\)"):
        px.reconstruct_(model, some_masks(model), calibration("mlp"), progress=False)


class Unusual(nn.Module):
    """Two layers with one weight, one that is called twice, and one whose weight is scaled before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.again, self.scaled = (nn.Linear(12, 12) for _ in range(4))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.one(x.flatten(1)[:, :12]).relu()).relu()
        x = self.again(self.again(x).relu())
        return F.linear(x, self.scaled.weight * 2)


def test_shared_weights_and_weights_that_cannot_be_repaired() -> None:
    torch.manual_seed(0)
    model = Unusual()
    names = ("one.weight", "two.weight", "again.weight", "scaled.weight")
    masks = px.Masks(dict.fromkeys(names, torch.rand(12, 12) < 0.5))
    report = px.reconstruct_(model, masks, calibration("mlp", 60), progress=False)
    assert model.two.weight is model.one.weight
    assert [(layer.name, layer.rows) for layer in report.layers] == [("one.weight", 96), ("again.weight", 96)]
    assert "same parameter as one.weight" in report.skipped["two.weight"]
    assert "as it is" in report.skipped["scaled.weight"]
    assert not masks.revived(model)
    assert "Not repaired: scaled.weight" in str(report)
    assert report.to_dict()["skipped"] == report.skipped


@pytest.mark.parametrize("scope", ["2:4", "row", "structured"])
def test_masks_of_every_scope(scope: str) -> None:
    model = build("hf vit").eval()
    batches = calibration("hf vit")
    sparsity = 0.2 if scope == "structured" else 0.5
    masks = px.prune(model, batches, px.PX(), sparsity=sparsity, rounds=1, scope=scope, progress=False)
    report = px.reconstruct_(model, masks, batches, progress=False)
    assert not masks.revived(model)
    assert len(report.layers) == len(masks)


# -- several processes

SCRIPT = """
import sys, torch, torch.distributed as dist, px_hf as px
from networks import build
from test_repair import calibration, some_masks
torch.set_num_threads(1)
px.distributed.processes()
model = build("hf vit")
masks = some_masks(model)
px.reconstruct_(model, masks, calibration("hf vit", 30), method="blocks", epochs=2, progress=False)
few = build("hf vit")
px.reconstruct_(few, masks, [calibration("hf vit")[0][:1]], method="network", epochs=1, progress=False)
model.few = few  # of two processes one has no image
rank = dist.get_rank() if dist.is_initialized() else 0
torch.save(model.state_dict(), f"{sys.argv[1]}/{rank}.pt")
"""


def test_the_same_weights_on_two_processes(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    found = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        out.mkdir()
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*(run if processes > 1 else [sys.executable]), str(tmp_path / "script.py"), str(out)],
            env=environment(), capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found += [torch.load(out / f"{rank}.pt") for rank in range(processes)]
    for key, value in found[0].items():
        assert torch.equal(found[1][key], found[2][key])
        torch.testing.assert_close(found[1][key], value, rtol=1e-5, atol=1e-6)
