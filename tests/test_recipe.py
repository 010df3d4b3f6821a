"""recipes/prune_finetune.py as users run it: whole runs in processes of their own, and every bad input."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainerCallback,
    set_seed,
)

import px_hf as px
from px_hf.commands import prune_finetune
from px_hf.data.embedded import characters as demo_data
from px_hf.runs import arguments, classification_job
from px_hf.runs import folder as output_folder
from px_hf.runs.classification_job import ClassificationJob

RECIPES = Path(__file__).parents[1] / "recipes"
RECIPE = str(RECIPES / "prune_finetune.py")


EPOCHS = 8
PLAIN = [sys.executable, RECIPE]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", RECIPE]
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", RECIPE]
FINISHED = ["all_results.json", "config.json", "model.safetensors", "per_layer_sparsity.png", "sparse"]


def settings(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / out)),
        *("--max_train_samples", "200", "--max_eval_samples", "61", "--num_train_epochs", str(EPOCHS)),
        *("--rounds", "3", "--examples_per_class", "5", "--learning_rate", "0.01", "--disable_tqdm", "true"),
        *("--schedule", "one-shot", "--compare_dense", "false", *more),
    ]


def environment(folder: Path, **changes: str) -> dict[str, str]:
    launched = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_CPU")
    inherited = {key: value for key, value in os.environ.items() if key not in launched}
    cache = {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    return inherited | cache | {"OMP_NUM_THREADS": "1", "COLUMNS": "120"} | changes


def run(folder: Path, command: list[str], expect: int = 0, **env: str) -> str:
    """Standard output and error, after checking the exit status."""
    done = subprocess.run(
        command, env=environment(folder, **env), cwd=folder, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


def results(out: Path) -> dict[str, Any]:
    """all_results.json without the times."""
    content = json.loads((out / "all_results.json").read_text())
    assert content.pop("seconds")
    return content


@pytest.fixture(scope="module")
def finished(folder: Path) -> tuple[Path, str]:
    """A whole run by `accelerate launch`: its folder and what it printed."""
    printed = run(folder, ACCELERATE + settings(folder, "finished", "--compare_dense", "true"))
    return folder / "finished", printed


# --- a whole run ---


def test_a_run_writes_what_it_promises(finished: tuple[Path, str]) -> None:
    out, printed = finished
    written = results(out)
    masks = px.Masks.from_pretrained(out)
    assert masks.kept == written["weights_kept"] == round(0.1 * masks.total)
    assert masks.fingerprint() == written["masks_sha256"]
    assert written["calibration"]["examples"] == 50
    config = json.loads((out / "config.json").read_text())
    assert config["px"]["criterion"] == written["criterion"] == repr(px.CRITERIA["px-active"])
    assert config["id2label"]["7"] == "7"
    for name in ("per_layer_sparsity.png", "training_curve.png"):
        assert Image.open(out / name).size[0] > 600
    assert not [path.name for path in out.parent.iterdir() if path.name.startswith(".")]  # nothing half-written
    table = printed[printed.rindex("accuracy, test") :]
    for text in ("sparsity asked", "90 %", f"{masks.kept:,}", "model.safetensors", "time, prune"):
        assert text in table
    shown = re.search(r"accuracy, test +│ +([\d.]+)% +│ +([\d.]+)%", printed)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(100 * written["dense_test_accuracy"], abs=0.005)
    assert float(shown[2]) == pytest.approx(100 * written["test_accuracy"], abs=0.005)
    assert written["dense_eval_accuracy"] > 0.5  # chance is 0.1
    assert written["eval_accuracy"] > 0.3


def test_stock_transformers_loads_the_folder_where_px_hf_cannot_be_imported(finished: tuple[Path, str]) -> None:
    out, _ = finished
    code = f"""
