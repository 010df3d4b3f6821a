"""The recipe publishes to a Hub on this machine; clean processes load from it, and fine-tune it further."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from datasets import ClassLabel
from hub_server import HubServer, User
from safetensors.torch import load_file
from test_recipe import PLAIN, TWO, results, run, run_here, settings
from transformers import (
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

import px_hf as px
from px_hf.data.embedded import characters as demo_data

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4
SHORT = ("--num_train_epochs", "2", "--max_train_samples", "120", "--eval_strategy", "no")


@pytest.fixture(scope="module")
def local_hub() -> Iterator[HubServer]:
    with HubServer() as hub:
        hub.users = {"hf_alice": User("alice"), "hf_bob": User("bob")}
        yield hub


@pytest.fixture(scope="module")
def folder(folder: Path) -> Path:
    """With another tiny backbone, of timm."""
    pretrained = {**timm.create_model("test_resnet").pretrained_cfg, "input_size": (3, 32, 32), "num_classes": 4}
    wrapped = TimmWrapperConfig(architecture="test_resnet", pretrained_cfg=pretrained, num_labels=4)
    TimmWrapperForImageClassification(wrapped).save_pretrained(folder / "timm")
    return folder


def on_hub(hub: HubServer, folder: Path, token: str | None = "hf_alice") -> dict[str, str]:
    return hub.environment(folder / "home", token)


@pytest.fixture(scope="module")
def pushed(local_hub: HubServer, folder: Path) -> None:
    """alice/resnet, by the recipe in a process of its own, and alice/timm, by the recipe in this one."""
    more = ("--push_to_hub", "--compare_dense", "true", "--hub_model_id")
    run(folder, PLAIN + settings(folder, "resnet", *SHORT, *more, "alice/resnet"), **on_hub(local_hub, folder))
    more = ("--model_name_or_path", str(folder / "timm"), *more, "timm", "--hub_private_repo", "true")
    with pytest.MonkeyPatch.context() as monkeypatch:
        local_hub.use_here(monkeypatch, folder / "here")
        run_here(settings(folder, "timm-run", *SHORT, *more))


@pytest.fixture
def here(local_hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a client too."""
    local_hub.use_here(monkeypatch, folder / "here")


def test_the_recipe_pushes_in_one_commit(local_hub: HubServer, folder: Path, pushed: None) -> None:
    for repo_id, out in (("alice/resnet", "resnet"), ("alice/timm", "timm-run")):
        repo = local_hub.repos[repo_id]
        assert len(repo.history()) == 2
        files = repo.files("main")
        assert not [name for name in files if "checkpoint" in name or "training_args" in name]
        assert (
            local_hub.objects[files["model.safetensors"].lfs or ""]
            == (folder / out / "model.safetensors").read_bytes()
        )
        config = json.loads(files["config.json"].content)
        written = results(folder / out)
        assert config["px"]["masks_sha256"] == written["masks_sha256"]
        assert config["px"]["criterion"] == repr(px.CRITERIA["px-active"])
        assert config["px"]["calibration"] == written["calibration"]
        card = files["README.md"].content.decode()
        for shown in ("test_accuracy", "dense_test_accuracy", "eval_accuracy"):
            assert f"{100 * written[shown]:.2f} %" in card
        assert f"{written['effective_macs']:,}" in card
    assert local_hub.repos["alice/timm"].private
    assert not local_hub.repos["alice/resnet"].private


