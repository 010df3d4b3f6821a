"""The report of recipes/evaluate_downstream.py on the Hub: in the card, in its model-index, beside the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard, hf_hub_download
from test_card import Page
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

import px_hf as px
from px_hf.commands import evaluate_downstream
from px_hf.downstream.attached import is_about, weights_fingerprint
from px_hf.downstream.page import METHODS, METRICS, REPORT_FILES, read_results

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4
REPO = "alice/model"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pruned model with its report, by --add_to_model; the output folder is beside it."""
    folder = tmp_path_factory.mktemp("evaluated")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4)
    model, processor = ResNetForImageClassification(config), ViTImageProcessor(size={"height": 16, "width": 16})
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.6, progress=False)
    masks.apply_(model)
    told = {"criterion": "Magnitude()", "dataset": "letters"}
    px.save_pretrained(model, masks, folder / "model", image_processor=processor, provenance=told)
    (folder / "model/all_results.json").write_text(json.dumps({"test_accuracy": 0.75, "dense_test_accuracy": 0.9}))
    assert evaluate_downstream.main([*settings(folder), "--add_to_model"]) == 0
    return folder / "model"


def settings(folder: Path) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "model"), "--output_dir", str(folder / "report")),
        *("--tasks", "digits", "greek", "--methods", "ridge", "knn"),
        *("--max_train_samples", "150", "--max_eval_samples", "61", "--disable_tqdm", "true"),
    ]


def check_repository(model_folder: Path, beside: int = 0) -> None:
    """Every score of every task is in the card's model-index; page and files are those of the report."""
    results = json.loads((model_folder.parent / "report/downstream.json").read_text())
    card = ModelCard.load(REPO)
    found = {
        (entry.dataset_name, entry.metric_name): (entry.dataset_type, entry.metric_value)
        for entry in card.data.eval_results or []
        if entry.metric_name
    }
    expected = {
        (task, f"{METRICS[metric]} ({METHODS[method]})"): (f"px_hf/{task}", round(score["value"], 4))
        for task, record in results["tasks"].items()
        for method, run in record["results"]["pruned 60 %"].items()
        for metric, score in run["scores"].items()
    }
    assert found == expected
    assert len(expected) == 2 * (4 + 5)  # ridge has no probabilities, so no calibration error
    assert len(card.data.eval_results or []) == len(expected) + beside
    assert set(card.data.metrics or []) == {
        "accuracy", "balanced_accuracy", "calibration_error", "f1", "top_5_accuracy"
    }  # fmt: skip
    page = Page(card.content)
    assert {"Downstream evaluation", "Size and cost"} <= set(page.headings)
    assert page.images == ["downstream.png", "per_layer_sparsity.png"]
    accuracy = results["tasks"]["greek"]["results"]["pruned 60 %"]["ridge"]["scores"]["accuracy"]["value"]
    assert any(row[0] == "pruned 60 %" and row[1].startswith(f"{100 * accuracy:.1f} [") for row in page.rows)
    assert "No evaluation results" not in page.text
    for name in REPORT_FILES:
        assert Path(hf_hub_download(REPO, name)).read_bytes() == (model_folder / name).read_bytes()


def test_a_push_picks_up_the_report_that_lies_with_the_model(hub: HubServer, model_folder: Path) -> None:
    for load in (px.from_pretrained, AutoModelForImageClassification.from_pretrained):
        px.push_to_hub(load(model_folder), px.Masks.from_pretrained(model_folder), REPO)
        check_repository(model_folder)
    assert [commit.title for commit in hub.repos[REPO].history()].count("Upload pruned model with px_hf") == 1


def test_a_model_of_the_hub_is_evaluated_as_that_of_its_folder(
    hub: HubServer, model_folder: Path, tmp_path: Path
) -> None:
    px.push_to_hub(
        px.from_pretrained(model_folder), px.Masks.from_pretrained(model_folder), REPO,
        image_processor=ViTImageProcessor.from_pretrained(model_folder),
    )  # fmt: skip
    argv = [*settings(model_folder.parent), "--model_name_or_path", REPO, "--output_dir", str(tmp_path / "out")]
    assert evaluate_downstream.main(argv) == 0
    here, there = (read_results(folder) for folder in (model_folder, tmp_path / "out"))
    assert here is not None
    assert there is not None
    assert there["model"] == REPO
    assert there["weights_sha256"] == here["weights_sha256"]
    for task, record in here["tasks"].items():
        for method, run in record["results"]["pruned 60 %"].items():
            assert there["tasks"][task]["results"]["pruned 60 %"][method]["scores"] == run["scores"]


