"""recipes/evaluate_downstream.py: whole runs on small data, failures, resuming, two processes, and its report."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from sklearn.linear_model import Ridge as SklearnRidge
from transformers import (
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

import px_hf as px
from px_hf.commands import evaluate_downstream, transfer
from px_hf.data.embedded import characters as demo_data
from px_hf.downstream.page import markdown, model_index, read_results
from px_hf.model.targets import prunable
from px_hf.runs import downstream_evaluation
from px_hf.runs.arguments import FineTuneArguments, ModelArguments
from px_hf.runs.downstream_tasks import find_tasks
from px_hf.runs.scoring_arguments import ScoringArguments
from px_hf.runs.subjects import Subject, prune

RECIPES = Path(__file__).parents[1] / "recipes"


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
AB = ClassLabel(names=["a", "b"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tiny backbone in `backbone`, and the same pruned in `pruned`; runs write beside them."""
    folder = tmp_path_factory.mktemp("downstream")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    model = ResNetForImageClassification(config)
    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    model.save_pretrained(folder / "backbone")
    processor.save_pretrained(folder / "backbone")
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.6, progress=False)
    masks.apply_(model)
    px.save_pretrained(model, masks, folder / "pruned", image_processor=processor, provenance={"base_model": "tiny"})
    return folder


def settings(
    folder: Path, out: str, *more: str, model: str = "backbone", tasks: tuple[str, ...] = ("digits",)
) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / model), "--output_dir", str(folder / out), "--tasks", *tasks),
        *("--max_train_samples", "150", "--max_eval_samples", "61", "--num_train_epochs", "3"),
        *("--per_device_train_batch_size", "8", "--learning_rate", "0.01", "--disable_tqdm", "true", *more),
    ]


PRUNED_HERE = ("--sparsity", "0.5", "0.8", "--prune_on", "digits", "--criterion", "magnitude")


def pictures(labels: list[Any], feature: Any = AB, column: str = "label") -> Dataset:
    """Squares of two colours, in all sizes and modes."""
    modes = ("RGB", "L", "RGBA", "P", "1", "I;16", "CMYK", "LA")
    colours = [(230, 200, 200) if label == 0 else (20, 20, 60) for label in labels]
    images = [
        Image.new("RGB", (9 + row % 5, 12 + row % 7), colour).convert(modes[row % 8] if row % 8 != 5 else "I;16")
        if row % 8 != 5
        else Image.fromarray(np.full((8, 8), 40 * colour[0], np.uint16))
        for row, colour in enumerate(colours)
    ]
    features = Features({"image": ImageFeature(), column: feature})
    return Dataset.from_dict({"image": images, column: labels}, features=features)


