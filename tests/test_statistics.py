"""Repair by statistics: BatchNorm measured anew, means and deviations matched, removed units folded."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networks
import pytest
import torch
from statistics_process import REPAIRS, repaired
from test_processes import environment
from torch import Tensor, nn

import px_hf as px
from px_hf.model.inputs import Inputs, run
from px_hf.repair.affine import affine_layers

HERE = Path(__file__).parent


def network(name: str) -> nn.Module:
    return networks.build(name).double().eval()


def images(name: str, count: int, seed: int = 1) -> Tensor:
    size = networks.sizes(name)
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pruned(model: nn.Module, sparsity: float = 0.5) -> px.Masks:
    return px.prune(model, [], px.Magnitude(), sparsity=sparsity, scope="layer", progress=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


# ------------------------------------------------------------------------------------------------ BatchNorm


@pytest.mark.parametrize("name", ["hf resnet", "timm resnet"])
def test_with_one_batch_the_statistics_are_those_of_torch(name: str) -> None:
    """torch's train mode with momentum 1 is the oracle."""
    model, x = network(name), images(name, 5)
    oracle = copy.deepcopy(model)
    for norm in (m for m in oracle.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        oracle(x)
    norms = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert px.recalibrate_batchnorm_(model, [x]) == norms > 5
    for name_, expected in oracle.state_dict().items():
        if "running" in name_:
            torch.testing.assert_close(model.state_dict()[name_], expected, rtol=1e-9, atol=1e-9)


def test_batches_of_any_sizes_are_weighted_by_their_images() -> None:
    model, x = network("hf resnet"), images("hf resnet", 7)
    px.recalibrate_batchnorm_(model, [x[:4], x[4:5], {"pixel_values": x[5:]}])
    first = model.resnet.embedder.embedder
    with torch.no_grad():
        inside = first.convolution(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(first.normalization.running_mean, inside.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.normalization.running_var, inside.var(1), rtol=1e-12, atol=1e-12)


def test_nothing_else_changes() -> None:
    model = network("timm resnet")
    model.train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    before, random = state(model), torch.get_rng_state()
    loader = torch.utils.data.DataLoader(images("timm resnet", 6), batch_size=4, shuffle=True)
    px.recalibrate_batchnorm_(nn.DataParallel(model), loader)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    changed = {name.split(".")[-1] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"running_mean", "running_var"}
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.1}


@pytest.mark.parametrize("model", [networks.hf_vit(), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))])
def test_without_batchnorm_there_is_nothing_to_do(model: nn.Module) -> None:
    assert px.recalibrate_batchnorm_(model, []) == 0


@pytest.mark.parametrize("bad", [0, 1], ids=["first batch", "second batch"])
def test_statistics_that_are_not_finite_are_refused(bad: int) -> None:
    model, x = network("hf resnet"), images("hf resnet", 4)
    x[2 * bad] = float("nan")
    before = state(model)
    with pytest.raises(px.NonFiniteError, match=r"not finite: resnet\.embedder"):
        px.recalibrate_batchnorm_(model, [x[:2], x[2:]])
    assert_same(state(model), before)
    with pytest.raises(px.DataError, match="empty"):
        px.recalibrate_batchnorm_(model, [])
    assert_same(state(model), before)


# ------------------------------------------------------------------------------------------------ means