def test_the_recipe_pushes_what_it_evaluated(hub: HubServer, model_folder: Path) -> None:
    """Nothing is computed again; what the folder knows of training goes along."""
    argv = [*settings(model_folder.parent), "--push_to_hub", "--hub_model_id", REPO]
    assert evaluate_downstream.main(argv) == 0
    check_repository(model_folder, beside=1)
    card = ModelCard.load(REPO)
    assert "| accuracy, test | 90.00 % | 75.00 % |" in card.content
    (own,) = [entry for entry in card.data.eval_results or [] if not entry.metric_name]
    assert (own.dataset_name, own.metric_value) == ("letters", 0.75)
    pushed, local = (px.from_pretrained(where).state_dict() for where in (REPO, model_folder))
    assert all(torch.equal(pushed[name], tensor) for name, tensor in local.items())
    assert json.loads(hub.repos[REPO].files("main")["config.json"].content)["px"]["criterion"] == "Magnitude()"


def test_a_report_on_other_weights_is_not_published(hub: HubServer, model_folder: Path, tmp_path: Path) -> None:
    model, masks = px.from_pretrained(model_folder), px.Masks.from_pretrained(model_folder)
    with torch.no_grad():
        next(iter(masks.match(model).values())).mul_(1.5)  # trained further
    with pytest.warns(UserWarning, match="is not of this model: its weights or masks are others"):
        px.push_to_hub(model, masks, REPO)
    assert not set(REPORT_FILES) & hub.repos[REPO].files("main").keys()
    with pytest.raises(px.InvalidArgumentError, match=r"not of this model.*Evaluate this one"):
        px.push_to_hub(model, masks, "alice/other", evaluation=model_folder)
    with pytest.raises(px.InvalidArgumentError, match=r"holds no downstream.json"):
        px.push_to_hub(model, masks, "alice/other", evaluation=tmp_path)
    (tmp_path / "downstream.json").write_text("{")
    with pytest.raises(px.CheckpointError, match=r"downstream.json is damaged"):
        px.push_to_hub(model, masks, "alice/other", evaluation=tmp_path)
    assert "alice/other" not in hub.repos


def test_weights_are_known_again_in_every_form() -> None:
    """In bfloat16, in TimmWrapper, with -0.0; and not if one weight or one mask differs."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3).bfloat16()
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)
    masks.apply_(model)
    results: dict[str, Any] = {"weights_sha256": weights_fingerprint(model, masks)}
    assert is_about(results, model.float(), masks)
    wrapped = torch.nn.Module()
    wrapped.timm_model = model
    assert is_about(results, wrapped, px.Masks({f"timm_model.{name}": mask for name, mask in masks.items()}))
    name, parameter = next(iter(masks.match(model).items()))
    with torch.no_grad():
        parameter.neg_().neg_()
        parameter[~masks[name]] = -0.0
        assert is_about(results, model, masks)
        fewer = masks[name].clone()
        fewer.view(-1)[parameter.abs().argmax()] = False
        assert not is_about(results, model, px.Masks({**masks, name: fewer}))
        parameter.view(-1)[parameter.abs().argmax()] *= 1.01
        assert not is_about(results, model, masks)
    assert not is_about({}, model, masks)


@pytest.mark.parametrize("model", ["dense", "on the Hub"])
def test_only_a_pruned_model_in_a_folder_is_pushed(hub: HubServer, model_folder: Path, model: str) -> None:
    argv = [*settings(model_folder.parent), "--push_to_hub", "--hub_model_id", "alice/none", "--output_dir"]
    argv += [str(model_folder.parent / "none"), "--model_name_or_path"]
    if model == "dense":
        argv += [str(Path(__file__).parents[1] / "recipes/demo/resnet")]
    else:
        px.push_to_hub(
            px.from_pretrained(model_folder), px.Masks.from_pretrained(model_folder), REPO,
            image_processor=ViTImageProcessor(),
        )  # fmt: skip
        argv += [REPO]
    with pytest.raises(px.InvalidArgumentError, match="publishes a pruned model from its folder"):
        evaluate_downstream.main(argv)
    assert "alice/none" not in hub.repos
