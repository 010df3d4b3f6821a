"""The command `px-hf`: its programs, its launcher, its help, and what `px-hf inspect` says of a folder."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_server import HubServer
from safetensors.torch import load_file, save_file
from test_hub import edit_config, pruned, remove, resnet, timm_resnet, truncate, vit
from transformers import AutoModelForImageClassification, TrainingArguments

import px_hf as px
from px_hf.commands import (
    cli,
    compare_criteria,
    evaluate_downstream,
    export_onnx,
    inspect_model,
    prune_finetune,
    prune_segment,
    quick_help,
    run,
    transfer,
)
from px_hf.runs.arguments import DataArguments, FineTuneArguments, ModelArguments
from px_hf.runs.downstream_arguments import parse_downstream
from px_hf.runs.embedded_models import EMBEDDED, embedded
from px_hf.runs.help import Usage, asked, help_text, options_of, topics_of
from px_hf.runs.parsing import PRESETS
from px_hf.runs.pruning_arguments import PruneArguments

hub_client = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4


def called(*words: str) -> int:
    """The exit code of `px-hf words`."""
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code if isinstance(ended.value.code, int) else int(ended.value.code is not None)


# ---------------------------------------- programs


@pytest.mark.parametrize("name", cli.PROGRAMS)
def test_every_program_is_there_and_says_how_it_is_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert called(name, "--help") == 0
    assert f"px-hf {name}" in capsys.readouterr().out


def test_the_list_and_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("--help") == 0
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in cli.PROGRAMS)
    assert len(printed.splitlines()) < 24
    assert called("--version") == 0
    assert capsys.readouterr().out == f"px_hf {px.__version__}\n"
    assert called() == 2
    assert capsys.readouterr().err == printed


def test_a_name_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert called("prnue", "--sparsity", "0.5") == 2
    assert "there is no 'prnue'. Did you mean prune?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        *(
            [],
            ["--help"],
            ["--version"],
            ["inpsect"],
            ["prune", "--num_processes", "x"],
            ["prune", "--help", "nothing"],
        ),
        *([name, "--help"] for name in cli.PROGRAMS),
        *(["prune", "--sparsity", "0.5", "--help", topic] for topic in ("data", "pruning", "lora", "distillation")),
    ],
    ids=" ".join,
)
def test_what_needs_no_model_does_not_load_torch(words: list[str]) -> None:
    script = "import sys, px_hf.commands.cli as cli\ntry: cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    script += "assert not {'torch', 'transformers', 'rich', 'datasets', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", script, *words], check=True, timeout=60, capture_output=True)


# ---------------------------------------- exit and launcher


def raises(error: BaseException) -> Callable[[list[str]], int]:
    def main(argv: list[str]) -> int:
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "code"),
    [
        (lambda argv: None, 0),
        (lambda argv: 0, 0),
        (lambda argv: 3, 1),
        (raises(px.DataError("no data")), "DataError: no data"),
        (raises(KeyboardInterrupt()), 130),
    ],
)
def test_exit_codes(main: Callable[[list[str]], int | None], code: int | str) -> None:
    with pytest.raises(SystemExit) as ended:
        run(main, ["a"])
    assert ended.value.code == code


class Child:
    """Stands for the launcher."""

    code: int | BaseException = 0

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        type(self).command, type(self).env, type(self).told = command, env, []

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.told.append("waited for")

    def wait(self, timeout: float | None = None) -> int:
        if timeout is not None:
            raise subprocess.TimeoutExpired("launcher", timeout)
        if isinstance(self.code, BaseException):
            raise self.code
        return self.code

    def terminate(self) -> None:
        self.told.append("terminated")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(cli.subprocess, "Popen", Child)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    monkeypatch.setattr(prune_finetune, "main", lambda argv: pytest.fail("ran here") if argv == ["launched"] else 0)
    Child.command, Child.code = [], 0
    return Child


@pytest.mark.parametrize(
    ("words", "devices", "count"),
    [
        (["--num_processes", "3", "launched"], 0, 3),
        (["launched", "--num-processes=2"], 4, 2),
        (["launched"], 4, 4),
        (["here"], 1, None),
        (["here"], 0, None),
        (["here", "--num_processes", "1"], 4, None),
    ],
)
def test_the_launcher(
    launched: Any, monkeypatch: pytest.MonkeyPatch, words: list[str], devices: int, count: int | None
) -> None:
    monkeypatch.setattr(cli, "_devices", lambda: devices)
    assert called("prune", *words) == 0
    if count is None:
        assert launched.command == []
        return
    assert launched.command[-4:] == ["-m", "px_hf", "prune", "launched"]
    assert launched.command[launched.command.index("--num_processes") + 1] == str(count)
    assert ("ACCELERATE_USE_CPU" in launched.env) == (devices == 0)


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (-15, 1), (KeyboardInterrupt(), 130)])
def test_what_the_launcher_ends_with(
    launched: Any, monkeypatch: pytest.MonkeyPatch, code: int | BaseException, expected: int
) -> None:
    monkeypatch.setattr(cli, "_devices", lambda: 0)
    launched.code = code
    assert called("prune", "--num_processes", "2", "launched") == expected
    assert launched.told == (["terminated", "waited for"] if expected == 130 else ["waited for"])


def test_a_process_of_a_launch_launches_nothing(launched: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert called("prune", "here") == 0
    assert launched.command == []


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_bad_numbers_of_processes(count: str) -> None:
    with pytest.raises(SystemExit, match="how many processes to start"):
        cli.main(["prune", "--num_processes", count])


# ---------------------------------------- help

TRAINERS_OWN = {each.name for each in fields(TrainingArguments)} - vars(FineTuneArguments)["__annotations__"].keys()
PARSED = {
    "prune": (prune_finetune.parse, prune_finetune.USAGE),
    "evaluate": (evaluate_downstream.parse, evaluate_downstream.USAGE),
    "transfer": (transfer.parse, transfer.USAGE),
    "segment": (prune_segment.parse, prune_segment.USAGE),
    "compare": (compare_criteria.main, compare_criteria.USAGE),
}


@pytest.mark.parametrize("name", PARSED)
def test_help_fits_a_screen(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    parse, usage = PARSED[name]

    def page(*topic: str) -> str:
        with pytest.raises(SystemExit) as ended:
            parse(["--sparsity", "0.5", "--help", *topic] if name != "compare" else ["--help", *topic])
        assert not ended.value.code
        return capsys.readouterr().out

    short = page()
    assert len(short.splitlines()) <= 42
    assert f"px-hf {name} --model_name_or_path" in short
    assert all(f"--{option}" in short for option in usage.common)
    topics = short.splitlines()[-1].removeprefix(f"More: px-hf {name} --help ").split(" | ")
    assert topics[-1] == "all"
    for topic in topics[:-1]:
        assert 3 < len(page(topic).splitlines()) <= 46, topic
        assert all(len(line) <= 100 for line in page(topic).splitlines())
    with pytest.raises(px.InvalidArgumentError, match=r"There is no help on 'prunning'.*--help .*all"):
        parse(["--help", "prunning"])


def test_the_stored_help_is_what_the_programs_say() -> None:
    """After an option was changed: python -m px_hf.commands.quick_help."""
    stored, now = json.loads(quick_help.FILE.read_text(encoding="utf-8")), quick_help.described()
    for said in (*stored.values(), *now.values()):
        for option in said["options"]:
            if option["name"] in TRAINERS_OWN:  # in the words of the transformers that is installed
                option["text"] = option["default"] = ""
    assert stored == json.loads(json.dumps(now))


@pytest.mark.parametrize("words", [(), ("data",), ("pruning",), ("lora",)])
def test_stored_pages_are_those_of_the_program(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prune_finetune.parse(["--help", *words])
    assert quick_help.stored_page("prune", ["--help", *words]) == capsys.readouterr().out
    assert quick_help.stored_page("prune", ["--sparsity", "0.5"]) is None
    assert quick_help.stored_page("prune", ["--help", "training"]) is None


def test_all_help_has_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        prune_finetune.parse(["--help", "all"])
    printed = capsys.readouterr().out
    for group in (ModelArguments, DataArguments, PruneArguments, FineTuneArguments):
        for each in fields(group):
            assert f"  --{each.name}" in printed


def test_every_option_of_ours_has_a_topic() -> None:
    found = topics_of([ModelArguments, DataArguments, PruneArguments, FineTuneArguments])
    assert not [name for name, topic in found.items() if topic is None and name not in TRAINERS_OWN]
    assert {topic for topic in found.values() if topic} == {
        "model",
        "data",
        "pruning",
        "distillation",
        "lora",
        "training",
        "saving",
    }


def test_help_is_asked_for_in_any_place() -> None:
    assert asked(["--sparsity", "0.5"]) is None
    assert asked(["--help"]) == asked(["-h", "--sparsity", "1"]) == asked(["--sparsity", "1", "--help"]) == ""
    assert asked(["--help", "data"]) == "data"


def test_percent_signs_and_defaults_are_shown_as_meant() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--share", type=float, default=0.25, help="At 90 %% of it. And more.")
    parser.add_argument("--on", type=bool, default=True, help="On.")
    text = help_text(Usage("x", "y", (), ("share", "on")), "", options_of([], parser._actions), 80)
    assert "  --share X                   At 90 % of it. [0.25]\n" in text
    assert "  --on                        On. [on]\n" in text


def test_embedded_models_are_known_by_name() -> None:
    assert embedded("demo-vit") == EMBEDDED["demo-vit"] != "demo-vit"
    assert Path(embedded("demo-resnet"), "model.safetensors").is_file()
    assert embedded("me/demo-vit") == "me/demo-vit"
    model, *_ = prune_finetune.parse(["--model_name_or_path", "demo-vit", "--dataset_name", "beans"])
    assert (model.model_name_or_path, model.short_name()) == (EMBEDDED["demo-vit"], "vit")
    words = ["--model_name_or_path", "demo-resnet"]
    *_, training = parse_downstream(words, transfer.TransferArguments, transfer.USAGE, "{model}")
    assert training.num_train_epochs == 5.0  # the example's
    assert list(EMBEDDED.values()) == export_onnx.DEMO


# ---------------------------------------- inspect


def saved(folder: Path, make: Callable[[], Any] = vit, **provenance: Any) -> px.Masks:
    model, masks = pruned(make)
    px.save_pretrained(model, masks, folder, provenance=provenance)
    return masks


@pytest.mark.parametrize("make", [vit, resnet, timm_resnet])
def test_a_whole_folder(make: Callable[[], Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = saved(tmp_path / "out", make, criterion="PX()", rounds=7, calibration={"examples": 5, "sha256": "ab"})
    found = px.inspect(tmp_path / "out")
    assert found.problems == ()
    assert {layer.name: (layer.shape, layer.weights, layer.kept) for layer in found.layers} == {
        name: (tuple(mask.shape), mask.numel(), int(mask.sum())) for name, mask in masks.items()
    }
    assert (found.weights, found.kept, found.sparsity) == (masks.total, masks.kept, masks.sparsity)
    assert found.dense_bytes == {"model.safetensors": (tmp_path / "out/model.safetensors").stat().st_size}
    assert found.compact_bytes == {
        "sparse/model.safetensors": (tmp_path / "out/sparse/model.safetensors").stat().st_size
    }
    assert called("inspect", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "criterion: PX()" in printed
    assert "rounds: 7" in printed
    assert f"{masks.kept:,} of {masks.total:,} prunable weights kept" in printed
    assert "Every pruned weight is zero" in printed


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = saved(tmp_path / "out")
    assert called("inspect", str(tmp_path / "out"), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["ok"], told["sparsity"], told["weights_kept"]) == (True, masks.sparsity, masks.kept)
    assert told["architecture"] == "ViTForImageClassification (transformers)"
    assert {layer["name"] for layer in told["layers"]} == masks.keys()


def test_like_layers_are_one_line_unless_all_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = saved(tmp_path / "out")
    assert called("inspect", str(tmp_path / "out")) == 0
    short = capsys.readouterr().out
    assert called("inspect", str(tmp_path / "out"), "--layers") == 0
    whole = capsys.readouterr().out
    assert ".*." in short
    assert all(name in whole for name in masks)
    assert len(short.splitlines()) < len(whole.splitlines())


def one_weight_revives(folder: Path) -> None:
    masks = px.Masks.from_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    spans = {tuple(tensor.shape): name for name, tensor in state.items()}
    mask = masks[next(iter(masks))]
    for name in spans.values():
        if state[name].shape == mask.shape and not state[name][~mask].any():
            state[name][tuple((~mask).nonzero()[0])] = 1.0
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def stock_saves_other_weights(folder: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(folder)


def only_the_config_is_left(folder: Path) -> None:
    shutil.rmtree(folder / "sparse")


PROBLEMS = {
    "a weight revives": (one_weight_revives, "masks of [12] layers do not hold"),
    "stock saves over it": (stock_saves_other_weights, "are not the same model: .*Another library has saved over"),
    "another class name": (edit_config(id2label={"0": "cat", "1": "dog"}), "do not agree on id2label"),
    "no masks": (only_the_config_is_left, "there are no masks: stock saving carries that entry along"),
    "no inner config": (remove("sparse/config.json"), "sparse/config.json cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_problems_are_told(problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = PROBLEMS[problem]
    saved(tmp_path / "out")
    change(tmp_path / "out")
    assert re.search(message, " ".join(px.inspect(tmp_path / "out").problems))
    assert called("inspect", str(tmp_path / "out")) == 1
    printed = capsys.readouterr().out
    assert "Problem: " in printed
    assert "Every pruned weight is zero" not in printed


def no_config(folder: Path) -> None:
    shutil.rmtree(folder / "sparse")
    (folder / "config.json").unlink()


NOT_MODELS = {
    "no config": (no_config, "holds no config.json"),
    "a list": (lambda folder: (folder / "config.json").write_text("[1]"), "no JSON object"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
    "too deep": (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot be read"),
    "no text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "cut copy": (truncate("sparse/model.safetensors"), "cannot be used"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_MODELS)
def test_a_broken_folder_is_an_error(name: str, tmp_path: Path) -> None:
    damage, message = NOT_MODELS[name]
    saved(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(px.CheckpointError, match=message):
        px.inspect(tmp_path / "out")
    assert called("inspect", str(tmp_path / "out")) == 1


def test_an_ordinary_model_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vit().save_pretrained(tmp_path / "out")
    assert called("inspect", str(tmp_path / "out")) == 0
    assert "px_hf has not pruned it" in capsys.readouterr().out
    assert not px.inspect(tmp_path / "out").pruned
    assert called("inspect", "demo-vit") == 0
    assert called("inspect", str(tmp_path / "nowhere")) == 1


def test_a_checkpoint_of_the_trainer(tmp_path: Path) -> None:
    model, masks = pruned()
    model.save_pretrained(tmp_path)
    masks.save(tmp_path / "masks.safetensors")
    assert px.inspect(tmp_path).problems == ()
    assert px.inspect(tmp_path).kept == masks.kept
    with torch.no_grad():
        next(parameter for name, parameter in model.named_parameters() if name in masks).fill_(1.0)
    model.save_pretrained(tmp_path)
    assert "do not hold in the dense file" in px.inspect(tmp_path).problems[0]


def test_the_compact_copy_alone(tmp_path: Path) -> None:
    masks = saved(tmp_path / "out")
    shutil.copytree(tmp_path / "out" / "sparse", tmp_path / "alone" / "sparse")
    for folder in (tmp_path / "out" / "sparse", tmp_path / "alone"):
        found = px.inspect(folder)
        assert (found.kept, found.problems, found.dense_bytes) == (masks.kept, (), {})
        assert "this is the compact copy" in found.notes[0]


def test_a_terminal_is_not_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "out", criterion="\x1b[2J[bold]red\n")
    edit_config(architectures=["\x1b]0;owned\x07"])(tmp_path / "out")
    called("inspect", str(tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "[bold]red" in printed


@hub_client
def test_a_repository_of_the_hub(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, masks = pruned()
    px.push_to_hub(model, masks, "alice/model")
    found = px.inspect("alice/model")
    assert (found.kept, found.problems) == (masks.kept, ())
    assert found.commit is not None
    assert found.dense_bytes["model.safetensors"] > found.compact_bytes["sparse/model.safetensors"]
    assert hub.count("GET /alice/model/resolve/[^/]*/model.safetensors") == 0  # known by its SHA-256
    stock_saves_other_weights_to(hub, tmp_path)
    assert called("inspect", "alice/model") == 1
    assert "are not the same model" in capsys.readouterr().out
    assert called("inspect", "alice/nothing") == 1


def stock_saves_other_weights_to(hub: HubServer, tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained("alice/model")
    with torch.no_grad():
        model.classifier.bias.add_(1.0)
    model.push_to_hub("alice/model")


def test_check_copies_is_public(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    px.check_copies(tmp_path / "out")
    stock_saves_other_weights(tmp_path / "out")
    with pytest.raises(px.CheckpointError, match="are not the same model"):
        px.check_copies(tmp_path / "out")


def test_the_program_counts_problems(tmp_path: Path) -> None:
    saved(tmp_path / "out")
    only_the_config_is_left(tmp_path / "out")
    assert inspect_model.main([str(tmp_path / "out")]) == 1


# ---------------------------------------- settings by name


@pytest.mark.parametrize("name", PRESETS)
def test_settings_that_come_with_px_hf(name: str) -> None:
    backbone, _, percent = name.partition("-")
    *_, prune, training = prune_finetune.parse(["--config", name, "--model_name_or_path", f"demo-{backbone}"])
    assert prune.sparsity == int(percent) / 100
    assert prune.gradual == (percent != "50")
    assert prune.criterion_name == ("px-balanced" if prune.gradual else "px-active")
    assert training.learning_rate == (1e-3 if backbone == "vit" else 2e-3)
    *_, training = prune_finetune.parse(["--config", name, "--learning_rate", "1e-4"])
    assert training.learning_rate == 1e-4


def test_the_help_names_all_of_them() -> None:
    (config,) = [each for each in fields(ModelArguments) if each.name == "config"]
    assert len(PRESETS) == 6
    assert all(name in config.metadata["help"] for name in PRESETS)
    with pytest.raises(px.InvalidArgumentError, match=r"Cannot read --config vit-99: .*one of resnet-50, .*vit-90"):
        prune_finetune.parse(["--config", "vit-99"])


def test_the_citation_is_that_of_this_version() -> None:
    content = yaml.safe_load((Path(__file__).parents[1] / "CITATION.cff").read_text(encoding="utf-8"))
    assert content["version"] == px.__version__
    assert content["preferred-citation"]["identifiers"][0]["value"] == "arXiv:2406.01820"