def task_file(folder: Path, name: str, **splits: Dataset) -> str:
    files = {}
    for split, rows in splits.items():
        files[f"{split}_file"] = str(folder / f"{name}-{split}.parquet")
        rows.to_parquet(files[f"{split}_file"])
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({**files, "horizontal_flip": False}))
    return str(folder / f"{name}.yaml")


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A run on the digits and on pictures of mixed sizes and modes: the folder and its results."""
    mixed = task_file(folder, "mixed", train=pictures([0, 1] * 20), validation=pictures([1, 0] * 10))
    argv = settings(folder, "finished", *PRUNED_HERE, tasks=("digits", mixed))
    assert evaluate_downstream.main(argv) == 0
    return folder / "finished", json.loads((folder / "finished/downstream.json").read_text())


def test_a_run_reports_every_model_method_and_metric(finished: tuple[Path, dict[str, Any]]) -> None:
    out, results = finished
    names = ["dense", "pruned 50 %", "pruned 80 %", "random 50 %", "random 80 %"]
    assert [subject["name"] for subject in results["subjects"]] == names
    assert [round(subject["sparsity"], 2) for subject in results["subjects"]] == [0, 0.5, 0.8, 0.5, 0.8]
    for task, examples in {
        "digits": {"train": 150, "validation": 61, "test": 61},
        "mixed": {"train": 34, "validation": 6, "test": 20},  # the validation split is the test
    }.items():
        record = results["tasks"][task]
        assert record["error"] is None
        assert record["examples"] == examples
        assert sorted(record["results"]) == sorted(names)
        for by_method in record["results"].values():
            assert sorted(by_method) == ["finetune", "knn", "linear", "ridge"]
            for method, found in by_method.items():
                assert ("calibration_error" in found["scores"]) == (method != "ridge")
                for metric in ("accuracy", "top_5_accuracy", "macro_f1", "balanced_accuracy"):
                    score = found["scores"][metric]
                    assert 0 <= score["low"] <= score["value"] <= score["high"] <= 1
                right = found["scores"]["accuracy"]["value"] * examples["test"]
                assert right == pytest.approx(round(right))  # every test image once
    assert results["tasks"]["digits"]["results"]["dense"]["linear"]["scores"]["accuracy"]["value"] > 0.5
    assert results["tasks"]["digits"]["results"]["dense"]["finetune"]["scores"]["accuracy"]["value"] > 0.5
    assert Image.open(out / "downstream.png").size[0] > 600
    page = (out / "downstream.md").read_text()
    assert page == markdown(results)
    for text in (
        "### digits",
        "| pruned 80 % |",
        "calibration error",
        "15 bins",
        "![Accuracy by task](downstream.png)",
    ):
        assert text in page
    assert not any(path.name.startswith(".") for path in out.rglob("*"))


def test_the_embedded_run(tmp_path: Path) -> None:
    """The command of the README, which names nothing, on fewer images and epochs: the letters' network knows Greek."""
    argv = ["--max_train_samples", "300", "--max_eval_samples", "150", "--num_train_epochs", "1", "--rounds", "5"]
    argv += ["--output_dir", str(tmp_path / "out"), "--disable_tqdm", "true"]
    assert evaluate_downstream.main(argv) == 0
    results = json.loads((tmp_path / "out/downstream.json").read_text())
    assert results["model"] == "resnet"
    assert sorted(results["tasks"]) == ["digits", "greek"]
    found = results["tasks"]["greek"]["results"]
    accuracy = {name: by_method["linear"]["scores"]["accuracy"]["value"] for name, by_method in found.items()}
    assert accuracy["dense"] > accuracy["pruned 90 %"] > accuracy["random 90 %"]
    assert accuracy["dense"] > 0.7
    assert all(sorted(by_method) == ["finetune", "knn", "linear", "ridge"] for by_method in found.values())


def test_the_ridge_probe_is_that_of_the_model_by_other_means(
    folder: Path, finished: tuple[Path, dict[str, Any]]
) -> None:
    """Features by hand, scikit-learn's ridge with the λ that was chosen, accuracy by counting."""
    task = find_tasks(["digits"])[0]
    task.data.max_train_samples, task.data.max_eval_samples = 150, 61
    data = task.load(seed=42)
    model = AutoModelForImageClassification.from_pretrained(folder / "backbone").eval()
    processor = ViTImageProcessor.from_pretrained(folder / "backbone")

    def features(split: Any) -> np.ndarray:
        images = processor(split.images(range(len(split))), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return model.resnet(images).pooler_output.flatten(1).double().numpy()

    assert data.test is not None
    train, test = features(data.train), features(data.test)
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation < 1e-7] = np.inf
    found = finished[1]["tasks"]["digits"]["results"]["dense"]["ridge"]
    ridge = SklearnRidge(alpha=150 * found["chosen"]["lambda"]).fit(
        (train - mean) / deviation, np.eye(10)[data.train.labels]
    )
    predicted = ridge.predict((test - mean) / deviation).argmax(1)
    assert (predicted == data.test.labels).mean() == found["scores"]["accuracy"]["value"]


