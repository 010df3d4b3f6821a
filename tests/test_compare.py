"""recipes/compare_criteria.py: killed and run again, in one process or several; tables; bad input."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import build, images
from PIL import Image
from test_recipe import RECIPES, environment

import px_hf as px
from px_hf.commands import compare_criteria
from px_hf.comparison import cell as comparison_cell
from px_hf.comparison import measures, results, tables
from px_hf.comparison.method import Method
from px_hf.comparison.prepared_task import load
from px_hf.comparison.training import vary

RECIPE = str(RECIPES / "compare_criteria.py")
METHODS = ["magnitude", "random:seed=3", "snip:rounds=1", "wanda:control=shuffle"]


def settings(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / out)),
        *("--methods", *METHODS, "--sparsities", "0.5", "0.9", "--seeds", "0", "1"),
        *("--max_train_samples", "300", "--max_eval_samples", "100", "--num_train_epochs", "1.5"),
        *("--examples_per_class", "3", "--rounds", "2", *more),
    ]


def lines(out: Path) -> list[dict[str, Any]]:
    """Without the times, in a fixed order."""
    found = [json.loads(text) for text in (out / "results.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds")["fine_tune"] > 0 for line in found)
    return sorted(found, key=lambda line: json.dumps(line["key"], sort_keys=True))


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run in this process that nobody disturbed."""
    compare_criteria.main(settings(folder, "whole"))
    return lines(folder / "whole")


def test_every_cell_has_a_line(whole: list[dict[str, Any]], folder: Path) -> None:
    assert len(whole) == 2 * (1 + 2 * len(METHODS))
    for line in whole:
        for measure in ("zero_shot", "fine_tuned"):
            assert line[measure].keys() == {"validation", "test"}
            assert all(0 <= accuracy <= 1 for accuracy in line[measure].values())
        assert line["key"]["model"] == "backbone"
        assert line["key"]["dataset"] == "digits"
    of = {(line["key"]["method"], line["key"]["sparsity"], line["key"]["seed"]): line for line in whole}
    assert of["dense", 0.0, 0]["fine_tuned"]["test"] > 0.15  # 300 images, six steps
    assert of["magnitude", 0.5, 0]["masks"] == of["magnitude", 0.5, 1]["masks"]
    assert of["snip:rounds=1", 0.5, 0]["masks"] != of["snip:rounds=1", 0.5, 1]["masks"]  # other images, other head
    assert of["magnitude", 0.5, 0]["forward_units"] == 0
    # 30 images, forward and backward; the head and the first layer need only half of that
    assert 2 * 30 < of["snip:rounds=1", 0.5, 0]["forward_units"] <= 3 * 30
    assert of["wanda:control=shuffle", 0.5, 0]["forward_units"] > 2 * 30
    assert (folder / "whole" / "comparison.png").stat().st_size > 10_000
    table = (folder / "whole" / "results.md").read_text()
    assert "### backbone on digits, fine-tuned" in table
    assert table.count("| snip:rounds=1 |") == 4  # fine-tuned and not, and once more over both sparsities
    values = [100 * of["magnitude", 0.9, seed]["fine_tuned"]["test"] for seed in (0, 1)]
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in table


def test_gradual_methods(folder: Path) -> None:
    """Pruned while trained: the sparsity is reached, the schedule is told apart, all rounds are counted as cost."""
    gradual = ["snip:schedule=gradual:rounds=3", "magnitude:schedule=gradual:rounds=2", "magnitude"]
    more = ["--methods", *gradual, "--sparsities", "0.9", "--seeds", "0"]
    compare_criteria.main([*settings(folder, "gradual"), *more])
    of = {line["key"]["method"]: line for line in lines(folder / "gradual")}
    assert of["magnitude:schedule=gradual:rounds=2"]["zero_shot"] is None
    assert of["magnitude:schedule=gradual:rounds=2"]["masks"] != of["magnitude"]["masks"]
    assert of["snip:schedule=gradual:rounds=3"]["forward_units"] > 3 * 2 * 30
    assert "| snip:schedule=gradual:rounds=3 |" in (folder / "gradual" / "results.md").read_text()


