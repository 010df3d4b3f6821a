"""`px.reconstruct_(method="blocks")`: whole blocks are matched, zeros stay."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import build
from test_repair import calibration, some_masks

import px_hf as px
from px_hf.repair.blocks import relative_square
from px_hf.repair.views import views


@pytest.mark.parametrize("name", ["hf vit", "timm vit"])
def test_blocks_come_nearer_and_zeros_stay(name: str) -> None:
    dense = build(name).eval()
    with torch.no_grad():
        for weight in dense.parameters():
            if weight.dim() == 2:
                weight.mul_(6)  # from an initialisation at which blocks do next to nothing
    masks = some_masks(dense)
    layers, blocks = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = calibration(name, 40)
    px.reconstruct_(layers, masks, batches, progress=False)
    report = px.reconstruct_(blocks, masks, batches, method="blocks", epochs=4, rate=3e-3, progress=False)
    assert [block.name.rpartition(".")[2] for block in report.blocks] == ["0", "1"]
    assert all(block.held_out_after <= block.held_out_before for block in report.blocks)
    assert any(block.repaired for block in report.blocks)
    assert not masks.revived(blocks)
    changed = {key for key, value in blocks.state_dict().items() if not torch.equal(value, layers.state_dict()[key])}
    assert any("norm" in key for key in changed)
    assert all(any(block.name in key for block in report.blocks) for key in changed)
    assert not any(p.grad is not None for p in blocks.parameters())


def test_the_class_token_counts_as_much_as_all_tokens() -> None:
    torch.manual_seed(0)
    output, target = torch.randn(3, 5, 4), torch.randn(3, 5, 4) + 2

    def ratio(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        pairs = list(zip(ours.flatten().tolist(), theirs.flatten().tolist(), strict=True))
        return sum((a - b) ** 2 for a, b in pairs) / sum(b**2 for _, b in pairs)

    every, first = ratio(output, target), ratio(output[:, 0], target[:, 0])
    assert float(relative_square(output, target)) == pytest.approx(every, rel=1e-5)
    assert float(relative_square(output, target, True)) == pytest.approx((every + first) / 2, rel=1e-5)
    maps = output[..., None], target[..., None]  # no tokens
    assert float(relative_square(*maps, True)) == pytest.approx(every, rel=1e-5)


@pytest.mark.parametrize("method", ["blocks", "network"])
def test_whether_the_class_token_counts_is_told_to_blocks_and_network(method: str) -> None:
    reports = []
    for weight in (50.0, 1.0):
        model = build("hf vit").eval()
        settings = {"class_token": weight, "epochs": 1, "ridge": 1e9, "progress": False}  # layers stay as they are
        reports.append(px.reconstruct_(model, some_masks(model), calibration("hf vit"), method=method, **settings))
    assert reports[0].blocks[0].error_before != pytest.approx(reports[1].blocks[0].error_before, rel=1e-4)


def test_blocks_by_name() -> None:
    model = build("hf vit").eval()
    masks = some_masks(model)
    name = next(n for n, m in model.named_modules() if type(m).__name__ == "ViTLayer")
    report = px.reconstruct_(
        model, masks, calibration("hf vit"), method="blocks", blocks=[name], epochs=1, progress=False
    )
    assert [block.name for block in report.blocks] == [name]
    assert {layer.name for layer in report.layers} == set(masks)
    few = px.Masks({key: mask for key, mask in masks.items() if key.startswith(f"{name}.")})
    model = build("hf vit").eval()
    report = px.reconstruct_(
        model, few, calibration("hf vit"), method="blocks", blocks=[name], epochs=1, progress=False
    )
    assert [block.name for block in report.blocks] == [name]


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [("cnn", None, "no repeated blocks"), ("hf vit", ["nowhere"], "nowhere is no module")],
)
def test_no_such_blocks(name: str, blocks: list[str] | None, message: str) -> None:
    model = build(name)
    masks = some_masks(model)
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.reconstruct_(model, masks, calibration(name), method="blocks", blocks=blocks, progress=False)


@pytest.mark.filterwarnings("ignore:.*have more inputs than samples")
@pytest.mark.parametrize(("name", "augment"), [("hf vit", True), ("hf vit", False), ("cnn", False)])
def test_the_network_comes_nearer_and_zeros_stay(name: str, augment: bool) -> None:
    dense = build(name).eval()
    with torch.no_grad():
        for weight in dense.parameters():
            if weight.dim() == 2:
                weight.mul_(6)
    masks = some_masks(dense)
    layers, network = copy.deepcopy(dense), copy.deepcopy(dense)
    batches = calibration(name, 40)
    px.reconstruct_(layers, masks, batches, progress=False)
    told = px.reconstruct_(
        network, masks, batches, method="network", epochs=4, rate=3e-3, augment=augment, progress=False
    )
    (row,) = told.blocks
    assert row.repaired
    assert row.held_out_after < row.held_out_before
    assert not masks.revived(network)
    unmasked = {key for key, value in dense.named_parameters() if value.dim() > 1 and key not in masks}
    after = dict(network.named_parameters())
    assert all(torch.equal(after[key], dict(dense.named_parameters())[key]) for key in unmasked)
    assert not any(p.grad is not None for p in network.parameters())

    def distance(model: torch.nn.Module) -> float:
        """The mean over blocks of ‖ĥ − h‖² / ‖h‖² on the images held out, another way."""
        paths = [n for n, m in dense.named_modules() if type(m).__name__ == "ViTLayer"]
        found, wanted = (
            [_output(net, path, torch.cat(batches)[1::5]) for path in paths or [""]] for net in (model, dense)
        )
        gaps = [float((a - b).square().sum() / b.square().sum()) for a, b in zip(found, wanted, strict=True)]
        return (sum(gaps) / len(gaps)) ** 0.5

    assert distance(layers) == pytest.approx(row.held_out_before, rel=0.1)
    assert distance(network) == pytest.approx(row.held_out_after, rel=0.1)


@torch.no_grad()
def _output(model: torch.nn.Module, path: str, images: torch.Tensor) -> torch.Tensor:
    """What a module of the model returns; of the model itself, the logits."""
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, output: outputs.append(output))
    model(images)
    handle.remove()
    return getattr(outputs[0], "logits", outputs[0])


def test_views_are_crops_and_mirror_images_of_their_own_seed() -> None:
    x = torch.linspace(0, 1, 32)
    images = torch.stack((x.expand(32, 32), x[:, None].expand(32, 32)))[None].repeat(40, 1, 1, 1)  # places: x, y
    found = views(images, 3)
    assert torch.equal(found, views(images, 3))
    assert not torch.equal(found, views(images, 4))
    assert found.shape == images.shape
    across, down = found[:, 0].diff(dim=2)[:, :, 8:24].mean((1, 2)), found[:, 1].diff(dim=1)[:, 8:24].mean((1, 2))
    share = (across * down).abs() * 31**2
    assert 0.36 < share.min() < 0.6 < 0.9 < share.max() < 1.05
    assert 0.7 < (across / down).abs().min() < (across / down).abs().max() < 1.4
    assert 8 < (across < 0).sum() < 32  # mirrored
    assert (down > 0).all()
    assert found.min() >= 0
    assert found.max() <= 1