def test_a_finished_run_is_not_computed_again(
    folder: Path, finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    mixed = str(folder / "mixed.yaml")
    before = (folder / "finished/downstream.json").read_bytes()
    with monkeypatch.context() as patched:
        for name in ("probe", "finetune", "head_inputs"):
            patched.setattr(downstream_evaluation, name, never)
        assert evaluate_downstream.main(settings(folder, "finished", *PRUNED_HERE, tasks=("digits", mixed))) == 0
        assert (folder / "finished/downstream.json").read_bytes() == before

        # interrupted in one model: its features are there still
        file = folder / "finished/tasks/digits.json"
        record = json.loads(file.read_text())
        del record["results"]["random 80 %"]["linear"]
        file.write_text(json.dumps(record))
        patched.undo()
        patched.setattr(downstream_evaluation, "head_inputs", never)
        assert evaluate_downstream.main(settings(folder, "finished", *PRUNED_HERE, tasks=("digits", mixed))) == 0
    again = json.loads((folder / "finished/downstream.json").read_text())
    for results in (again, finished[1]):
        results["tasks"]["digits"]["results"]["random 80 %"]["linear"].pop("seconds")
    assert again == finished[1]


def test_results_of_other_settings_are_not_mixed_in(folder: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    before = (folder / "finished/tasks/digits.json").read_bytes()
    with pytest.raises(px.OutputExistsError, match=r"other settings \(learning_rate\).*--overwrite_output_dir"):
        evaluate_downstream.main(settings(folder, "finished", *PRUNED_HERE, "--learning_rate", "0.1"))
    assert (folder / "finished/tasks/digits.json").read_bytes() == before


def test_two_processes_give_the_results_of_one(folder: Path, finished: tuple[Path, dict[str, Any]]) -> None:
    """By `accelerate launch`. Probes exactly; fine-tuning predicts every one of the 61 test images once, which the
    recipe checks itself. In a second run a task whose images one process alone finds bad fails on both, and the next
    task runs.
    """
    bad = task_file(folder, "bad", train=with_a_broken_image(), test=pictures([0, 1]))
    runs = [
        settings(folder, "two", "--per_device_train_batch_size", "4", *PRUNED_HERE[:1], *PRUNED_HERE[2:]),
        settings(folder, "half", "--methods", "finetune", "--num_train_epochs", "1", tasks=(bad, "digits")),
    ]
    script = "from px_hf.commands import evaluate_downstream\n"
    script += f"assert [evaluate_downstream.main(argv) for argv in {runs!r}] == [0, 1]\n"
    (folder / "runs.py").write_text(script)
    with socket.socket() as free:
        free.bind(("", 0))
        command = [*LAUNCH, "--main_process_port", str(free.getsockname()[1]), str(folder / "runs.py")]
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

    two = json.loads((folder / "two/downstream.json").read_text())["tasks"]["digits"]["results"]
    one = finished[1]["tasks"]["digits"]["results"]
    assert sorted(two) == ["dense", "pruned 80 %", "random 80 %"]
    for subject in two:
        for method in ("knn", "ridge", "linear"):
            assert two[subject][method]["scores"] == one[subject][method]["scores"]
        accuracy = two[subject]["finetune"]["scores"]["accuracy"]["value"]
        assert accuracy * 61 == pytest.approx(round(accuracy * 61))
    assert two["dense"]["finetune"]["scores"]["accuracy"]["value"] == pytest.approx(
        one["dense"]["finetune"]["scores"]["accuracy"]["value"], abs=0.15
    )
    half = json.loads((folder / "half/downstream.json").read_text())["tasks"]
    assert re.search(r"DataError: Task 'bad'.*Unreadable image in split 'train' at index 20", half["bad"]["error"])
    assert half["digits"]["error"] is None
    assert half["digits"]["results"]["dense"]["finetune"]["scores"]["accuracy"]["value"] > 0


def test_a_score_of_other_images_than_those_of_the_test_split_is_no_result(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a process had repeated samples to fill its last batch."""
    predict = Trainer.predict

    def repeated(self: Trainer, dataset: Any) -> Any:
        output = predict(self, dataset)
        return output._replace(label_ids=np.concatenate([output.label_ids, output.label_ids[:1]]))

    monkeypatch.setattr(Trainer, "predict", repeated)
    argv = settings(folder, "repeated", "--methods", "finetune", "--num_train_epochs", "1")
    assert evaluate_downstream.main(argv) == 1
    error = json.loads((folder / "repeated/downstream.json").read_text())["tasks"]["digits"]["error"]
    assert "62 predictions do not belong to the 61 test images" in error


def with_a_broken_image() -> Dataset:
    """Of 24 images the one at index 20 is cut off."""
    rows = pictures([0, 1] * 12).cast_column("image", ImageFeature(decode=False)).to_dict()
    rows["image"][20]["bytes"] = rows["image"][20]["bytes"][:20]
    features = Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": AB})
    return Dataset.from_dict(rows, features=features).cast_column("image", ImageFeature())


GOOD = pictures([0, 1] * 12)
BAD_TASKS: dict[str, tuple[dict[str, Dataset], str]] = {
    "one-class": (
        {"train": pictures([0] * 9, ClassLabel(names=["a"]))},
        r"'label' of split 'train' has the classes \['a'\], expected at least 2",
    ),
    "out-of-range": (
        {"train": GOOD, "test": pictures([0, 5], Value("int64"))},
        r"Label 5 in split 'test' at index 1, column 'label' is none of the 2 classes",
    ),
    "empty-test": (
        {"train": GOOD, "test": pictures([])},
        "Cannot read split 'test' from .*empty-test-test.parquet: it is empty",
    ),
    "other-names": (
        {"train": GOOD, "test": pictures([0, 1], ClassLabel(names=["b", "a"]))},
        r"Split 'test' has other classes in column 'label' than the training split",
    ),
    "unlabelled": (
        {"train": GOOD, "test": pictures([-1, -1], Value("int64"))},
        r"Label -1 in split 'test' at index 0, column 'label'.*leave that split out",
    ),
    "no-label": (
        {"train": GOOD, "test": pictures([0, None], Value("int64"))},
        r"Label None in split 'test' at index 1, column 'label': the label is missing",
    ),
    "one-of-two": (
        {"train": pictures([0] * 9), "test": pictures([0, 1])},
        r"1 of 2 classes have no example in the training split 'train': 'b'",
    ),
    "no-column": ({"train": GOOD, "test": pictures([0, 1], column="target")}, "Split 'test' has no column 'label'"),
    "broken-image": (
        {"train": GOOD, "test": Dataset.from_dict(
            {"image": [{"bytes": b"\x89PNG", "path": None}] * 2, "label": [0, 1]},
            features=Features({"image": {"bytes": Value("binary"), "path": Value("string")}, "label": AB}),
        )},
        r"Unreadable image in split 'test' at index 0, column 'image'",
    ),
}  # fmt: skip


def test_a_task_that_fails_is_reported_and_the_others_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [task_file(folder, name, **splits) for name, (splits, _) in BAD_TASKS.items()]
    good = task_file(folder, "good", train=GOOD, test=pictures([1, 0] * 5))
    argv = settings(folder, "failing", "--methods", "ridge", tasks=(*files, good))
    assert evaluate_downstream.main(argv) == len(BAD_TASKS)
    results = json.loads((folder / "failing/downstream.json").read_text())
    page, printed = (folder / "failing/downstream.md").read_text(), capsys.readouterr().out
    for name, (_, message) in BAD_TASKS.items():
        error = results["tasks"][name]["error"]
        assert re.search(f"DataError: Task '{name}'.*{message}", error, re.DOTALL), error
        assert f"- **{name}**: DataError: Task '{name}'" in page
        assert f"Task '{name}'" in printed.replace("\n", " ")
    assert results["tasks"]["good"]["error"] is None
    assert results["tasks"]["good"]["results"]["dense"]["ridge"]["scores"]["accuracy"]["value"] > 0.8

    # repaired, it is evaluated by the next run
    task_file(folder, "empty-test", train=GOOD, test=pictures([1, 0] * 5))
    assert evaluate_downstream.main(argv) == len(BAD_TASKS) - 1


def test_a_pruned_model_is_compared_with_its_parent_and_its_report_goes_into_its_card(folder: Path) -> None:
    parent = ("--dense_model_name_or_path", str(folder / "backbone"), "--methods", "linear", "--add_to_model")
    assert evaluate_downstream.main(settings(folder, "of-pruned", *parent, model="pruned")) == 0
    results = read_results(folder / "pruned")
    assert results is not None
    assert [subject["name"] for subject in results["subjects"]] == ["dense", "pruned 60 %", "random 60 %"]
    assert (folder / "pruned/downstream.md").is_file()
    entries = model_index(results)
    assert [entry.metric_name for entry in entries][:2] == [
        "accuracy (linear probe)",
        "balanced accuracy (linear probe)",
    ]
    scores = results["tasks"]["digits"]["results"]["pruned 60 %"]["linear"]["scores"]
    assert entries[0].metric_value == round(scores["accuracy"]["value"], 4)
    assert {(entry.dataset_type, entry.dataset_split) for entry in entries} == {("px_hf/digits", "test")}
    # the weights are those of the file, under its masks
    assert results["subjects"][1]["masks_sha256"] == px.Masks.from_pretrained(folder / "pruned").fingerprint()


@pytest.mark.parametrize("kind", ["hf vit", pytest.param("timm resnet", marks=pytest.mark.slow), "timm vit"])
def test_models_of_both_libraries_on_a_folder_of_images(folder: Path, kind: str) -> None:
    """Dense and pruned here; then saved, a timm model in timm's own form, and evaluated beside the dense one."""
    for k, row in enumerate(pictures([0, 1] * 10)):
        for split in ("train",) if k < 14 else ("test",):
            (folder / f"photos/{split}/{'ab'[row['label']]}").mkdir(parents=True, exist_ok=True)
            row["image"].convert("RGB").save(folder / f"photos/{split}/{'ab'[row['label']]}/{k}.png")
    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    model = {
        "hf vit": lambda: ViTForImageClassification(ViTConfig(**tiny, image_size=32, patch_size=8, num_labels=3)),
        "timm resnet": lambda: timm.create_model("test_resnet", num_classes=3),
        "timm vit": lambda: timm.create_model("test_vit", num_classes=3, img_size=32),
    }[kind]()
    processor = ViTImageProcessor(size={"height": 32, "width": 32}) if kind == "hf vit" else None
    dense, sparse = folder / f"dense {kind}", folder / f"sparse {kind}"
    nothing = px.Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(model).items()})
    px.save_pretrained(model, nothing, dense, image_processor=processor)
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)
    masks.apply_(model)
    px.save_pretrained(model, masks, sparse, image_processor=processor, provenance={"base_model": str(dense)})

    more = ("--num_train_epochs", "1", "--methods", "linear", "finetune", "--per_device_train_batch_size", "7")
    here = ("--sparsity", "0.5", "--unlabelled_dir", str(folder / "photos/train"), "--rounds", "1")
    names = ["dense", "pruned 50 %", "random 50 %"]
    found = {}
    for model_name, pruning in ((dense.name, here), (sparse.name, ())):
        out = f"of {model_name}"
        argv = settings(folder, out, *more, *pruning, model=model_name, tasks=(str(folder / "photos"),))
        assert evaluate_downstream.main(argv) == 0
        results = json.loads((folder / out / "downstream.json").read_text())
        assert [subject["name"] for subject in results["subjects"]] == names
        found[model_name] = results["tasks"]["photos"]
        assert found[model_name]["examples"] == {"train": 12, "validation": 2, "test": 6}
    scores = [{m: run["scores"] for m, run in r["results"]["dense"].items()} for r in found.values()]
    assert scores[0] == scores[1]
    notes = json.loads((folder / f"of {dense.name}/downstream.json").read_text())["notes"]
    assert "Pruned by PX(paths='active', power=0.25, balance=False) in 1 rounds on 14 images of train." in notes


