"""recipes/benchmarks/repair.py on the embedded ResNet, with few images."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

import px_hf as px

MAIN = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "benchmarks" / "repair.py"))["main"]


def run(out: Path, *more: str) -> list[dict[str, Any]]:
    MAIN([
        *("--model_name_or_path", "demo-resnet", "--fit", "train[:40]", "--test", "test[:40]", "--images", "20"),
        *("--criteria", "magnitude", "--sparsities", "0.8", "--output_dir", str(out), *more),
    ])  # fmt: skip
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("ignore:.*have more inputs than samples")
def test_figures_are_kept_and_only_missing_ones_computed(tmp_path: Path) -> None:
    lines = run(tmp_path, "--methods", "none", "layers")
    assert [line["key"]["method"] for line in lines] == ["dense", "none", "layers"]
    assert lines[0]["error"] == 0
    assert lines[2]["error"] < lines[1]["error"]
    more = run(tmp_path, "--methods", "none", "layers", "layers:in=0.4", "--repair_with", "noise")
    assert more[:3] == lines
    assert [line["key"]["with"] for line in more[3:]] == ["noise", "noise"]
    assert more[3]["error"] != more[4]["error"]
    assert "| magnitude | layers | 20 noise |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*have more inputs than samples")
def test_seeds_take_other_images(tmp_path: Path) -> None:
    lines = run(tmp_path, "--methods", "layers", "statistics", "--seeds", "0", "1")
    assert [line["key"]["seed"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert lines[1]["error"] != lines[4]["error"]
    assert "(2)" in (tmp_path / "results.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--methods", "all"], "all"), (["--fit", "nowhere"], "expected a split"), (["--fit", "train[9999:]"], "no rows"),
     (["--images", "50"], "there are 40"), (["--repair_with", "letters"], "DATASET:SPLIT")],
)  # fmt: skip
def test_bad_arguments(tmp_path: Path, more: list[str], message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        run(tmp_path, "--methods", "layers", *more)
