"""`px.reconstruct_(method="blocks")`: whole blocks are matched, zeros stay."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import build
from test_repair import calibration, some_masks

import px_hf as px


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


def test_blocks_by_name() -> None:
    model = build("hf vit").eval()
    masks = some_masks(model)
    name = next(n for n, m in model.named_modules() if type(m).__name__ == "ViTLayer")
    report = px.reconstruct_(
        model, masks, calibration("hf vit"), method="blocks", blocks=[name], epochs=1, progress=False
    )
    assert [block.name for block in report.blocks] == [name]
    assert {layer.name for layer in report.layers} == set(masks)


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [("cnn", None, "no repeated blocks"), ("hf vit", ["nowhere"], "nowhere is no module")],
)
def test_no_such_blocks(name: str, blocks: list[str] | None, message: str) -> None:
    model = build(name)
    masks = some_masks(model)
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.reconstruct_(model, masks, calibration(name), method="blocks", blocks=blocks, progress=False)