@pytest.mark.parametrize("head", [False, True])
def test_the_head_that_is_scored_with_is_pruned_if_asked_for(folder: Path, head: bool) -> None:
    dense = Subject("dense", "dense", ModelArguments(model_name_or_path=str(folder / "backbone")))
    training = FineTuneArguments(str(folder / "none"), use_cpu=True, disable_tqdm=True)
    scoring = ScoringArguments(criterion="magnitude", prune_head=head)
    masks = prune(dense, scoring, 0.5, training, None, []).masks
    assert masks is not None
    assert ("classifier.1.weight" in masks) == head


def test_without_its_parent_a_pruned_model_stands_alone(folder: Path) -> None:
    assert evaluate_downstream.main(settings(folder, "alone", "--methods", "knn", model="pruned")) == 0
    results = json.loads((folder / "alone/downstream.json").read_text())
    assert [subject["name"] for subject in results["subjects"]] == ["pruned 60 %"]
    assert "No dense parent to compare with: 'tiny' is not here" in results["notes"][0]


def test_several_sparsities_have_no_model_to_put_on_a_card(finished: tuple[Path, dict[str, Any]]) -> None:
    assert model_index(finished[1]) == []


@pytest.mark.parametrize("content", ["{", "[]", '{"tasks": {"a": {}}}', '{"subjects": 3}'])
def test_a_damaged_report_is_an_error(tmp_path: Path, content: str) -> None:
    assert read_results(tmp_path) is None
    (tmp_path / "downstream.json").write_text(content)
    with pytest.raises(px.CheckpointError, match=r"downstream.json is damaged"):
        read_results(tmp_path)


