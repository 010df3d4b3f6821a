"""Several transfers in one table, and published protocols."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from test_downstream import pictures, task_file

import px_hf as px
from px_hf.commands import transfer
from px_hf.downstream.summary import interval, kept, lines_of, read_runs, summary, write_lines
from px_hf.runs.classifier_trainer import make_trainer
from px_hf.runs.protocols import FILES, SGD, Protocol


def run(
    seed: int, sparsity: float, accuracies: dict[str, tuple[float, float, float]], **settings: Any
) -> dict[str, Any]:
    """The results of a transfer: for each task the accuracy of the dense, the pruned and the random network."""
    subjects = [
        {"name": "dense", "kind": "dense", "sparsity": 0.0},
        {"name": "pruned on letters", "kind": "pruned", "sparsity": sparsity, "criterion": "Magnitude()"},
        {"name": f"random {100 * sparsity:g} %", "kind": "random", "sparsity": sparsity, "criterion": "Magnitude()"},
    ]

    def scores(value: float) -> dict[str, Any]:
        score = {"value": value, "low": value, "high": value}
        return {"finetune": {"scores": {"accuracy": score, "balanced_accuracy": {**score, "value": value / 2}}}}

    return {
        "model": "tiny",
        "subjects": subjects,
        "methods": ["finetune"],
        "notes": [],
        "tasks": {
            task: {
                "error": None,
                "classes": 2,
                "dataset": "d",
                "test_split": "test",
                "examples": {"train": 4, "validation": 2, "test": 2},
                "settings": {
                    "subjects": {subject["name"]: subject for subject in subjects},
                    "seed": seed,
                    "versions": {"px_hf": str(seed)},
                    "learning_rate": 0.1,
                    **settings,
                },
                "results": {s["name"]: scores(value) for s, value in zip(subjects, values, strict=True)},
            }
            for task, values in accuracies.items()
        },
    }


RUNS = [
    run(0, 0.9, {"a": (0.8, 0.6, 0.4), "b": (0.5, 0.5, 0.1)}),
    run(1, 0.9, {"a": (0.9, 0.9, 0.3), "b": (0.4, 0.3, 0.2)}),
    run(0, 0.5, {"a": (0.8, 0.8, 0.6), "b": (0.5, 0.4, 0.4)}),
]


def written(results: dict[str, Any], folder: Path) -> str:
    folder.mkdir(parents=True)
    (folder / "downstream.json").write_text(json.dumps(results))
    return str(folder)


def test_shares_are_those_of_the_dense_network_of_the_same_seed(tmp_path: Path) -> None:
    lines = read_runs([written(each, tmp_path / str(i)) for i, each in enumerate(RUNS)])
    shares = {(row.network, row.sparsity): by_task for row, by_task in kept(lines).items()}
    assert shares["pruned on letters", 0.9] == {"a": {0: 0.6 / 0.8, 1: 1.0}, "b": {0: 1.0, 1: 0.3 / 0.4}}
    assert shares["pruned on letters", 0.5] == {"a": {0: 1.0}, "b": {0: 0.4 / 0.5}}
    assert shares["random 90 %", 0.9]["b"] == {0: 0.1 / 0.5, 1: 0.2 / 0.4}

    text = summary(lines)
    mean = [(0.75 + 1) / 2, (1 + 0.75) / 2]
    assert "| 90 % | pruned on letters, Magnitude() | 87.5 ± 17.7 | 87.5 ± 17.7 | 87.5 [87.5, 87.5] |" in text
    assert statistics.mean(mean) == 0.875
    assert "| 50 % | pruned on letters, Magnitude() | 100.0 | 80.0 | 90.0 |" in text
    assert "| dense, % |  | 85.0 ± 7.1 | 45.0 ± 7.1 |  |" in text


def test_a_task_may_be_judged_by_the_mean_of_its_classes() -> None:
    lines = lines_of(RUNS[0])
    for line in lines:
        line["balanced_accuracy"] = line["accuracy"] ** 2
    by = {row.network: by_task for row, by_task in kept(lines, {"a": "balanced_accuracy"}).items()}
    assert by["pruned on letters"]["a"][0] == pytest.approx((0.6 / 0.8) ** 2)
    assert by["pruned on letters"]["b"][0] == 1.0


def test_the_interval_is_students() -> None:
    low, high = interval([0.8, 0.9, 1.0]) or (0, 0)
    assert (low, high) == (
        pytest.approx(0.9 - 4.302653 * 0.1 / math.sqrt(3)),
        pytest.approx(0.9 + 4.302653 * 0.1 / 3**0.5),
    )
    assert interval([0.8]) is None


def test_lines_make_the_same_table_as_the_runs_they_were_read_from(tmp_path: Path) -> None:
    folders = [written(each, tmp_path / str(i)) for i, each in enumerate(RUNS)]
    out = tmp_path / "out"
    assert transfer.main(["--summarize", *folders, "--output_dir", str(out)]) == 0
    table = (out / "summary.md").read_text()
    assert Image.open(out / "summary.png").size[0] > 400
    assert len((out / "results.jsonl").read_text().splitlines()) == 4 + 3 * 2 * 2  # dense of two seeds and tasks
    again = tmp_path / "again"
    assert transfer.main(["--summarize", str(out / "results.jsonl"), "--output_dir", str(again)]) == 0
    assert (again / "summary.md").read_text() == table
    assert (again / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()


def test_what_cannot_be_put_together_is_an_error(tmp_path: Path) -> None:
    first, second = (
        written(RUNS[0], tmp_path / "0"),
        written(run(1, 0.9, {"a": (1, 1, 1)}, learning_rate=1), tmp_path / "1"),
    )
    with pytest.raises(px.InvalidArgumentError, match=r"other settings of 'a'.*learning_rate 0.1 and 1"):
        read_runs([first, second])
    with pytest.raises(px.InvalidArgumentError, match=r"pruned on letters on a \(finetune, seed 0\) is there twice"):
        read_runs([first, first])
    with pytest.raises(px.CheckpointError, match="no folder with a downstream"):
        read_runs([tmp_path / "2"])
    write_lines(lines_of(RUNS[0]), tmp_path / "lines.jsonl")
    with (tmp_path / "lines.jsonl").open("a") as file:
        file.write('{"model": "tiny"}\n')
    with pytest.raises(px.CheckpointError, match=r"Line 7 of .*lines.jsonl is no result"):
        read_runs([tmp_path / "lines.jsonl"])


def test_every_protocol_can_be_read() -> None:
    for name in FILES:
        protocol = Protocol.read(name)
        assert set(protocol.metrics.values()) <= {"accuracy", "balanced_accuracy"}
    assert len(Protocol.read("12-tasks").tasks) == 12
    assert Protocol.read("12-tasks").learning_rate("cars", 0.001) == pytest.approx(0.01)
    assert Protocol.read("12-tasks").learning_rate("cars", 0.002) == pytest.approx(0.02)
    assert Protocol.read("12-tasks").learning_rate("dtd", 0.001) == 0.001


def test_the_learning_rate_falls_to_a_tenth_at_each_drop() -> None:
    """Of a Trainer that the recipe makes: 9 steps, drops after a third and two thirds."""
    weight = torch.nn.Parameter(torch.zeros(2))

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, pixel_values: torch.Tensor, labels: Any = None) -> Any:
            return SimpleNamespace(logits=pixel_values.flatten(1)[:, :2] * self.weight)

    training = transfer.FineTuneArguments("unused", learning_rate=0.5, report_to=[], use_cpu=True, eval_strategy="no")
    trainer = make_trainer(Model(), {"train": None, "validation": None}, training, sgd=SGD(0.9, (1 / 3, 2 / 3)))  # type: ignore[dict-item]
    trainer.create_optimizer_and_scheduler(9)
    assert isinstance(trainer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.defaults["momentum"] == 0.9
    rates = []
    for _ in range(9):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates == pytest.approx([0.5] * 3 + [0.05] * 3 + [0.005] * 3)


def test_a_protocol_runs_on_what_there_is(folder: Path, tmp_path: Path) -> None:
    """Two of its tasks, as stand-ins: a YAML file, and a folder of Parquet files."""
    task_file(tmp_path, "cars", train=pictures([0, 1] * 20), test=pictures([1, 0] * 6))
    (tmp_path / "pets").mkdir()
    pictures([0, 1] * 20).to_parquet(tmp_path / "pets/train.parquet")
    pictures([1, 0, 0] * 4).to_parquet(tmp_path / "pets/test.parquet")
    argv = ["--model_name_or_path", str(folder / "backbone"), "--protocol", "12-tasks", "--source", "letters"]
    argv += ["--protocol_dir", str(tmp_path), "--prune_on", "source", "--criterion", "magnitude", "--sparsity", "0.5"]
    argv += ["--num_train_epochs", "1", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(px.InvalidArgumentError, match=r"neither a folder nor a YAML file .* for aircraft, birdsnap"):
        transfer.main(argv)
    assert transfer.main([*argv, "--targets", "cars", "pets"]) == 0
    results = json.loads((tmp_path / "out/downstream.json").read_text())
    settings = {name: record["settings"] for name, record in results["tasks"].items()}
    assert {name: each["learning_rate"] for name, each in settings.items()} == {"cars": 0.01, "pets": 0.001}
    assert settings["cars"]["batch_size"] == 64
    assert results["tasks"]["pets"]["examples"] == {"train": 38, "validation": 2, "test": 12}
    assert any("Not run: aircraft" in note for note in results["notes"])
    assert any("cars 2, pets 2" in note for note in results["notes"])
    lines = [json.loads(text) for text in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert {(line["network"], line["task"]) for line in lines} >= {("dense", "cars"), ("pruned on letters", "pets")}
    assert "| cars | pets |" in (tmp_path / "out/summary.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--protocol", "12-tasks"], "--protocol and --protocol_dir"),
        (["--protocol_dir", "x"], "--protocol and --protocol_dir"),
        (["--protocol", "12-tasks", "--protocol_dir", "x", "--targets", "beans"], "beans: no task of the protocol"),
    ],
)
def test_bad_arguments(argv: list[str], message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        transfer.main(argv)


def test_protocol_files_hold_nothing_else() -> None:
    for file in FILES.values():
        assert set(yaml.safe_load(file.read_text())) == {"arguments", "momentum", "drops", "validation_share", "tasks"}
