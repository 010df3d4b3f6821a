"""recipes/compare_tickets.py and recipes/lotus.py on the demo ViT, with little data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import px_hf as px
from px_hf.commands import compare_tickets, lotus

SMALL = [
    "--dataset_name", "digits", "--max_train_samples", "128", "--max_eval_samples", "40", "--num_train_epochs", "1",
    "--examples_per_class", "2",
]  # fmt: skip
VIT = str(Path(__file__).parents[1] / "recipes" / "demo" / "vit")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_two_recipes(tmp_path: Path) -> None:
    words = [*SMALL, "--model_name_or_path", VIT, "--output_dir", str(tmp_path)]
    compare_tickets.main([*words, "--methods", "full", "head", "norms", "fisher", "fisher:random"])
    found = {line["key"]["method"]: line for line in lines(tmp_path)}
    assert found["fisher"]["weights"] == found["fisher:random"]["weights"] > 0
    assert found["fisher"]["rows"] == pytest.approx(0.1 * found["fisher"]["of_rows"], abs=1)
    assert found["head"]["moved"] < found["norms"]["moved"] < found["fisher"]["moved"] < found["full"]["moved"]
    assert "| fisher:random |" in (tmp_path / "results.md").read_text()
    (tmp_path / "results.jsonl").unlink()

    lotus.main([*words, "--criteria", "none", "magnitude"])
    read = {(line["key"]["method"], line["key"]["reading"]): line for line in lines(tmp_path)}
    assert len(read) == 10
    assert read["none", "tickets"]["macs"] < 0.62 * read["none", "all"]["macs"]
    assert read["none", "tickets, equal time"]["epochs"] > read["none", "tickets"]["epochs"] == 1
    before = (tmp_path / "results.jsonl").read_text()
    lotus.main([*words, "--criteria", "none", "magnitude"])
    assert (tmp_path / "results.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (compare_tickets.main, ["--methods", "best"]),
        (compare_tickets.main, ["--alpha", "2"]),
        (compare_tickets.main, ["--fraction", "0"]),
        (lotus.main, ["--keep", "0"]),
        (lotus.main, ["--criteria", "best"]),
        (lotus.main, ["--layers", "0"]),
    ],
)
def test_bad_arguments(main, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(px.InvalidArgumentError):
        main([*words, "--output_dir", str(tmp_path)])