def test_the_rate_is_chosen_on_validation_and_the_test_split_is_reported(folder: Path) -> None:
    """Cells of both rates are computed; tables show one of them for each method, and which."""
    more = ["--methods", "magnitude", "--sparsities", "0.5", "--seeds", "0", "--learning_rate", "2e-3", "1e-9"]
    compare_criteria.main([*settings(folder, "rates"), *more])
    found = lines(folder / "rates")
    assert len(found) == 2 * 2
    best = next(
        line for line in found if line["key"]["method"] == "magnitude" and line["key"]["learning_rate"] == 2e-3
    )
    accuracy = 100 * best["fine_tuned"]["test"]
    assert f"| magnitude | {accuracy:.1f} @ 0.002 |" in (folder / "rates" / "results.md").read_text()


CHOICES = [  # rate -> seed -> (validation, test); the rate that is shown
    ({1.0: {0: (0.5, 0.9)}, 2.0: {0: (0.6, 0.1)}}, 2.0),
    ({1.0: {0: (0.7, 0.1), 1: (0.1, 0.1)}, 2.0: {0: (0.5, 0.9), 1: (0.5, 0.9)}}, 2.0),
    ({1.0: {0: (0.5, 0.5)}, 2.0: {0: (0.4, 0.5), 1: (1.0, 1.0)}}, 1.0),  # by seed 0 alone, which both have
    ({1.0: {0: (0.9, 0.9)}, 2.0: {1: (0.1, 0.1), 2: (0.1, 0.1)}}, 2.0),  # they share none
]


@pytest.mark.parametrize(("measured", "chosen"), CHOICES)
def test_the_rate_that_is_shown(measured: dict[float, dict[int, tuple[float, float]]], chosen: float) -> None:
    found = [
        {
            "key": {
                "model": "m",
                "dataset": "d",
                "method": "lamp",
                "sparsity": 0.5,
                "seed": seed,
                "learning_rate": rate,
            },
            "fine_tuned": {"validation": validation, "test": test},
            "zero_shot": None,
        }
        for rate, seeds in measured.items()
        for seed, (validation, test) in seeds.items()
    ]
    shown = results.reported(found, "test")
    assert {line["key"]["learning_rate"] for line in shown} == {chosen}
    assert {line["key"]["seed"]: line["fine_tuned"] for line in shown} == {
        s: t for s, (_, t) in measured[chosen].items()
    }
    assert all(line["zero_shot"] is None and line["rates"] == 2 for line in shown)


