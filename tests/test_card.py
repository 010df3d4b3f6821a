"""The model card says what is known, and nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from hub_git import read_card
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_hub import pruned, resnet

import px_hf as px
from px_hf.hub.card import is_unedited, model_card
from px_hf.report import Report

FILES = {
    "README.md": 1,
    "config.json": 900,
    "preprocessor_config.json": 300,
    "model.safetensors": 97_800_000,
    "masks.safetensors": 2_900_000,
    "sparse/config.json": 1000,
    "sparse/model.safetensors": 12_345_678,
    "per_layer_sparsity.png": 80_000,
}
PX = {
    "criterion": "PX(paths='active', power=0.25)",
    "rounds": 20,
    "scope": "global",
    "min_layer_density": 0.01,
    "prune_head": False,
    "seed": 42,
    "calibration": {"split": "train", "examples": 1000, "examples_per_class": 10, "seed": 7, "sha256": "c" * 64},
    "base_model": "microsoft/resnet-50",
    "base_revision": "d" * 40,
    "dataset": "cifar100",
    "dataset_id": "uoft-cs/cifar100",
}
SAVED = {
    "sparsity": 0.745,
    "weights": 5912,
    "weights_kept": 1507,
    "masks_sha256": "e" * 64,
    "versions": {"px_hf": "0.1.0", "torch": "2.11.0"},
}
CONFIG = {
    "model_type": "resnet",
    "architectures": ["ResNetForImageClassification"],
    "id2label": {str(k): "x" for k in range(100)},
}
RESULTS = {"test_accuracy": 0.9123, "dense_test_accuracy": 0.95, "test_loss": 0.31, "eval_accuracy": 0.9}


@pytest.fixture(scope="module")
def about() -> Report:
    return px.report(*pruned(resnet), torch.zeros(1, 3, 16, 16))


def card(about: Report, told: dict[str, Any] = PX, repo: str = "alice/sparse", **more: Any) -> str:
    config = {**CONFIG, **more.pop("config", {}), "px": {**told, **SAVED}}
    return model_card(repo, config, more.pop("files", FILES), about, **more)


class Page(HTMLParser):
    """What a reader sees: headings, tables as rows of cells, links, pictures, and the text between."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[str] = []
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        body = ModelCard(text).text
        self.feed(MarkdownIt("commonmark", {"html": True}).enable("table").render(body))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attributes)
        if tag == "a":
            self.links.append(str(given["href"]))
        if tag == "img":
            self.images.append(str(given["src"]))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data
        opened = [tag for tag in self.tags if tag.lstrip("/") in ("td", "th", "h1", "h2")]
        if opened and not opened[-1].startswith("/"):
            place = self.rows[-1] if opened[-1].startswith("t") else self.headings
            place[-1] += data


