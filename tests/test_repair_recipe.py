"""`--repair` and `--num_train_epochs 0`: prune, repair, evaluate, save, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import px_hf as px
from px_hf.commands import prune_finetune
from px_hf.comparison.method import Method
from px_hf.repair.by_name import removes_units


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ResNet that tells ten classes apart, badly."""
    folder = tmp_path_factory.mktemp("repair") / "backbone"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10)
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def prune(backbone: Path, out: str, *more: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, torch.Tensor]]:
    """all_results.json, the entry of px_hf in config.json, and the weights."""
    folder = backbone.parent / out
    prune_finetune.main([
        *("--model_name_or_path", str(backbone), "--output_dir", str(folder), "--num_train_epochs", "0"),
        *("--max_train_samples", "200", "--max_eval_samples", "61", "--rounds", "2", "--examples_per_class", "5"),
        *("--disable_tqdm", "true", "--sparsity", "0.5", "--criterion", "magnitude", *more),
    ])  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    return (
        json.loads((folder / "all_results.json").read_text()),
        config["px"],
        load_file(folder / "model.safetensors"),
    )


@pytest.mark.parametrize("scope", ["layer", "structured"])
def test_a_model_is_pruned_repaired_and_saved_without_training(backbone: Path, scope: str) -> None:
    results, told, weights = prune(backbone, f"repaired-{scope}", "--scope", scope, "--repair", "statistics")
    plain, untold, masked = prune(backbone, f"plain-{scope}", "--scope", scope)
    assert told["repair"] == results["repair"] == "statistics"
    assert "repair" not in untold
    assert told["masks_sha256"] == untold["masks_sha256"]
    assert "Fine-tune" not in results["seconds"]
    assert not (backbone.parent / f"repaired-{scope}" / "training_curve.png").exists()
    assert plain["dense_eval_accuracy"] == results["dense_eval_accuracy"]
    changed = {name.rpartition(".")[2] for name in weights if not torch.equal(weights[name], masked[name])}
    assert {"running_mean", "running_var"} <= changed <= {"running_mean", "running_var", "weight", "bias"}
    assert ("weight" in changed) == (scope == "structured")
    assert results["eval_loss"] != plain["eval_loss"]
    original = load_file(backbone / "model.safetensors")
    if scope == "layer":  # nothing but zeros and statistics: no step was made
        kept = {name: weights[name] != 0 for name in weights if name.endswith("convolution.weight")}
        assert all(torch.equal(weights[name][mask], original[name][mask]) for name, mask in kept.items())


@pytest.mark.parametrize("repair", ["layers", "blocks"])
def test_layers_and_blocks_are_fitted(backbone: Path, repair: str) -> None:
    results, told, weights = prune(backbone, repair, "--repair", repair, "--compare_dense", "false")
    assert told["repair"] == results["repair"] == repair
    original = load_file(backbone / "model.safetensors")
    name = next(name for name in weights if name.endswith("layers.0.layer.1.convolution.weight"))
    kept = weights[name] != 0
    assert not torch.equal(weights[name][kept], original[name][kept])


REFUSED = [
    (["--repair", "statistics", "--schedule", "gradual", "--num_train_epochs", "1"], "before training"),
    (["--repair", "statistics", "--dense"], "prunes nothing"),
    (["--repair", "statistics", "--keep_masks"], "only the sparse weights"),
    (["--schedule", "gradual"], "trains nothing"),
    (["--distill", "dense"], "trains nothing"),
]


@pytest.mark.parametrize(("arguments", "text"), REFUSED)
def test_what_contradicts_itself_is_refused(backbone: Path, arguments: list[str], text: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=text):
        prune(backbone, "refused", *arguments)
    assert not (backbone.parent / "refused").exists()


@pytest.mark.parametrize(
    ("names", "text"), [([*"0123456798"], "another order"), ([*"abcdefghij"], "10 classes"), (["a", "b"], "2 classes")]
)
def test_without_training_the_head_must_know_the_classes(
    backbone: Path, tmp_path: Path, names: list[str], text: str
) -> None:
    other = tmp_path / "backbone"
    model = ResNetForImageClassification.from_pretrained(
        backbone, num_labels=len(names), id2label=dict(enumerate(names)), ignore_mismatched_sizes=True
    )
    model.save_pretrained(other)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(other)
    with pytest.raises(px.CheckpointError, match=text):
        prune(other, "refused")


def test_a_method_of_the_comparison_is_repaired() -> None:
    assert Method.parse("magnitude:repair=statistics", 1).repair == "statistics"
    assert Method.parse("magnitude", 1).repair == "none"
    for text in ("magnitude:repair=all", "magnitude:repair=statistics:schedule=gradual"):
        with pytest.raises(px.InvalidArgumentError, match="repair"):
            Method.parse(text, 1)


MASKS = [
    (torch.ones(2, 3), False),
    (torch.tensor([[1, 0, 1], [0, 0, 0]]), True),
    (torch.tensor([[1, 0, 1], [1, 1, 1]]), False),
    (torch.tensor([[1, 0, 1], [1, 0, 1]])[..., None, None].expand(2, 3, 3, 3), True),
    (torch.eye(3)[None].expand(2, 3, 3)[..., None], False),
]


@pytest.mark.parametrize(("mask", "whole"), MASKS)
def test_whole_units_are_told_from_single_weights(mask: torch.Tensor, whole: bool) -> None:
    assert removes_units(px.Masks({"weight": mask > 0})) is whole


def test_a_model_is_rounded_before_it_is_evaluated_and_saved(backbone: Path) -> None:
    told, entry, weights = prune(backbone, "int8", "--int8")
    plain, _, before = prune(backbone, "fp32")
    assert entry["int8"] is told["int8"] is True
    assert "int8" not in plain
    smaller, larger = (results["file_bytes"]["sparse/model.safetensors"] for results in (told, plain))
    masks = px.Masks.from_pretrained(backbone.parent / "int8")
    assert smaller < larger - 2 * masks.kept
    model = px.from_pretrained(backbone.parent / "int8")
    assert set(px.round_to_int8_(model).values()) == {0.0}
    for name, mask in masks.items():
        assert not weights[name][~mask].any()
        assert 0 < float((weights[name] - before[name]).norm()) < 0.02 * float(before[name].norm()), name