def test_names_and_errors_of_others_are_no_markup(finished: tuple[Path, dict[str, Any]]) -> None:
    results = {**finished[1], "tasks": {"bad": {"error": "x\n# <img src=a>|", "results": {}}}}
    assert "- **bad**: x # &lt;img src=a>\\|" in markdown(results)


BAD_ARGUMENTS = [
    (["--tasks", "digits", "digits"], "Two tasks are called digits"),
    (["--tasks", "no/such.yaml"], "Cannot read the task file no/such.yaml"),
    (["--sparsity", "0.5"], "--sparsity needs either --prune_on"),
    (["--sparsity", "0.5", "--prune_on", "digits", "--unlabelled_dir", "x"], "--sparsity needs either --prune_on"),
    (["--push_to_hub"], "publishes a pruned model from its folder"),
    (["--sparsity", "1.5", "--prune_on", "digits"], r"must be in \[0, 1\)"),
    (["--add_to_model", "--model_name_or_path", "some/model"], "some/model is not a folder"),
    (["--taks", "digits"], "Did you mean --tasks"),
    (["--dense_model_name_or_path", "x"], "it has no parent"),
]


@pytest.mark.parametrize(("more", "message"), BAD_ARGUMENTS, ids=[" ".join(row[0]) for row in BAD_ARGUMENTS])
def test_bad_arguments(folder: Path, more: list[str], message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        evaluate_downstream.main([*settings(folder, "bad"), *more])
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a", "no mapping"),
        ("image_column_name: x", "names no data"),
        ("train_fil: x", "train_fil"),
        ("{", "Cannot read"),
    ],
)
def test_a_bad_task_file_is_an_error(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "task.yaml").write_text(content)
    with pytest.raises(px.InvalidArgumentError, match=message):
        find_tasks([str(tmp_path / "task.yaml")])


