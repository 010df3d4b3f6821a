"""recipes/prune_finetune.py --lora: adapters are trained under the masks, and merged with the zeros kept."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_recipe import RECIPE, environment
from transformers import AutoModelForImageClassification

import px_hf as px
from px_hf.commands import prune_finetune
from px_hf.runs.lora_arguments import LoraArguments

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
"""peft asks transformers for it by its old name."""


def settings(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / out), "--lora"),
        *("--max_train_samples", "200", "--max_eval_samples", "40", "--num_train_epochs", "2", "--rounds", "2"),
        *("--examples_per_class", "5", "--learning_rate", "0.01", "--disable_tqdm", "true", "--sparsity", "0.7"),
        *("--compare_dense", "false", "--report_to", "none", *more),
    ]


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """A whole run, in a process of its own."""
    command = [sys.executable, RECIPE, *settings(folder, "finished", "--compare_dense", "true")]
    done = subprocess.run(
        command, env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "finished", done.stdout


def test_a_run_saves_an_ordinary_sparse_model(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert "parameters train" in printed
    masks = px.Masks.from_pretrained(out)
    assert masks.sparsity == pytest.approx(0.7, abs=1e-3)
    model, found = AutoModelForImageClassification.from_pretrained(out, output_loading_info=True)
    assert not masks.revived(model)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert px.inspect(out).problems == ()
    told = json.loads((out / "all_results.json").read_text())
    assert told["lora"] == {"rank": 8, "alpha": 16.0, "targets": "all"} == px.inspect(out).provenance["lora"]
    assert told["dense_eval_accuracy"] > 0.15  # chance is 0.1


def test_kept_weights_head_and_norms_have_learned(finished: tuple[Path, str]) -> None:
    out, _ = finished
    before = load_file(out.parent / "backbone" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    same = {name for name in before if torch.equal(before[name], after[name])}
    masks = px.Masks.from_pretrained(out)
    for name, mask in masks.items():
        assert (after[name][mask] != before[name][mask]).any(), name
        assert not after[name][~mask].any()
    assert not [name for name in same if "normalization.weight" in name or "running_mean" in name]


def test_a_checkpoint_holds_adapters_and_a_resumed_run_gives_the_same_model(
    finished: tuple[Path, str], folder: Path
) -> None:
    out, _ = finished
    first = min(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert (first / "adapter_model.safetensors").is_file()
    assert not (first / "model.safetensors").exists()
    prune_finetune.main(settings(folder, "resumed", "--resume_from_checkpoint", str(first)))
    expected = load_file(out / "model.safetensors")
    resumed = load_file(folder / "resumed" / "model.safetensors")
    assert not [name for name, tensor in expected.items() if not torch.equal(tensor, resumed[name])]
    with pytest.raises(px.InvalidArgumentError, match=r"lora: .*'rank': 8.* then, .*'rank': 4.* now"):
        prune_finetune.main(settings(folder, "other", "--lora_rank", "4", "--resume_from_checkpoint", str(first)))
    without = [word for word in settings(folder, "other", "--resume_from_checkpoint", str(first)) if word != "--lora"]
    with pytest.raises(px.InvalidArgumentError, match=r"lora: .* then, None now"):
        prune_finetune.main(without)
    assert not (folder / "other").exists()


@pytest.mark.slow
def test_two_processes_train_the_same_adapters_under_the_same_masks(finished: tuple[Path, str], folder: Path) -> None:
    """The batches of both together are those of the one process, but BatchNorm sees those of its own."""
    words = settings(folder, "two", "--per_device_train_batch_size", "16", "--save_strategy", "no")
    command = [sys.executable, "-m", "px_hf", "prune", "--num_processes", "2", *words]
    done = subprocess.run(
        command, env=environment(folder, ACCELERATE_USE_CPU="true"), cwd=folder, capture_output=True, text=True,
        timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    masks = px.Masks.from_pretrained(folder / "two")
    assert masks == px.Masks.from_pretrained(finished[0])
    assert px.inspect(folder / "two").problems == ()
    model, found = AutoModelForImageClassification.from_pretrained(folder / "two", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not masks.revived(model)
    before, alone, both = (load_file(folder / name / "model.safetensors") for name in ("backbone", "finished", "two"))
    for name, mask in masks.items():
        one, other = ((after[name] - before[name])[mask] for after in (alone, both))
        assert float(torch.cosine_similarity(one, other, dim=0)) > 0.6, name
        assert float(other.norm() / one.norm()) == pytest.approx(1, abs=0.3), name


def test_a_sparse_model_is_adapted_with_its_masks(finished: tuple[Path, str], folder: Path) -> None:
    words = settings(folder, "further", "--keep_masks", "--lora_targets", "convolution", "--lora_alpha", "4")
    words[1] = str(finished[0])
    prune_finetune.main(words)
    assert px.Masks.from_pretrained(folder / "further") == px.Masks.from_pretrained(finished[0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--schedule", "gradual"],
            "--lora trains adapters under masks that are found before, and --schedule",
        ),
        (["--lora_rank", "0"], "--lora_rank 0: expected 1 or more"),
        (["--lora_alpha", "-1"], "--lora_alpha -1.0: expected a positive number"),
        (["--lora_targets", "q_proj"], "no layer that can have an adapter is called q_proj. There are convolution"),
    ],
)
def test_bad_settings(folder: Path, more: list[str], message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        prune_finetune.main(settings(folder, "bad", *more))
    assert not (folder / "bad" / "config.json").exists()


def test_settings_without_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(px.InvalidArgumentError, match="need --lora"):
        prune_finetune.parse(["--lora_rank", "4"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(px.DependencyError, match=r"px-hf\[peft\]"):
        LoraArguments(lora=True).check_lora()