import sys, torch
sys.modules["px_hf"] = None
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({str(out)!r}).eval()
processor = AutoImageProcessor.from_pretrained({str(out)!r})
assert processor.size["height"] == 16
torch.manual_seed(0)
print("zeros", sum(int((p == 0).sum()) for n, p in model.named_parameters() if "convolution" in n))
print("logits", model(torch.randn(2, 3, 16, 16)).logits.flatten().tolist())
"""
    printed = run(out.parent, [sys.executable, "-c", code])
    masks = px.Masks.from_pretrained(out)
    assert f"zeros {masks.total - masks.kept}\n" in printed
    torch.manual_seed(0)
    expected = AutoModelForImageClassification.from_pretrained(out).eval()(torch.randn(2, 3, 16, 16)).logits
    logits = json.loads(printed[printed.index("logits ") + 7 :].splitlines()[0])
    assert torch.allclose(torch.tensor(logits), expected.flatten(), atol=1e-6)


def test_the_reported_accuracy_is_that_of_the_saved_model(finished: tuple[Path, str]) -> None:
    out, _ = finished
    assert accuracy_of(out) == results(out)["test_accuracy"]


def accuracy_of(out: Path, processor: Path | None = None) -> float:
    """On the same 61 test images, by other means; `processor` is where the image processor is."""
    from px_hf.data import classification_task

    test = classification_task(demo_data.digits()).test
    assert test is not None
    test = test.sample(61, seed=42)
    model = AutoModelForImageClassification.from_pretrained(out).eval()
    images = AutoImageProcessor.from_pretrained(processor or out)(test.images(range(61)), return_tensors="pt")
    with torch.no_grad():
        predicted = model(**images).logits.argmax(-1)
    return float((predicted == torch.from_numpy(test.labels)).double().mean())


def test_the_same_seed_gives_the_same_masks_and_metrics_also_without_a_launcher(
    folder: Path, finished: tuple[Path, str]
) -> None:
    run(folder, PLAIN + settings(folder, "again"))
    first = {key: value for key, value in results(finished[0]).items() if not key.startswith("dense_")}
    assert results(folder / "again") == first
    assert (folder / "again/model.safetensors").read_bytes() == (finished[0] / "model.safetensors").read_bytes()


def test_two_processes_find_the_same_masks_and_count_every_example_once(
    folder: Path, finished: tuple[Path, str]
) -> None:
    run(folder, TWO + settings(folder, "two", "--per_device_train_batch_size", "16"), ACCELERATE_USE_CPU="true")
    out = folder / "two"
    assert px.Masks.from_pretrained(out) == px.Masks.from_pretrained(finished[0])
    assert results(out)["test_accuracy"] == accuracy_of(out)  # of 61 examples, an odd number
    first = [
        json.loads((path / f"checkpoint-{7 * EPOCHS}/trainer_state.json").read_text()) for path in (out, finished[0])
    ]
    losses = [state["log_history"][0]["loss"] for state in first]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)  # not twice as large


def test_an_interrupted_run_resumes_with_its_masks_to_the_same_end(folder: Path, finished: tuple[Path, str]) -> None:
    out = folder / "killed"
    command = PLAIN + settings(folder, "killed")
    process = subprocess.Popen(
        command, env=environment(folder), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (out / "checkpoint-14/trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists(), "the run was over before it was killed"
    with pytest.raises(
        px.OutputExistsError, match=r"checkpoints of an interrupted run.*--resume_from_checkpoint true"
    ):
        run_here(settings(folder, "killed"))

    printed = run(folder, [*command, "--resume_from_checkpoint", "true"])
    assert re.search(r"the masks of .*killed/checkpoint-\d+", printed)
    expected = {key: value for key, value in results(finished[0]).items() if not key.startswith("dense_")}
    assert results(out) == expected


@pytest.mark.parametrize("backbone", ["resnet", "vit"])
def test_the_embedded_backbones_transfer_to_the_digits(folder: Path, backbone: str) -> None:
    """Both at 80 % sparsity after two epochs; the default run does ten, at 90 %."""
    more = ["--sparsity", "0.8", "--rounds", "5", "--num_train_epochs", "2", "--compare_dense", "false"]
    more += ["--model_name_or_path", str(RECIPES / "demo" / backbone), "--output_dir", str(folder / backbone)]
    run_here(more)
    assert results(folder / backbone)["test_accuracy"] > 0.9  # chance is 0.1


@pytest.mark.parametrize("scope", ["structured", "structured:uniform"])
def test_whole_units_are_taken_out_and_a_resumed_run_takes_out_the_same(folder: Path, scope: str) -> None:
    out = folder / scope.replace(":", "-")
    more = ["--scope", scope, "--sparsity", "0.3", "--num_train_epochs", "2", "--min_layer_density", "0.2"]
    run_here(settings(folder, out.name, *more))
    first = results(out)
    model = px.from_pretrained(out)
    assert first["parameters_kept"] == model.num_parameters() < first["parameters"]
    assert first["effective_macs"] < first["macs"]
    assert 0.2 < first["sparsity"] <= 0.3

    checkpoint = str(min(out.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))))
    run_here(settings(folder, out.name, *more, "--resume_from_checkpoint", checkpoint, "--overwrite_output_dir"))
    assert results(out) == first


def test_the_dense_ceiling_prunes_nothing(folder: Path) -> None:
    run_here(settings(folder, "ceiling", "--dense", "--num_train_epochs", "1"))
    out = folder / "ceiling"
    assert px.Masks.from_pretrained(out).sparsity == 0
    weights = load_file(out / "model.safetensors")
    assert all((weight != 0).all() for name, weight in weights.items() if name.endswith("convolution.weight"))


# --- pruned while it learns, with a teacher ---

GRADUAL = [
    *("--schedule", "gradual", "--num_train_epochs", "2", "--save_strategy", "steps", "--save_steps", "2"),
    *("--save_total_limit", "9"),
]
"""14 steps; the three rounds are at 0, 3 and 7."""
TAUGHT = [*GRADUAL, "--distill", "dense", "--distill_hidden", "0.1"]


@pytest.fixture(scope="module")
def gradual(folder: Path) -> tuple[Path, str]:
    """A gradual run with the dense network as teacher: its folder and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run_here(settings(folder, "gradual", *TAUGHT))
    return folder / "gradual", printed.getvalue()


