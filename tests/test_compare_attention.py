"""recipes/compare_attention.py: what each policy does to queries and keys, and to nothing else."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from networks import build, images

import px_hf as px
from px_hf.commands import compare_attention, compare_criteria
from px_hf.commands.compare_attention import POLICIES, QueriesKeys
from px_hf.comparison.cell import Cell
from px_hf.runs.arguments import DEMO_MODELS

ATTENTION = [f"vit.layers.{layer}.attention." for layer in range(2)]
PROJECTIONS = {f"{name}{one}_proj.weight" for name in ATTENTION for one in "qk"}


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_differ_in_queries_and_keys_alone(policy: str) -> None:
    model, batches = build("hf vit").double(), [images(dtype=torch.float64)]
    expected = px.PX(paths="active").score(model, batches)
    scores = QueriesKeys(policy, power=1).score(model, batches)
    for name, score in scores.items():
        if name not in PROJECTIONS:
            torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=0)
    fisher = px.NTKTrace(probes=1).score(model, batches)
    parameters = dict(model.named_parameters())
    for layer in ATTENTION:
        values = float(scores[f"{layer}v_proj.weight"].sum())
        for name in (f"{layer}q_proj.weight", f"{layer}k_proj.weight"):
            score = scores[name]
            if policy == "dense":
                assert float(score.min()) > max(float(s.max()) for n, s in scores.items() if n not in PROJECTIONS)
                continue
            assert not torch.allclose(score, expected[name], rtol=0.01)
            assert float(score.sum()) == pytest.approx(values, rel=1e-9)
            if policy == "means":
                continue
            inside = fisher[name] if policy == "fisher" else parameters[name].detach().square()
            torch.testing.assert_close(score / score.sum(), inside / inside.sum(), rtol=1e-6, atol=0)


def test_pruned_weights_stay_pruned() -> None:
    model, batches = build("hf vit"), [images()]
    for policy in POLICIES:
        masks = px.prune(model, batches, QueriesKeys(policy), sparsity=0.3, rounds=3, progress=False)
        assert masks.sparsity == pytest.approx(0.3, abs=1e-3)
        kept = [float(masks[name].double().mean()) for name in PROJECTIONS]
        assert min(kept) == 1 if policy == "dense" else 0.2 < min(kept) < 1


def test_cells_bring_their_policies_to_other_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Cell] = []
    monkeypatch.setattr(compare_criteria, "prepare", lambda *_: tmp_path)
    monkeypatch.setattr(compare_criteria, "results", lambda cells, workers: seen.extend(cells) or [])
    before = dict(px.CRITERIA)
    compare_attention.main(["--output_dir", str(tmp_path), "--workers", "2", "--sparsities", "0.5"])
    methods = [cell.method for cell in pickle.loads(pickle.dumps(seen)) if cell.method is not None]
    assert [method.text for method in methods] == ["px-active", *(f"qk-{policy}" for policy in POLICIES)]
    assert [method.criterion for method in methods[1:]] == [QueriesKeys(policy) for policy in POLICIES]
    assert before == px.CRITERIA


def test_its_methods_give_way_to_those_of_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("methods: [qk-means, magnitude]\nsparsities: [0.5]\n")
    seen: list[Cell] = []
    monkeypatch.setattr(compare_criteria, "prepare", lambda *_: tmp_path)
    monkeypatch.setattr(compare_criteria, "results", lambda cells, workers: seen.extend(cells) or [])
    compare_attention.main(["--config", str(config), "--output_dir", str(tmp_path)])
    assert [cell.key()["method"] for cell in seen] == ["dense", "qk-means", "magnitude"]


@pytest.mark.slow
def test_with_two_workers(tmp_path: Path) -> None:
    words = ["--model_name_or_path", str(DEMO_MODELS / "vit"), "--methods", "qk-spread", "--workers", "2"]
    words += ["--sparsities", "0.5", "--rounds", "1", "--examples_per_class", "2", "--num_train_epochs", "0"]
    compare_attention.main([*words, "--max_train_samples", "200", "--output_dir", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {line["key"]["method"] for line in lines} == {"dense", "qk-spread"}