LOAD = """
import json, sys
if sys.argv[1] != "px_hf":
    sys.modules["px_hf"] = None
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

image = Image.frombytes("L", (8, 8), bytes(range(0, 256, 4))).convert("RGB")
found, said = {}, {}
with torch.no_grad():
    for repo in ("alice/resnet", "alice/timm"):
        processor = AutoImageProcessor.from_pretrained(repo)
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        found[f"{repo} pixels"] = pixels
        if sys.argv[1] == "px_hf":
            import px_hf as px
            model = px.from_pretrained(repo).eval()
            found[repo] = model(pixel_values=pixels).logits
            masks = px.Masks.from_pretrained(repo)
            said[repo] = masks.fingerprint(), masks.revived(model)
            continue
        found[repo] = AutoModelForImageClassification.from_pretrained(repo).eval()(pixel_values=pixels).logits
        said[repo] = [(row["label"], row["score"]) for row in pipeline("image-classification", repo)(image)]
    if sys.argv[1] == "stock":
        import timm
        model = timm.create_model("hf-hub:alice/timm", pretrained=True).eval()
        found["timm itself"] = model(found["alice/timm pixels"])
save_file(found, sys.argv[1] + ".safetensors")
print("said", json.dumps(said))
"""


def loaded(hub: HubServer, folder: Path, how: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    printed = run(folder, [sys.executable, "-c", LOAD, how], **on_hub(hub, folder))
    return load_file(folder / f"{how}.safetensors"), json.loads(re.search("^said (.*)$", printed, re.MULTILINE)[1])  # type: ignore[index]


def test_clean_processes_load_and_agree(local_hub: HubServer, folder: Path, pushed: None) -> None:
    stock, labels = loaded(local_hub, folder, "stock")  # px_hf cannot be imported there
    ours, masks = loaded(local_hub, folder, "px_hf")
    for repo, out in (("alice/resnet", "resnet"), ("alice/timm", "timm-run")):
        pixels = stock[f"{repo} pixels"]
        with torch.no_grad():
            expected = px.from_pretrained(folder / out).eval()(pixel_values=pixels).logits
        assert expected.std() > 1e-3
        torch.testing.assert_close(stock[repo], expected)
        torch.testing.assert_close(ours[repo], expected)
        probabilities = expected.softmax(-1)[0].sort(descending=True).values[:5]
        torch.testing.assert_close(torch.tensor([score for _, score in labels[repo]]), probabilities)
        assert {label for label, _ in labels[repo]} <= {str(digit) for digit in range(10)}
        assert masks[repo] == [px.Masks.from_pretrained(folder / out).fingerprint(), {}]
    torch.testing.assert_close(stock["timm itself"], stock["alice/timm"])


def test_a_sparse_model_of_the_hub_is_fine_tuned_further_with_exactly_its_masks(
    local_hub: HubServer, folder: Path, pushed: None, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """On another task: five classes of the ten, in Parquet."""
    digits = demo_data.digits()["train"]
    few = digits.filter(lambda row: row["label"] < 5).cast_column("label", ClassLabel(names=list("abcde")))
    few.to_parquet(folder / "few" / "train.parquet")
    more = ("--keep_masks", "--train_file", str(folder / "few" / "train.parquet"), "--push_to_hub")
    more += ("--model_name_or_path", "alice/resnet", "--hub_model_id", "alice/further", "--random_crop", "false")
    run_here(settings(folder, "further", *SHORT, *more))
    masks = px.Masks.from_pretrained(folder / "further")
    assert masks == px.Masks.from_pretrained(folder / "resnet")
    assert f"{masks.kept:,} of {masks.total:,} weights kept" in capsys.readouterr().out
    model = px.from_pretrained(folder / "further")
    assert model.config.num_labels == 5
    assert not masks.revived(model)
    before = px.from_pretrained(folder / "resnet").state_dict()
    assert any(not torch.equal(before[name], model.state_dict()[name]) for name in masks), "it has been trained"
    entry = json.loads((folder / "further/config.json").read_text())["px"]
    commit = local_hub.repos["alice/resnet"].sha("main")
    assert (entry["base_model"], entry["base_revision"], entry["masks_from"]) == (
        "alice/resnet",
        commit,
        "alice/resnet",
    )
    first = json.loads((folder / "resnet/config.json").read_text())["px"]
    assert [entry[key] for key in ("criterion", "calibration", "masks_sha256")] == [
        first[key] for key in ("criterion", "calibration", "masks_sha256")
    ]
    card = local_hub.repos["alice/further"].files("main")["README.md"].content.decode()
    assert "base_model: alice/resnet" in card
    assert "| masks of | alice/resnet |" in card


def test_without_keep_masks_a_sparse_backbone_is_pruned_anew_and_that_is_said(
    folder: Path, pushed: None, capsys: pytest.CaptureFixture[str]
) -> None:
    run_here(settings(folder, "anew", *SHORT, "--model_name_or_path", str(folder / "resnet"), "--sparsity", "0.95"))
    assert "The backbone is sparse already. It is pruned anew; --keep_masks" in capsys.readouterr().out
    assert px.Masks.from_pretrained(folder / "anew").sparsity == pytest.approx(0.95, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--keep_masks", "--dense"], px.InvalidArgumentError, "--dense needs the unpruned network"),
        (["--keep_masks", "--compare_dense", "true"], px.InvalidArgumentError, "--compare_dense needs the unpruned"),
        (["--keep_masks", "--control", "shuffle"], px.InvalidArgumentError, "--control changes masks"),
        (
            ["--keep_masks"],
            px.CheckpointError,
            "--keep_masks needs a backbone that px_hf has pruned. .* has neither a compact copy",
        ),
    ],
)
def test_keep_masks_needs_masks(folder: Path, more: list[str], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_here(settings(folder, "bad", *more))
    assert not (folder / "bad").exists()


@pytest.mark.parametrize("name", ["transfer", "prune_segment"])
def test_recipes_that_do_not_push_say_so(name: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=r"--push_to_hub is for px-hf prune"):
        importlib.import_module(f"px_hf.commands.{name}").parse(["--push_to_hub"])


def test_a_push_that_will_be_refused_is_refused_before_the_training(
    local_hub: HubServer, folder: Path, here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for token, repo, error, message in (
        ("", "alice/no", px.HubError, "No token to push to alice/no"),
        ("hf_bob", "alice/no", px.HubError, "Nothing was pushed to alice/no: the token may not write there"),
        ("hf_wrong", "alice/no", px.HubError, "the token is not valid"),
        ("hf_alice", "a/b/c", px.InvalidArgumentError, "repo_id"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(error, match=message):
            run_here(settings(folder, "refused", *SHORT, "--push_to_hub", "--hub_model_id", repo))
        assert not (folder / "refused").exists()
    assert "alice/no" not in local_hub.repos


def test_a_push_that_broke_off_is_completed_without_training_again(
    local_hub: HubServer, folder: Path, here: None
) -> None:
    again = ["--resume_from_checkpoint", "true", "--overwrite_output_dir"]
    command = settings(folder, "broken", *SHORT, "--push_to_hub", "--hub_model_id", "alice/broken")
    local_hub.fail("POST", "/api/models/alice/broken/commit/", cut_request=2000)
    with pytest.raises(px.HubError, match=f"connection to the Hub broke off.*{' '.join(again)}"):
        run_here(command)
    repo = local_hub.repos["alice/broken"]
    assert len(repo.history()) == 1
    weights = (folder / "broken/model.safetensors").read_bytes()
    run_here(command + again)
    assert (folder / "broken/model.safetensors").read_bytes() == weights
    assert len(repo.history()) == 2
    assert local_hub.objects[repo.files("main")["model.safetensors"].lfs or ""] == weights


@pytest.mark.slow
def test_only_the_main_process_pushes(local_hub: HubServer, folder: Path) -> None:
    command = TWO + settings(folder, "two", *SHORT, "--push_to_hub", "--hub_model_id", "alice/two")
    run(folder, command, **on_hub(local_hub, folder), ACCELERATE_USE_CPU="true")
    assert len(local_hub.repos["alice/two"].history()) == 2
    assert local_hub.count("POST /api/models/alice/two/commit") == 1