def test_a_network_is_pruned_while_it_learns_from_the_dense_one(gradual: tuple[Path, str]) -> None:
    out, printed = gradual
    written, masks = results(out), px.Masks.from_pretrained(out)
    assert masks.kept == written["weights_kept"] == round(0.1 * masks.total)
    assert not masks.revived(AutoModelForImageClassification.from_pretrained(out))
    told = json.loads((out / "config.json").read_text())["px"]
    assert (told["schedule"], told["until"], told["rounds"], told["distilled_from"]) == ("gradual", 0.5, 3, "dense")
    assert "ended_early" not in told
    assert "dense_eval_accuracy" in written
    assert re.findall(r"round (\d) of 3 at step (\d+): ([\d.]+) % sparse", printed) == [
        ("1", "0", "53.6"), ("2", "3", "78.5"), ("3", "7", "90.0")
    ]  # fmt: skip
    history = json.loads((out / "checkpoint-14/trainer_state.json").read_text())["log_history"]
    assert [round(entry["sparsity"], 3) for entry in history if "loss" in entry][-1] == 0.9
    assert accuracy_of(out) == written["test_accuracy"]
    assert accuracy_of(out / "teacher", out) == written["dense_test_accuracy"]


@pytest.mark.parametrize("step", [2, 6, 12])
def test_a_gradual_run_resumes_from_any_checkpoint_to_the_same_end(
    folder: Path, gradual: tuple[Path, str], step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense network is not trained again, unless it was lost."""
    out = folder / f"gradual-{step}"
    shutil.copytree(gradual[0], out)
    if step == 6:
        shutil.rmtree(out / "teacher")
    else:
        monkeypatch.setattr(ClassificationJob, "train_dense", lambda _: pytest.fail("trained again"))
    resume = ["--resume_from_checkpoint", str(out / f"checkpoint-{step}"), "--overwrite_output_dir"]
    run_here(settings(folder, out.name, *TAUGHT, *resume))
    assert (out / "model.safetensors").read_bytes() == (gradual[0] / "model.safetensors").read_bytes()
    assert results(out) == results(gradual[0])
    assert (out / "teacher/model.safetensors").is_file()


def test_whole_units_are_taken_out_after_a_gradual_run(folder: Path) -> None:
    more = [*GRADUAL[:4], "--scope", "structured", "--sparsity", "0.3", "--min_layer_density", "0.2"]
    run_here(settings(folder, "small", *more))
    out = folder / "small"
    first = results(out)
    assert first["parameters_kept"] == px.from_pretrained(out).num_parameters() < first["parameters"]
    assert 0.2 < first["sparsity"] <= 0.3
    history = json.loads((out / "checkpoint-14/trainer_state.json").read_text())["log_history"]
    masked = [entry for entry in history if "eval_loss" in entry][-1]  # before they were taken out
    assert masked["eval_accuracy"] == first["eval_accuracy"]
    assert masked["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)

    resume = ["--resume_from_checkpoint", str(out / "checkpoint-7"), "--overwrite_output_dir"]
    run_here(settings(folder, "small", *more, *resume))
    assert results(out) == first


def test_a_run_that_ends_before_its_last_round_claims_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 5

    make = classification_job.make_trainer
    monkeypatch.setattr(
        classification_job, "make_trainer", lambda *args: make(*args[:4], [*args[4], Stop()], *args[5:])
    )
    with pytest.warns(UserWarning, match="Pruning ended with round 2 of 3, after 5 steps"):
        run_here(settings(folder, "stopped", *GRADUAL))
    written, masks = results(folder / "stopped"), px.Masks.from_pretrained(folder / "stopped")
    assert written["sparsity"] == masks.sparsity == pytest.approx(0.784, abs=1e-3)
    assert written["ended_early"]
    assert json.loads((folder / "stopped/config.json").read_text())["px"]["ended_early"]


def test_a_teacher_from_a_folder(folder: Path, finished: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    one_epoch = ["--num_train_epochs", "1", "--save_strategy", "no", "--criterion", "magnitude"]
    run_here(settings(folder, "taught", *one_epoch, "--distill", str(finished[0])))
    run_here(settings(folder, "untaught", *one_epoch))
    told = [json.loads((folder / name / "config.json").read_text())["px"] for name in ("taught", "untaught")]
    assert [entry.get("distilled_from") for entry in told] == ["finished", None]
    assert "schedule" not in told[0]
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("taught", "untaught")]
    assert weights[0] != weights[1]
    assert not (folder / "taught/teacher").exists()

    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(px.TargetError, match="the teacher has other classes than the model: 4"):
        run_here(settings(folder, "bad", "--distill", str(folder / "backbone")))
    labels = {k: str(k) for k in range(10)}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", id2label=labels)
    ResNetForImageClassification(config).save_pretrained(folder / "other")
    with pytest.raises(px.TargetError, match="hidden states do not match"):
        run_here(settings(folder, "misfit", "--distill", str(folder / "other"), "--distill_hidden", "1"))


# --- bad input: a clear error, and nothing is written or lost ---


def run_here(argv: list[str]) -> None:
    set_seed(0)
    prune_finetune.main(argv)


def colours(labels: list, feature: object = None) -> Dataset:
    images = [Image.new("RGB", (16, 16), (40 * (row % 6), 90, 10)) for row in range(len(labels))]
    features = Features({"image": ImageFeature(), "label": feature or ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": images, "label": labels}, features=features)


BAD_ARGUMENTS = [
    (["--sparsity", "1.0"], px.InvalidArgumentError, r"must be in \[0, 1\)"),
    (["--sparsity", "nan"], px.InvalidArgumentError, "nan"),
    (["--rounds", "0"], px.InvalidArgumentError, "rounds=0"),
    (["--scope", "channel"], px.InvalidArgumentError, "'channel', expected one of 'global'"),
    (["--scope", "4:2"], px.InvalidArgumentError, "scope='4:2'.*0 < n < m"),
    (["--scope", "2:4", "--sparsity", "0.3"], px.InvalidArgumentError, "less than scope='2:4' prunes"),
    (["--sparcity", "0.5"], px.InvalidArgumentError, "Unknown arguments: --sparcity 0.5. Did you mean --sparsity"),
    (["--criterion", "magnitude", "--power", "0.5"], px.InvalidArgumentError, "--power is for the px criteria"),
    (["--scope", "structured", "--control", "shuffle"], px.InvalidArgumentError, "--control changes single weights"),
    (["--scope", "structured", "--sparsity", "0.99"], px.TargetError, "out of reach with scope='structured'"),
    (["--schedule", "gradual", "--until", "0"], px.InvalidArgumentError, r"until=0.0: expected .* in \(0, 1\]"),
    (["--until", "0.3"], px.InvalidArgumentError, "--until says when --schedule gradual ends"),
    (["--schedule", "gradual", "--rounds", "99"], px.InvalidArgumentError, "rounds=99 do not fit into training"),
    (["--schedule", "gradual", "--max_steps", "3"], px.InvalidArgumentError, "total_steps=3 leaves 1 step"),
    (["--schedule", "gradual", "--control", "shuffle"], px.InvalidArgumentError, "--control shuffle changes masks"),
    (["--schedule", "gradual", "--dense"], px.InvalidArgumentError, "--dense prunes nothing, and --schedule gradual"),
    (["--schedule", "gradual", "--keep_masks"], px.InvalidArgumentError, "--keep_masks prunes nothing more"),
    (["--distill_alpha", "0.3"], px.InvalidArgumentError, "need --distill"),
    (["--distill", "dense", "--distill_temperature", "0"], px.InvalidArgumentError, "temperature=0.0"),
    (["--distill", "dense", "--dense"], px.InvalidArgumentError, "--distill dense teaches a pruned network"),
    (["--distill", "dense", "--keep_masks"], px.InvalidArgumentError, "--distill dense needs the unpruned network"),
    (["--distill", "./no/such"], px.CheckpointError, "Cannot get config.json of './no/such'"),
    (["--power", "-1"], px.InvalidArgumentError, "power=-1"),
    (["--config", "no/such.yaml"], px.InvalidArgumentError, "Cannot read --config no/such.yaml"),
    (["--model_name_or_path", "./no/such"], px.CheckpointError, "Cannot load the image processor of ./no/such"),
    (["--train_dir", "no/such"], px.DataError, "No such file or folder: no/such"),
    (["--dataset_name", "./no/such"], px.DataError, "Cannot read the dataset './no/such'"),
    (["--label_column_name", "digit"], px.DataError, "No column 'digit' for the label"),
    (["--examples_per_class", "99"], px.DataError, "10 of 10 classes have fewer"),
    (["--resume_from_checkpoint", "true"], px.CheckpointError, "No whole checkpoint .*there is none"),
    (["--resume_from_checkpoint", "no/such"], px.CheckpointError, "no/such: there is no such folder"),
]


@pytest.mark.parametrize(("more", "error", "message"), BAD_ARGUMENTS, ids=[" ".join(row[0]) for row in BAD_ARGUMENTS])
def test_bad_arguments(folder: Path, more: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_here(settings(folder, "bad", *more))
    assert not (folder / "bad").exists()


def test_bad_data_is_an_error_that_names_it(folder: Path, tmp_path: Path) -> None:
    rows = {
        "missing class": (colours([0] * 20), r"1 of 2 classes have no example.*'b'"),
        "few": (colours([0] * 20 + [1] * 5), r"1 of 2 classes have fewer in split 'train': 'b': 4"),
        "float labels": (colours([0.0, 1.0] * 10, Value("float64")), "No column is of type ClassLabel"),
    }
    for name, (data, message) in rows.items():
        data.to_parquet(tmp_path / "train.parquet")
        with pytest.raises(px.DataError, match=message):
            run_here(settings(folder, "bad", "--train_file", str(tmp_path / "train.parquet")))
        assert not (folder / "bad").exists(), name
        (tmp_path / "train.parquet").unlink()


def test_an_unreadable_image_is_named(folder: Path, tmp_path: Path) -> None:
    good = colours([0, 1] * 20)
    files = [
        {"bytes": row["bytes"], "path": None} for row in good.cast_column("image", ImageFeature(decode=False))["image"]
    ]
    files[23] = {"bytes": b"\x89PNG", "path": None}
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": files, "label": good["label"]}, features=features).cast_column(
        "image", ImageFeature()
    ).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(px.DataError, match="Unreadable image in split 'train' at index 23"):
        run_here(settings(folder, "unreadable", "--train_file", str(tmp_path / "train.parquet"), "--rounds", "1"))
    shutil.rmtree(folder / "unreadable", ignore_errors=True)


def test_a_finished_model_is_not_overwritten_unasked(folder: Path, finished: tuple[Path, str]) -> None:
    shutil.copytree(finished[0], folder / "copy")
    before = {path: path.read_bytes() for path in (folder / "copy").rglob("*") if path.is_file()}
    for more in ([], ["--resume_from_checkpoint", "true"]):
        with pytest.raises(px.OutputExistsError, match=r"already holds a model.*--overwrite_output_dir"):
            run_here(settings(folder, "copy", *more))
    assert {path: path.read_bytes() for path in (folder / "copy").rglob("*") if path.is_file()} == before
    run_here(settings(folder, "copy", "--overwrite_output_dir", "--sparsity", "0.5", "--num_train_epochs", "1"))
    assert results(folder / "copy")["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert [path.name for path in (folder / "copy").glob("checkpoint-*")] == ["checkpoint-7"]


def test_a_half_written_checkpoint_is_named_and_an_older_whole_one_found(
    folder: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    whole = sorted(finished[0].glob("checkpoint-*"))
    for path in whole:
        shutil.copytree(path, tmp_path / path.name)
    older, newest = sorted((tmp_path / path.name for path in whole), key=lambda path: int(path.name.split("-")[1]))
    assert output_folder.find_checkpoint(tmp_path, "true") == str(newest)
    assert output_folder.find_checkpoint(tmp_path, "false") is None

    (newest / "optimizer.pt").unlink()
    assert output_folder.find_checkpoint(tmp_path, "true") == str(older)
    with pytest.raises(px.CheckpointError, match=r"checkpoint-\d+: half-written, optimizer.pt is missing"):
        output_folder.find_checkpoint(tmp_path, str(newest))
    weights = older / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        px.CheckpointError, match=r"model.safetensors is damaged.*optimizer.pt is missing|optimizer.*damaged"
    ):
        output_folder.find_checkpoint(tmp_path, "true")


def test_a_resumed_run_does_not_take_other_settings(folder: Path, finished: tuple[Path, str]) -> None:
    checkpoint = str(max(finished[0].glob("checkpoint-*")))
    for more, message in {
        ("--sparsity", "0.5"): "sparsity_asked: 0.9 then, 0.5 now",
        ("--criterion", "magnitude"): r"criterion: PX\(.*\) then, Magnitude\(\) now",
        ("--seed", "1"): "seed: 42 then, 1 now",
    }.items():
        with pytest.raises(px.InvalidArgumentError, match=message):
            run_here(settings(folder, "resumed", "--resume_from_checkpoint", checkpoint, *more))
    assert not (folder / "resumed").exists()


def test_a_gradual_run_is_not_resumed_as_another(folder: Path, gradual: tuple[Path, str]) -> None:
    resume = ["--resume_from_checkpoint", str(gradual[0] / "checkpoint-2")]
    for more, message in (
        (GRADUAL[2:], "schedule: gradual then, None now"),
        ([*TAUGHT, "--until", "0.6"], "until: 0.5 then, 0.6 now"),
        (GRADUAL, "distilled_from: dense then, None now"),
    ):
        with pytest.raises(px.InvalidArgumentError, match=message):
            run_here(settings(folder, "resumed", *more, *resume))
    assert not (folder / "resumed").exists()


def test_processes_that_do_not_know_of_each_other_stop(folder: Path) -> None:
    printed = run(folder, TWO + settings(folder, "alone"), expect=1, CUDA_VISIBLE_DEVICES="")
    assert "LaunchError: 2 processes were launched but Accelerate sees 1" in printed
    assert not (folder / "alone").exists()


# --- arguments ---


def test_the_command_line_overrides_the_file_and_the_file_the_example(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("sparsity: 0.7\nhorizontal_flip: true\nnum_train_epochs: 2\nlearning_rate: 1e-4\nbf16: false\n")
    model, data, prune, training = prune_finetune.parse(["--config", str(config), "--num-train-epochs", "5"])
    assert (prune.sparsity, training.num_train_epochs, training.learning_rate) == (0.7, 5.0, 1e-4)
    assert (data.horizontal_flip, data.random_crop, prune.compare_dense) == (True, False, True)
    assert model.model_name_or_path == arguments.EXAMPLE_MODEL
    assert training.output_dir == "outputs/resnet-digits-px-balanced70-gradual"


def test_the_schedule_has_its_own_rounds_and_is_in_the_name() -> None:
    one_shot = ["--schedule", "one-shot"]
    for more, rounds in (([], 8), (["--rounds", "5"], 5), (one_shot, 10), ([*one_shot, "--rounds", "5"], 5)):
        *_, prune, training = prune_finetune.parse(more)
        assert prune.rounds == rounds
        name = "px-active90" if more[:2] == one_shot else "px-balanced90-gradual"
        assert training.output_dir == f"outputs/resnet-digits-{name}"


@pytest.mark.parametrize(
    ("more", "schedule"),
    [
        ([], "gradual"),
        (["--criterion", "magnitude"], "gradual"),
        (["--scope", "2:4"], "gradual"),
        (["--scope", "structured"], "one-shot"),
        (["--control", "shuffle"], "one-shot"),
        (["--dense"], "one-shot"),
        (["--keep_masks"], "one-shot"),
        (["--repair", "layers"], "one-shot"),
        (["--lora"], "one-shot"),
        (["--num_train_epochs", "0"], "one-shot"),
    ],
)
def test_when_a_network_is_pruned_by_default(more: list[str], schedule: str) -> None:
    *_, prune, _ = prune_finetune.parse([*more, "--compare_dense", "false"])
    assert prune.schedule == schedule
    assert "schedule" not in prune.describe() if schedule == "one-shot" else prune.describe()["schedule"] == schedule


def test_a_short_training_has_as_many_rounds_as_fit(folder: Path) -> None:
    """Of the default number; the number that is given is not changed (see BAD_ARGUMENTS)."""
    *_, prune, _ = prune_finetune.parse([])
    for steps, rounds in ((1000, 8), (14, 8), (13, 7), (3, 2), (1, 1)):
        prune.fit_rounds(steps)
        assert prune.rounds == rounds
    *_, given, _ = prune_finetune.parse(["--rounds", "8"])
    given.fit_rounds(3)
    assert given.rounds == 8


def test_the_example_settings_are_for_the_embedded_digits_only() -> None:
    _, data, prune, training = prune_finetune.parse(
        ["--train-dir", "photos/train", "--model_name_or_path", "timm/resnet18"]
    )
    assert (data.horizontal_flip, data.random_crop, prune.compare_dense) == (True, True, False)
    assert training.output_dir == "outputs/resnet18-photos-px-balanced90-gradual"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "no YAML mapping"),
        ("a: [", "Cannot read --config"),
        ("sparcity: 1\n", "Did you mean --sparsity"),
    ],
)
def test_bad_config_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(px.InvalidArgumentError, match=message):
        prune_finetune.parse(["--config", str(tmp_path / "run.yaml")])


def test_help_lists_our_arguments_and_those_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prune_finetune.parse(["--help", "all"])
    printed = capsys.readouterr().out
    for name in ("--criterion", "--label_column_name", "--trust_remote_code", "--gradient_accumulation_steps"):
        assert name in printed