def moments(model: nn.Module, masks: px.Masks, x: Tensor, behind_norm: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of what each masked layer returns, or the BatchNorm behind it."""
    layers, _ = affine_layers(model, masks, Inputs(x[:1]))
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer in layers:

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = layer.name, dim: int = layer.dim) -> None:
            rows = output.movedim(dim, 0).flatten(1)
            found[name] = rows.mean(1), rows.std(1)

        watched = layer.norm if behind_norm and layer.norm is not None else layer.module
        handles.append(watched.register_forward_hook(hook))
    with torch.no_grad():
        run(model, Inputs(x))
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("name", ["hf vit", "hf resnet", "timm vit"])
@pytest.mark.parametrize("repeat", [1, 3])
def test_means_are_those_of_the_dense_network(name: str, scale: bool, repeat: int) -> None:
    """Exactly, on one batch or several equal ones; through all layers, each with those before it corrected."""
    dense, x = network(name), images(name, 6)
    model, masks = copy.deepcopy(dense), pruned(dense)
    report = px.correct_(model, masks, [x] * repeat, scale=scale)
    assert report.images == 6 * repeat
    assert {*report.corrected} | {*report.skipped} == {*masks}
    assert not masks.revived(model)
    expected, found = (moments(each, masks, x, behind_norm=True) for each in (dense, model))
    for weight in report.corrected:
        torch.testing.assert_close(found[weight][0], expected[weight][0], rtol=1e-8, atol=1e-8)
        if scale:
            alive = found[weight][1] > 1e-9
            assert alive.any()
            torch.testing.assert_close(found[weight][1][alive], expected[weight][1][alive], rtol=1e-7, atol=1e-8)
    masks.apply_(dense)
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, dense.state_dict()[n])}
    assert changed
    assert all(n.endswith(("bias", "running_mean")) or (scale and n in masks) for n in changed)


def test_over_unlike_batches_the_mean_is_that_of_all_images() -> None:
    """Of a linear layer: later layers see what a batch makes of the ones before."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Tanh(), nn.Linear(8, 5)).double()
    model, masks, x = copy.deepcopy(dense), pruned(dense), images("mlp", 7)
    x[4:] += 2
    px.correct_(model, masks, [x[:4], x[4:]])
    with torch.no_grad():
        expected, found = dense[:2](x), model[:2](x)
    torch.testing.assert_close(found.mean(0), expected.mean(0), rtol=1e-10, atol=1e-10)


def test_a_model_that_is_zero_already_and_its_parent_give_the_same() -> None:
    dense, x = network("hf vit"), images("hf vit", 4)
    one, two, masks = copy.deepcopy(dense), copy.deepcopy(dense), pruned(dense)
    masks.apply_(two)
    px.correct_(one, masks, [x], scale=True)
    px.correct_(two, masks, [x], dense=dense, scale=True)
    assert_same(state(one), state(two))


def test_layers_that_cannot_take_a_constant_are_named() -> None:
    model, masks = network("cnn"), pruned(network("cnn"))
    report = px.correct_(model, masks, [images("cnn", 3)])
    assert report.corrected == ()
    assert set(report.skipped) == {*masks}
    assert all("no bias" in why for why in report.skipped.values())
    torchvision = network("torchvision vit")
    report = px.correct_(torchvision, pruned(torchvision), [images("torchvision vit", 3)])
    assert any("MultiheadAttention" in why for why in report.skipped.values())
    assert any("mlp" in name for name in report.corrected)


Change = Callable[[nn.Module, px.Masks, Tensor], Any]

REFUSED: list[tuple[str, Change, type[px.PxError], str]] = [
    ("no parent", lambda m, k, x: (k.apply_(m), px.correct_(m, k, [x])), px.InvalidArgumentError, "dense="),
    ("no parent", lambda m, k, x: (k.apply_(m), px.fold_removed_(m, k, [x])), px.InvalidArgumentError, "dense="),
    ("other dense", lambda m, k, x: px.correct_(m, k, [x], dense=networks.mlp()), px.TargetError, "do not fit"),
    ("other dense", lambda m, k, x: px.fold_removed_(m, k, [x], dense=networks.mlp()), px.TargetError, "do not fit"),
    ("other masks", lambda m, k, x: px.correct_(m, px.Masks({"a": torch.ones(1) > 0}), [x]), px.TargetError, "'a'"),
    ("no images", lambda m, k, x: px.correct_(m, k, []), px.DataError, "empty"),
    ("no images", lambda m, k, x: px.fold_removed_(m, k, []), px.DataError, "empty"),
    ("an iterator", lambda m, k, x: px.fold_removed_(m, k, iter([x])), px.DataError, "iterator"),
    ("nan", lambda m, k, x: px.correct_(m, k, [x, x / 0]), px.NonFiniteError, "not finite"),
    ("nan", lambda m, k, x: px.fold_removed_(m, k, [x, x / 0]), px.NonFiniteError, "not finite"),
    ("ridge", lambda m, k, x: px.fold_removed_(m, k, [x], ridge=0), px.InvalidArgumentError, "> 0"),
    ("ridge", lambda m, k, x: px.fold_removed_(m, k, [x], ridge=True), px.InvalidArgumentError, "> 0"),
    ("compensate", lambda m, k, x: px.fold_removed_(m, k, [x], compensate="all"), px.InvalidArgumentError, "ridge"),
]


@pytest.mark.parametrize(("case", "repair", "error", "text"), REFUSED)
def test_what_cannot_be_repaired_is_refused(case: str, repair: Change, error: type[px.PxError], text: str) -> None:
    model = network("hf vit")
    masks = px.prune(model, [images("hf vit", 2)], px.Magnitude(), sparsity=0.3, scope="structured", progress=False)
    before = state(model)
    with pytest.raises(error, match=text):
        repair(model, masks, images("hf vit", 3))
    if case == "no parent":
        masks_applied = network("hf vit")
        masks.apply_(masks_applied)
        before = state(masks_applied)
    assert_same(state(model), before)


# ------------------------------------------------------------------------------------------------ removed units


class Plain(nn.Module):
    """Two convolutions, the second without padding, and a hidden layer: every kind of reader."""

    def __init__(self, kernel: int = 1, bias: bool = True, norm: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 6, kernel, bias=bias)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.hidden = nn.Linear(6, 10)
        self.out = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.second(torch.relu(self.first(x))))).mean((2, 3))
        return self.out(torch.relu(self.hidden(x)))


