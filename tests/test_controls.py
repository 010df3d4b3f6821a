"""Controls keep what they say and destroy the rest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from networks import build, images
from test_recipe import run_here, settings

import px_hf as px
from px_hf.controls import CONTROLS, apply_control_, permute_units, reinitialize_, shuffle


@pytest.fixture(scope="module")
def masks() -> px.Masks:
    return px.prune(build("hf vit"), [images()], px.Magnitude(), sparsity=0.7, progress=False)


def counts(masks: px.Masks) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks.items()}


@pytest.mark.parametrize("control", [shuffle, permute_units])
def test_masks_keep_their_layer_densities_and_nothing_else(control, masks: px.Masks) -> None:
    found = control(masks)
    assert list(found) == list(masks)
    assert counts(found) == counts(masks)
    assert not any(torch.equal(found[name], masks[name]) for name in masks)
    assert found == control(masks)
    assert found != control(masks, seed=1)


def test_a_shuffled_mask_is_random() -> None:
    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[:30] = True
    found = shuffle(px.Masks({"a": mask}))["a"]
    per_row = found.sum(1).double()
    assert float(per_row.mean()) == 30
    assert float(per_row.std()) == pytest.approx(math.sqrt(100 * 0.3 * 0.7), rel=0.3)  # binomial


def test_permuted_units_keep_their_degrees(masks: px.Masks) -> None:
    found = permute_units(masks)
    for name, mask in masks.items():
        for axis in (0, 1):
            assert sorted(found[name].sum(axis).tolist()) == sorted(mask.sum(axis).tolist())
    kernel = torch.rand(6, 4, 3, 3) > 0.5
    found_kernel = permute_units(px.Masks({"a": kernel}))["a"]
    kernels = sorted(k.flatten().tolist() for k in kernel.flatten(0, 1))
    assert sorted(k.flatten().tolist() for k in found_kernel.flatten(0, 1)) == kernels


def test_reinitialised_weights_are_he_normal_and_masked(masks: px.Masks) -> None:
    model = build("hf vit")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    reinitialize_(model, masks)
    assert not masks.revived(model)
    for name, p in model.named_parameters():
        if name in masks:
            assert not torch.equal(p, before[name] * masks[name])
            kept = p.detach()[masks[name]]
            assert float(kept.std()) == pytest.approx(math.sqrt(2 / p.shape[1]), rel=0.35)
        else:
            assert torch.equal(p, before[name])
    again = build("hf vit")
    reinitialize_(again, masks)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in again.named_parameters())


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_by_name(name: str, masks: px.Masks) -> None:
    model = build("hf vit")
    weights = model.get_parameter(next(iter(masks))).detach().clone()
    found = apply_control_(name, model, masks)
    assert (found == masks) == (name in ("none", "reinitialize"))
    same = torch.equal(model.get_parameter(next(iter(masks))), weights)
    assert same == (name != "reinitialize")


def test_an_unknown_control_is_an_error(masks: px.Masks) -> None:
    with pytest.raises(px.InvalidArgumentError, match=r"'rewind'.*'shuffle'"):
        apply_control_("rewind", build("hf vit"), masks)
    with pytest.raises(px.TargetError, match="do not fit"):
        reinitialize_(build("cnn"), masks)


def test_the_recipe_trains_a_control(folder: Path) -> None:
    found = {}
    for control in ("none", "shuffle"):
        more = ["--control", control, "--num_train_epochs", "0.2", "--criterion", "magnitude"]
        run_here(settings(folder, control, *more))
        found[control] = px.Masks.from_pretrained(folder / control)
        results = json.loads((folder / control / "all_results.json").read_text())
        assert results["control"] == control
    assert found["shuffle"] == shuffle(found["none"], seed=42)  # the default --seed
    assert found["shuffle"] != found["none"]