@pytest.mark.parametrize("name", ["greek", "letters"])
def test_rendered_tasks_have_every_class_in_every_split_and_no_image_twice(name: str) -> None:
    data = demo_data.EMBEDDED[name]()
    classes = data["train"].features["label"].num_classes
    seen: set[bytes] = set()
    for split in data.values():
        assert set(split["label"]) == set(range(classes))
        seen |= {image.tobytes() for image in split["image"]}
    assert len(seen) == sum(len(split) for split in data.values())


# --- recipes/transfer.py ---


def test_masks_found_on_the_source_the_target_and_both_are_compared(folder: Path) -> None:
    """Magnitude looks at no data: all three masks are one, and so are their results. PX on active paths does look."""
    argv = settings(folder, "transfer", "--source", "letters", "--examples_per_class", "2", "--rounds", "2")
    i = argv.index("--tasks")
    argv[i : i + 2] = ["--targets", "digits"]
    argv[argv.index("--output_dir") + 1] = str(folder / "transfer")
    names = ["dense", "pruned on letters", "pruned on the target", "pruned on both", "random 90 %"]
    records = {}
    for criterion in ("magnitude", "px-active"):
        out = str(folder / f"transfer-{criterion}")
        assert transfer.main([*argv, "--criterion", criterion, "--output_dir", out]) == 0
        results = json.loads((Path(out) / "downstream.json").read_text())
        assert [subject["name"] for subject in results["subjects"]] == names
        assert [round(subject["sparsity"], 2) for subject in results["subjects"]] == [0, 0.9, 0.9, 0.9, 0.9]
        records[criterion] = results["tasks"]["digits"]
        assert records[criterion]["error"] is None
    masks = {c: [r["settings"]["subjects"][name]["masks_sha256"] for name in names[1:4]] for c, r in records.items()}
    assert len(set(masks["magnitude"])) == 1
    assert len(set(masks["px-active"])) == 3
    scores = [records["magnitude"]["results"][name]["finetune"]["scores"] for name in names[1:4]]
    assert scores[0] == scores[1] == scores[2]
    assert "| pruned on both |" in (folder / "transfer-magnitude/downstream.md").read_text()