def plain(**settings: Any) -> nn.Module:
    torch.manual_seed(3)
    model = Plain(**settings).double().eval()
    if settings.get("norm"):
        nn.init.uniform_(model.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(model.norm.running_var, 0.5, 2.0)
    return model


def without(model: nn.Module, **gone: list[int]) -> px.Masks:
    """Masks of all weights but the head's that prune some inputs of some layers."""
    masks = {f"{name}.weight": torch.ones_like(getattr(model, name).weight, dtype=torch.bool) for name in gone}
    for name, columns in gone.items():
        masks[f"{name}.weight"][:, columns] = False
    return px.Masks(masks)


def inputs_and_outputs(model: nn.Module, layer: str, x: Tensor) -> tuple[Tensor, Tensor]:
    seen = []
    module = getattr(model, layer)
    dim = 1 if isinstance(module, nn.Conv2d) else -1
    handle = module.register_forward_hook(lambda m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        model(x)
    handle.remove()
    return tuple(t.movedim(dim, -1).flatten(0, -2) for t in seen[0])  # type: ignore[return-value]


@pytest.mark.parametrize("ridge", [1e-6, 0.01, 1.0])
@pytest.mark.parametrize("layer", ["out", "second"])
def test_the_fold_is_least_squares(layer: str, ridge: float) -> None:
    """torch.linalg.lstsq, the penalty as rows of its own, on what the dense layer is given."""
    dense, x, gone = plain(), images("cnn", 40), [1, 4]
    model, masks = copy.deepcopy(dense), without(dense, **{layer: gone})
    report = px.fold_removed_(model, masks, [x[:30], x[30:]], ridge=ridge)
    rows, _ = inputs_and_outputs(dense, layer, x)
    stays = [j for j in range(rows.shape[1]) if j not in gone]
    weight = getattr(dense, layer).weight.detach().flatten(1)
    centred = rows - rows.mean(0)
    penalty = (ridge * centred[:, stays].square().mean() * len(rows)).sqrt() * torch.eye(len(stays)).double()
    system = torch.cat((centred[:, stays], penalty))
    targets = torch.cat((centred[:, gone], torch.zeros(len(stays), len(gone)).double()))
    a = torch.linalg.lstsq(system, targets).solution.T
    c = rows.mean(0)[gone] - a @ rows.mean(0)[stays]
    found = getattr(model, layer)
    torch.testing.assert_close(found.weight.flatten(1)[:, stays], weight[:, stays] + weight[:, gone] @ a)
    torch.testing.assert_close(found.bias, getattr(dense, layer).bias + weight[:, gone] @ c)
    assert not found.weight.flatten(1)[:, gone].any()
    missing = (rows[:, gone] - rows[:, stays] @ a.T - c) @ weight[:, gone].T
    (told,) = report.layers
    whole = (rows @ weight.T).square().sum()
    assert told.error_after == pytest.approx(float((missing.square().sum() / whole).sqrt()), rel=1e-6)
    before = (rows[:, gone] @ weight[:, gone].T).square().sum()
    assert told.error_before == pytest.approx(float((before / whole).sqrt()), rel=1e-9)
    assert (told.removed, told.kept, report.images, report.skipped) == (2, len(stays), 40, {})


FOLDS = [
    (settings, layer, seed)
    for seed in (0, 1)
    for settings, layer in (({}, "out"), ({}, "second"), ({}, "hidden"), ({"norm": True, "bias": False}, "second"),
                            ({"bias": False}, "second"))
]  # fmt: skip


@pytest.mark.parametrize(("settings", "layer", "seed"), FOLDS)
def test_ridge_is_never_worse_than_the_mean_nor_that_than_nothing(
    settings: dict[str, Any], layer: str, seed: int
) -> None:
    """The error of the layer's own output on the images, its inputs those of the dense network."""
    dense, x = plain(**settings), images("cnn", 9, seed)
    masks = without(dense, **{layer: [0, 2, 5]})
    reads = "norm" if settings.get("norm") else layer
    _, target = inputs_and_outputs(dense, reads, x)

    def error(model: nn.Module) -> float:
        held = copy.deepcopy(dense)
        setattr(held, layer, getattr(model, layer))
        held.norm = model.norm
        return float((inputs_and_outputs(held, reads, x)[1] - target).square().sum())

    none, mean, ridge = (copy.deepcopy(dense) for _ in range(3))
    masks.apply_(none)
    px.fold_removed_(mean, masks, [x], compensate="mean")
    px.fold_removed_(ridge, masks, [x])
    if "bias" in settings and not settings.get("norm"):
        assert error(mean) == error(none)  # there is nowhere to put it
    else:
        assert error(mean) < error(none)
    assert error(ridge) < error(mean)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_unit_that_others_tell_exactly_is_not_missed(kernel: int) -> None:
    dense, x = plain(kernel=kernel), images("cnn", 20)
    with torch.no_grad():  # channel 1 = 2 × channel 4 + 3, also after the relu: they are positive
        dense.first.weight[1], dense.first.bias[1] = 2 * dense.first.weight[4], 203.0
        dense.first.bias[4] = 100.0
        expected = dense(x)
    model, masks = copy.deepcopy(dense), without(dense, second=[1])
    px.fold_removed_(model, masks, [x[:10]], ridge=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(network_without(dense, masks)(x), expected, rtol=1e-2, atol=1e-2)


def network_without(dense: nn.Module, masks: px.Masks) -> nn.Module:
    model = copy.deepcopy(dense)
    masks.apply_(model)
    return model


@pytest.mark.parametrize("name", ["hf vit", "timm vit", "hf resnet", "torchvision vit"])
def test_folded_units_are_taken_out(name: str) -> None:
    dense, x = network(name), images(name, 8)
    masks = px.prune(dense, [x], px.Magnitude(), sparsity=0.3, scope="structured", progress=False)
    model, fingerprint = copy.deepcopy(dense), masks.fingerprint()
    report = px.fold_removed_(model, masks, [x])
    assert masks.fingerprint() == fingerprint
    assert not masks.revived(model)
    assert len(report.layers) > 1
    assert all(0 <= layer.error_after <= layer.error_before for layer in report.layers)
    small, _ = px.shrink(model, masks, x[:1])
    with torch.no_grad():
        found, expected = run(small, Inputs(x)), run(model, Inputs(x))
    torch.testing.assert_close(found, expected)
    again = network_without(dense, masks)
    px.fold_removed_(again, masks, [x], dense=dense)
    assert_same(state(again), state(model))


def test_masks_that_remove_no_unit_are_only_applied() -> None:
    model, expected = network("hf vit"), network("hf vit")
    masks = pruned(model, 0.2)
    assert px.fold_removed_(model, masks, [images("hf vit", 2)]).layers == ()
    masks.apply_(expected)
    assert_same(state(model), state(expected))


def test_a_layer_that_loses_all_inputs_keeps_their_mean() -> None:
    dense, x = plain(), images("cnn", 6)
    model = copy.deepcopy(dense)
    px.fold_removed_(model, without(dense, out=list(range(10))), [x])
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x).mean(0).expand(6, 5))


# ------------------------------------------------------------------------------------------------ processes


def test_processes_share_the_images_and_find_the_same(tmp_path: Path) -> None:
    """Two batches of unlike sizes for three processes, of which one has none."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [*launcher, str(HERE / "statistics_process.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    expected = [repaired(name).state_dict() for name in REPAIRS]
    for rank in range(3):
        for one, other in zip(torch.load(tmp_path / f"{rank}.pt"), expected, strict=True):
            assert_same(one, other)