def test_the_picture_is_not_blank(whole: list[dict[str, Any]], folder: Path) -> None:
    pixels = np.asarray(Image.open(folder / "whole" / "comparison.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


@pytest.mark.parametrize("workers", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_lines(whole: list[dict[str, Any]], folder: Path, workers: str) -> None:
    out = folder / f"killed{workers}"
    command = [sys.executable, RECIPE, *settings(folder, out.name, "--workers", workers)]
    run = subprocess.Popen(
        command, env=environment(folder), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not ((out / "results.jsonl").exists() and len((out / "results.jsonl").read_text().splitlines()) >= 3):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    workers_alive = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    run.send_signal(signal.SIGKILL)
    run.wait()
    before = lines(out)
    assert 3 <= len(before) < len(whole)
    for pid in workers_alive:  # they end with their parent, and write nothing more
        while Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with (out / "results.jsonl").open("a") as file:
        file.write('{"key": {"method": "magni')  # as a kill in the middle of a write leaves it
    done = subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert lines(out) == whole
    assert all(line in lines(out) for line in before)


def test_more_methods_only_add_cells(whole: list[dict[str, Any]], folder: Path) -> None:
    file = folder / "whole" / "results.jsonl"
    before = file.read_text()
    more = ["--methods", "magnitude", "lamp", "--seeds", "0", "--sparsities", "0.9"]
    compare_criteria.main([*settings(folder, "whole"), *more])
    after = file.read_text()
    assert after.startswith(before)
    assert [json.loads(text)["key"]["method"] for text in after[len(before) :].splitlines()] == ["lamp"]
    file.write_text(before)


def test_a_failing_cell_is_told_and_the_others_are_kept(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = comparison_cell.prune_

    def explode(model, batches, method, sparsity, seed):
        if sparsity > 0.8:
            raise px.NonFiniteError("the loss of step 0 is not finite")
        return real(model, batches, method, sparsity, seed)

    monkeypatch.setattr(comparison_cell, "prune_", explode)
    argv = [*settings(folder, "failing"), "--methods", "magnitude", "--seeds", "0"]
    with pytest.raises(px.PxError, match=r"1 cell\(s\) failed.*magnitude at 0\.9, seed 0: NonFiniteError"):
        compare_criteria.main(argv)
    assert [line["key"]["sparsity"] for line in lines(folder / "failing")] == [0.0, 0.5]
    monkeypatch.undo()
    compare_criteria.main(argv)
    assert len(lines(folder / "failing")) == 3


def test_the_fitted_head_classifies(whole: list[dict[str, Any]], folder: Path) -> None:
    (prepared,) = (folder / "whole" / "cache").iterdir()
    task = load(prepared)
    model = task.dense_model(0, "fitted", torch.device("cpu"))
    assert measures.accuracy(model, task.train) > 0.8
    assert measures.accuracy(model, task.test) > 0.5
    fresh = task.dense_model(0, "random", torch.device("cpu"))
    assert measures.accuracy(fresh, task.test) < 0.4
    zero_shot = measures.zero_shot(task, fresh, {"test": task.test})
    assert zero_shot == {"test": measures.accuracy(model, task.test)}
    assert measures.accuracy(fresh, task.test) < 0.4  # its own head is back


def test_accuracy_under_bfloat16(whole: list[dict[str, Any]], folder: Path) -> None:
    (prepared,) = (folder / "whole" / "cache").iterdir()
    task = load(prepared)
    model = task.dense_model(0, "fitted", torch.device("cpu"))
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.logits.dtype))
    full, half = (measures.accuracy(model, task.test, bf16) for bf16 in (False, True))
    assert seen == [torch.float32, torch.bfloat16]
    assert abs(full - half) <= 0.03


def test_calibration_is_class_balanced_and_drawn_by_seed(whole: list[dict[str, Any]], folder: Path) -> None:
    (prepared,) = (folder / "whole" / "cache").iterdir()
    task = load(prepared)
    one, other = (task.calibration(3, seed, 8) for seed in (0, 1))
    assert torch.bincount(torch.cat([b["labels"] for b in one])).tolist() == [3] * 10
    assert not torch.equal(one[0]["pixel_values"], other[0]["pixel_values"])


(BUDGET,) = compare_criteria.CompareArguments(random_shift=True, horizontal_flip=True).budgets()


def test_augmentation_shifts_and_mirrors() -> None:
    ramp = torch.arange(16.0).expand(50, 3, 16, 16).contiguous()
    found = vary(ramp, np.random.default_rng(0), BUDGET)
    assert found.shape == ramp.shape
    middle = found[:, 0, 8, 8]
    assert {float(v) for v in middle} <= {6.0, 7.0, 8.0, 9.0, 10.0, 5.0}
    rising = found[:, 0, 8, 8] < found[:, 0, 8, 9]
    assert 10 < int(rising.sum()) < 40
    again = vary(ramp, np.random.default_rng(0), BUDGET)
    assert torch.equal(found, again)


COSTS = [
    ("magnitude", 0, 0),
    ("synflow", 2 / 12, 8 / 12),  # one image, whatever the batch
    ("px", 1, 3),
    ("snip", 2, 3),
    ("ntk-sap", 4, 6),
    ("grasp", 7, 13),
    ("ntk-trace-sampled", 4, 6),
    ("ntk-trace:probes=3", 6, 12),
    ("gem-miner:epochs=2", 4, 6),
]


@pytest.mark.parametrize(("text", "least", "most"), COSTS)
def test_cost_in_forward_passes_per_image(text: str, least: float, most: float) -> None:
    model = build("cnn")
    batches = [{"pixel_values": images(6), "labels": torch.arange(6) % 5} for _ in range(2)]
    method = Method.parse(text, 1)
    assert 12 * least <= measures.forward_units(model, batches, method) <= 12 * most
    if method.criterion.iterative:
        twice = Method.parse(text, 2)
        once = measures.forward_units(model, batches, method)
        assert measures.forward_units(model, batches, twice) == pytest.approx(2 * once, abs=0.2)


METHOD_ROWS = [
    ("px-active:power=0.5:rounds=7", px.PX("active", 0.5), 7, "global", "none"),
    ("magnitude:scope=layer:control=shuffle", px.Magnitude(), 20, "layer", "shuffle"),
    ("wanda", px.Wanda(), 20, "row", "none"),
    ("magnitude:scope=2:4:rounds=3", px.Magnitude(), 3, "2:4", "none"),
    ("px-active:rounds=3:scope=16:32", px.CRITERIA["px-active"], 3, "16:32", "none"),
    ("ntk-trace:probes=2", px.NTKTrace(probes=2), 20, "global", "none"),
    ("ntk-trace-sampled:probes=null", px.NTKTrace(), 20, "global", "none"),
]


@pytest.mark.parametrize(("text", "criterion", "rounds", "scope", "control"), METHOD_ROWS)
def test_methods(text: str, criterion: px.Criterion, rounds: int, scope: str, control: str) -> None:
    found = Method.parse(text, 20)
    assert (found.criterion, found.rounds, found.scope, found.control) == (criterion, rounds, scope, control)


BAD = [
    (["--methods", "pxx"], px.InvalidArgumentError, "no criterion 'pxx'"),
    (["--methods", "px:powr=1"], px.InvalidArgumentError, "'powr=1' is no setting.*power"),
    (["--methods", "px:power"], px.InvalidArgumentError, "'power' is no setting"),
    (["--methods", "px:power=-1"], px.InvalidArgumentError, "power=-1"),
    (["--methods", "px:scope=all"], px.InvalidArgumentError, "'px:scope=all'.*'all', expected one of"),
    (["--methods", "px:scope=4:2"], px.InvalidArgumentError, "needs 0 < n < m"),
    (["--methods", "px:control=no"], px.InvalidArgumentError, "a control of none, shuffle"),
    (["--methods", "px:rounds=0"], px.InvalidArgumentError, "rounds must be"),
    (["--methods", "px:schedule=slow"], px.InvalidArgumentError, "a schedule of one-shot, gradual"),
    (["--methods", "px:schedule=gradual:until=0"], px.InvalidArgumentError, "until=0"),
    (["--methods", "px:schedule=gradual:control=shuffle"], px.InvalidArgumentError, "Leave one out"),
    (["--methods", "px:schedule=gradual", "--num_train_epochs", "0"], px.InvalidArgumentError, "is 0. Leave one out"),
    (["--methods", "px", "px"], px.InvalidArgumentError, "--methods names the same twice"),
    (["--sparsities", "1.0"], px.InvalidArgumentError, r"must be in \[0, 1\)"),
    (["--workers", "0"], px.InvalidArgumentError, "--workers is 0"),
    (["--num_train_epochs", "-1"], px.InvalidArgumentError, "--num_train_epochs must be"),
    (["--method", "px"], px.InvalidArgumentError, "Did you mean --methods"),
    (["--dataset_name", "./no/such"], px.DataError, "Cannot read the dataset './no/such'"),
    (["--model_name_or_path", "./no/such"], px.CheckpointError, "Cannot load the image processor"),
]


@pytest.mark.parametrize(("more", "error", "message"), BAD, ids=[" ".join(row[0]) for row in BAD])
def test_bad_arguments(folder: Path, more: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compare_criteria.main([*settings(folder, "bad"), *more])
    assert not (folder / "bad" / "results.jsonl").exists()


def test_a_strange_line_is_named_and_nothing_lost(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"key": {"method": "px"}}\n[1]\n{"key": {"method": "px"}}\n')
    with pytest.raises(px.CheckpointError, match=r"Line 2 of .*results\.jsonl"):
        results.read_lines(file)
    assert file.read_text().count("\n") == 3


def test_mean_and_spread() -> None:
    assert tables.mean_and_spread([0.5, 0.6, 0.7]) == "60.0 ± 10.0"
    assert tables.mean_and_spread([0.123]) == "12.3"
    assert tables.mean_and_spread([]) == ""


def test_over_all_tasks_and_sparsities() -> None:
    """Two methods have every cell, the third one does not; seed 1 of one cell is not shared and does not count."""

    def line(method: str, dataset: str, sparsity: float, seed: int, accuracy: float) -> dict[str, Any]:
        key = {"method": method, "model": "m", "dataset": dataset, "sparsity": sparsity, "seed": seed}
        return {"key": key, "split": "test", "rates": 1, "fine_tuned": accuracy, "forward_units": 1.0}

    found = [
        line("dense", "a", 0.0, 0, 0.99),
        *(line("magnitude", "a", 0.5, 0, 0.8), line("lamp", "a", 0.5, 0, 0.6), line("lamp", "a", 0.5, 1, 0.99)),
        *(line("magnitude", "b", 0.9, 0, 0.3), line("lamp", "b", 0.9, 0, 0.4)),
        line("wanda", "a", 0.5, 0, 0.9),
    ]
    text = tables.markdown(found)
    assert text.count("Over all tasks and sparsities, fine-tuned") == 1
    rows = [row for row in text.partition("Over all tasks")[2].splitlines() if row.startswith("| ")][1:]
    assert rows == ["| magnitude | 55.0 | 1.5 | 5.0 | 10.0 |", "| lamp | 50.0 | 1.5 | 10.0 | 20.0 |"]
    assert "Over all" not in tables.markdown(found[:3])