def test_metadata_of_a_card_where_everything_is_known(about: Report) -> None:
    text = card(about, results=RESULTS, license="mit")
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "image-classification", "mit")
    assert data.tags == ["px-hf", "pruning", "sparse"]
    assert (data.base_model, data.base_model_relation) == ("microsoft/resnet-50", "finetune")
    assert (data.datasets, data.metrics) == (["uoft-cs/cifar100"], ["accuracy"])
    found = [(r.dataset_type, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results]
    assert found == [
        ("uoft-cs/cifar100", "test", "accuracy", 0.9123),
        ("uoft-cs/cifar100", "validation", "accuracy", 0.9),
    ]
    assert (data.model_name, data.eval_results[0].dataset_name) == ("sparse", "cifar100")
    assert read_card(text), "the Hub takes it"


def test_page_of_a_card_where_everything_is_known(about: Report) -> None:
    page = Page(card(about, results=RESULTS))
    assert page.headings == [
        "sparse",
        "Results",
        "Size and cost",
        "How to load it",
        "How it was pruned",
        "Limits",
        "Versions",
        "Citation",
    ]
    for row in (
        ["accuracy, test", "95.00 %", "91.23 %"],
        ["loss, test", "", "0.3100"],
        ["accuracy, validation", "", "90.00 %"],
        ["prunable weights", f"{about.weights:,}", f"{about.kept:,}"],
        ["all parameters", f"{about.parameters:,}", f"{about.parameters_kept:,}"],
        ["MACs per image, effective", f"{about.macs:,}", f"{about.effective_macs:,}"],
        ["model.safetensors", "97.8 MB", "dense, with the zeros"],
        ["masks.safetensors", "2.9 MB", "which weights are kept, one bit each"],
        ["sparse/model.safetensors", "12.3 MB", "compact: the kept weights and where they are"],
        ["criterion", PX["criterion"]],
        ["sparsity", "74.5 %"],
        ["rounds", "20"],
        ["scope", "global"],
        ["least density of a layer", "0.01"],
        ["classifier head", "dense"],
        ["calibration images", "1000 of split train, 10 of each class, drawn with seed 7"],
        ["their SHA-256", "c" * 64],
        ["seed", "42"],
        ["base model", f"microsoft/resnet-50, revision {'d' * 40}"],
        ["SHA-256 of the masks", "e" * 64],
    ):
        assert row in page.rows
    assert page.images == ["per_layer_sparsity.png"]
    assert page.links == ["https://huggingface.co/microsoft/resnet-50"]
    for text in (
        "100 classes",
        "74.5 % of its prunable weights were pruned by PX(paths='active', power=0.25)",
        "1,507 of 5,912 are left",
        'AutoModelForImageClassification.from_pretrained("alice/sparse")',
        'pipeline("image-classification", model="alice/sparse")',
        'px.Masks.from_pretrained("alice/sparse")',
        "px_hf 0.1.0, torch 2.11.0",
        "Dense kernels do not get faster",
        "and the classifier head are not pruned",
        "author    = {Iurada, Leonardo and Ciccone, Marco and Tommasi, Tatiana}",
        "Finding Lottery Tickets in Vision Models via Data-driven Spectral Foresight Pruning",
    ):
        assert text in page.text
    assert "None" not in page.text
    assert "{" not in page.text.replace("{Iurada", "").split("Citation")[0]


def test_a_card_where_nothing_is_known_says_nothing_of_it(about: Report) -> None:
    unmeasured = Report(about.layers, about.parameters, None, "not counted")
    files = {"model.safetensors": 100, "masks.safetensors": 10}
    text = card(unmeasured, {}, files=files)
    data, page = ModelCard(text).data, Page(text)
    assert set(data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    assert "Results" not in page.headings
    assert {row[0] for row in page.rows if row} == {
        *("", "file", "setting", "prunable weights", "all parameters", "sparsity", "SHA-256 of the masks"),
        *("model.safetensors", "masks.safetensors"),
    }
    assert (page.images, page.links) == ([], [])
    for unknown in ("None", "MACs", "pipeline(", "AutoImageProcessor", "classifier head", "dense against", "sparse/"):
        assert unknown not in page.text
    assert "No evaluation results are on record" in page.text


@pytest.mark.parametrize(
    ("told", "base"),
    [
        ({"base_model": "resnet", "base_revision": "main"}, None),
        ({"base_model": "resnet-50", "base_revision": "a" * 40}, "resnet-50"),
        ({"base_model": "timm/resnet18.a1_in1k"}, "timm/resnet18.a1_in1k"),
        ({"base_model": "/home/me/model"}, None),
        ({"base_model": "a b/c"}, None),
    ],
)
def test_a_local_base_model_is_no_base_model_of_the_hub(about: Report, told: dict[str, str], base: str | None) -> None:
    text = card(about, told)
    assert ModelCard(text).data.base_model == base
    assert read_card(text)
    assert Page(text).links == ([f"https://huggingface.co/{base}"] if base else [])


def test_timm_models_are_those_of_timm(about: Report) -> None:
    text = card(about, config={"architecture": "resnet18", "num_classes": 10}, revision="v2")
    assert ModelCard(text).data.library_name == "timm"
    page = Page(text)
    assert 'timm.create_model("hf-hub:alice/sparse@v2", pretrained=True)' in page.text
    assert 'model="alice/sparse", revision="v2")' in page.text
    assert "Image classifier resnet18, 10 classes" in page.text
    assert "KeepMasks" in page.text
    px_entry = {**PX, **SAVED, "versions": {"px_hf": "0.1.0", "px_hf_commit": "f" * 40}}
    alone = Page(model_card("a/b", {"architecture": "resnet18", "px": px_entry}, FILES, about))
    assert "px.keep_masks(optimizer, model, masks)" in alone.text
    assert "KeepMasks" not in alone.text
    assert f"px_hf 0.1.0, px_hf commit {'f' * 40}" in alone.text


def test_shards_count_as_one(about: Report) -> None:
    shards = {f"model-0000{k}-of-00003.safetensors": 10**9 for k in (1, 2, 3)}
    row = ["model-00001-of-00003.safetensors and 2 more", "3 GB", "dense, with the zeros"]
    assert row in Page(card(about, files=shards)).rows


def test_a_dense_baseline_is_called_so(about: Report) -> None:
    dense = {**SAVED, "sparsity": 0.0, "weights_kept": 5912}
    text = model_card("alice/dense", {**CONFIG, "px": {"criterion": "none (dense)", **dense}}, FILES, about)
    assert "Nothing is pruned: a dense baseline." in Page(text).text


def test_a_control_is_not_taken_for_the_found_subnetwork(about: Report) -> None:
    page = Page(card(about, {**PX, "control": "shuffle"}))
    assert "pruned by PX(paths='active', power=0.25) and then, as a control, changed (shuffle)" in page.text
    assert ["control", "shuffle"] in page.rows
    assert "control" not in Page(card(about, {**PX, "control": "none"})).text


def test_a_network_that_was_pruned_while_it_learnt(about: Report) -> None:
    gradual = {**PX, "schedule": "gradual", "until": 0.5, "rounds": 8, "distilled_from": "dense"}
    page = Page(card(about, gradual))
    assert "with px_hf, while it was fine-tuned, in 8 rounds over the first 50 % of its training:" in page.text
    assert ["schedule", "gradual"] in page.rows
    assert ["learnt from", "the same network, fine-tuned dense"] in page.rows
    assert "did not reach" not in page.text
    page = Page(card(about, {**gradual, "ended_early": True, "distilled_from": "alice/big"}))
    assert "of its training, the last of which its training did not reach:" in page.text
    assert ["learnt from", "alice/big"] in page.rows


def test_a_network_that_was_repaired(about: Report) -> None:
    page = Page(card(about, {**PX, "repair": "statistics", "calibration": {"examples": 1000}}))
    assert "with px_hf, and those that stay repaired on 1,000 images (statistics):" in page.text
    assert ["repair without training", "statistics"] in page.rows


def test_names_cannot_break_the_page(about: Report) -> None:
    evil = {"dataset": "a | b\n\n# c <script>alert(1)</script>", "base_model": "x | <img src=y>\n| z", "scope": "|"}
    evil |= {"criterion": "` <b> | ![a](http://b)", "masks_from": "![a](http://b) [c](http://d) *e* \\"}
    page = Page(card(about, {**PX, **evil, "dataset_id": None}))
    assert len(page.headings) == 7
    assert (page.images, page.links) == (["per_layer_sparsity.png"], [])
    assert not {"script", "b"} & set(page.tags)
    assert page.tags.count("em") == 1  # *Effective*
    assert ["masks of", evil["masks_from"]] in page.rows
    assert all(len(row) in (2, 3) for row in page.rows)


def test_every_code_block_is_python_that_compiles(about: Report) -> None:
    for config in ({}, {"architecture": "resnet18"}):
        blocks = re.findall(r"```python\n(.*?)```", card(about, config=config, revision="v1"), re.DOTALL)
        assert len(blocks) == 3
        for block in blocks:
            compile(block, "card", "exec")


def test_an_edit_is_noticed(about: Report) -> None:
    text = card(about)
    assert is_unedited(text)
    assert is_unedited(text.rstrip("\n"))
    for edited in (
        text.replace("Limits", "Limit"),
        text + "More.\n",
        text.replace("- sparse", "- sparser"),
        "",
        "a\nb",
    ):
        assert not is_unedited(edited)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "0.9", None])
def test_results_that_are_no_numbers_are_refused(about: Report, value: Any) -> None:
    with pytest.raises(px.InvalidArgumentError, match=r"'test_accuracy' is .*expected a finite number"):
        card(about, results={"test_accuracy": value})