def test_a_network_that_is_pruned_while_it_learns_the_source_goes_on_to_the_target(folder: Path) -> None:
    """And one that is pruned while it learns the target. A second run takes over what the first has learned."""
    argv = ["--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / "learned")]
    argv += [
        "--source",
        "letters",
        "--targets",
        "digits",
        "--schedule",
        "gradual",
        "--rounds",
        "3",
        "--sparsity",
        "0.8",
    ]
    argv += [
        "--max_train_samples",
        "80",
        "--max_eval_samples",
        "40",
        "--num_train_epochs",
        "1",
        "--disable_tqdm",
        "true",
    ]
    argv += ["--per_device_train_batch_size", "8", "--examples_per_class", "1", "--learning_rate", "0.01"]
    assert transfer.main(argv) == 0
    results = json.loads((folder / "learned/downstream.json").read_text())
    names = ["dense", "pruned while learning letters", "pruned while learning the target", "random 80 %"]
    assert [subject["name"] for subject in results["subjects"]] == names
    assert [round(subject["sparsity"], 2) for subject in results["subjects"]] == [0, 0.8, 0.8, 0.8]
    found = results["tasks"]["digits"]
    assert found["error"] is None
    assert results["subjects"][2]["schedule"] == "gradual"
    assert found["results"][names[2]]["finetune"]["masks_sha256"] != results["subjects"][1]["masks_sha256"]
    masks = px.Masks.from_pretrained(folder / "learned/source")
    learned, before = (load_file(folder / name / "model.safetensors") for name in ("learned/source", "backbone"))
    assert all(not learned[name][~mask].any() for name, mask in masks.items())
    assert all(not torch.equal(learned[name], before[name] * mask) for name, mask in masks.items())

    weights = folder / "learned/source/model.safetensors"
    before = (weights.read_bytes(), weights.stat().st_mtime_ns)
    assert transfer.main(argv) == 0
    assert (weights.read_bytes(), weights.stat().st_mtime_ns) == before
    with pytest.raises(px.OutputExistsError, match=r"other settings \(rounds\).*--overwrite_output_dir"):
        transfer.main([*argv, "--rounds", "4"])


def test_unlabelled_images_will_do_as_a_source(folder: Path) -> None:
    (folder / "unlabelled/deep").mkdir(parents=True)
    for row in range(6):
        image = Image.fromarray(np.random.default_rng(row).integers(0, 255, (9 + row, 20, 3), dtype=np.uint8))
        image.save(folder / ("unlabelled/deep" if row % 2 else "unlabelled") / f"{row}.png")
    (folder / "unlabelled/notes.txt").write_text("no image")
    argv = ["--unlabelled_dir", str(folder / "unlabelled"), "--prune_on", "source", "--targets", "digits"]
    argv += ["--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / "from-unlabelled")]
    argv += ["--max_train_samples", "40", "--max_eval_samples", "20", "--num_train_epochs", "1", "--rounds", "2"]
    assert transfer.main([*argv, "--sparsity", "0.5", "--random_control", "false", "--disable_tqdm", "true"]) == 0
    results = json.loads((folder / "from-unlabelled/downstream.json").read_text())
    assert [subject["name"] for subject in results["subjects"]] == ["dense", "pruned on unlabelled"]

    (folder / "unlabelled/7.png").write_bytes(b"no image")
    with pytest.raises(px.DataError, match=r"Unreadable image .*7.png"):
        transfer.main([*argv, "--overwrite_output_dir", "--disable_tqdm", "true"])


BAD_TRANSFERS = [
    (["--source", "letters", "--unlabelled_dir", "x"], "either --source or --unlabelled_dir"),
    (["--unlabelled_dir", "no/such"], "No images in no/such"),
    (["--prune_on", "source", "target", "mix", "--examples_per_class", "1"], "mix needs --examples_per_class of 2"),
    (["--sparsity", "1"], r"must be in \[0, 1\)"),
    (["--schedule", "gradual", "--prune_on", "mix"], "learns the task that it prunes on.*: --prune_on source target"),
    (["--schedule", "gradual", "--unlabelled_dir", "x"], "with labels: --prune_on target"),
    (["--until", "0.3"], "--until says when --schedule gradual ends"),
    (["--source", "digits", "--targets", "digits"], "'digits' is the source and a target"),
]


@pytest.mark.parametrize(("more", "message"), BAD_TRANSFERS, ids=[" ".join(row[0]) for row in BAD_TRANSFERS])
def test_bad_arguments_of_transfer(folder: Path, more: list[str], message: str) -> None:
    source = [] if {"--source", "--unlabelled_dir"} & set(more) else ["--source", "letters"]
    with pytest.raises((px.InvalidArgumentError, px.DataError), match=message):
        transfer.main(
            ["--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / "bad"), *source, *more]
        )
    assert not (folder / "bad").exists()
