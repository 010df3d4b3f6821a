"""The embedded example: its data, its letters, its two backbones and the script that trains them."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import DatasetDict
from pretrain import Arguments, main
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, PreTrainedModel

import px_hf as px
from px_hf.data.embedded.characters import digits
from px_hf.data.embedded.letters import CLASSES, letters

RECIPES = Path(__file__).parent.parent / "recipes"


DEMO = RECIPES / "demo"
BACKBONES = ["resnet", "vit"]
SPLITS = {"train": 1149, "validation": 288, "test": 360}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def contents(data: DatasetDict) -> dict[str, list[bytes]]:
    return {name: [np.asarray(image).tobytes() for image in split["image"]] for name, split in data.items()}


@pytest.fixture(scope="module")
def data() -> DatasetDict:
    return digits()


def test_digits_are_8x8_grey_images_with_named_classes(data: DatasetDict) -> None:
    assert {name: len(split) for name, split in data.items()} == SPLITS
    assert data["train"].features["label"].names == list(string.digits)
    image = data["train"][0]["image"]
    assert (image.size, image.mode, image.getextrema()[1]) == ((8, 8), "L", 255)


def test_digits_splits_share_no_image(data: DatasetDict) -> None:
    images = [image for split in contents(data).values() for image in split]
    assert len(set(images)) == len(images) == 1797


@pytest.mark.parametrize("split", SPLITS)
def test_digits_splits_are_stratified(data: DatasetDict, split: str) -> None:
    whole = np.bincount([label for part in data.values() for label in part["label"]]) / 1797
    counts = np.bincount(data[split]["label"])
    assert np.abs(counts - whole * SPLITS[split]).max() < 2


def test_digits_are_the_same_every_time_and_differ_by_seed(data: DatasetDict) -> None:
    assert contents(digits()) == contents(data)
    assert contents(digits(seed=1)) != contents(data)


def test_classes_are_the_letters_without_those_that_only_size_tells_apart() -> None:
    assert "".join(CLASSES) == string.ascii_uppercase + "abdefghnqrt"


def test_letters_are_valid_and_varied() -> None:
    images, labels = letters(2000, seeded(0))
    assert (images.shape, images.dtype) == ((2000, 32, 32), torch.uint8)
    assert set(labels.tolist()) == set(range(len(CLASSES)))
    assert len(images.unique(dim=0)) == 2000
    pixels = images.float()
    assert (pixels.std((1, 2)) > 4).all(), "an image without a letter"
    assert (pixels.mean((1, 2)) > 128).float().mean().item() == pytest.approx(0.15, abs=0.1), "dark on bright"
    # Those drawn on the 8 × 8 raster are smoother than the others, noise or not.
    edges = (pixels - torch.nn.functional.avg_pool2d(pixels, 3, 1, 1)).abs().mean((1, 2)) / pixels.std((1, 2))
    assert edges.quantile(0.9) > 2 * edges.quantile(0.1)


def test_letters_depend_on_the_generator_only() -> None:
    first, again, other = letters(64, seeded(3)), letters(64, seeded(3)), letters(64, seeded(4))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def parameters_of(model: PreTrainedModel, *, head: bool) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if name.startswith("classifier") == head}


@pytest.mark.parametrize("backbone", BACKBONES)
class TestBackbone:
    def test_is_small_and_complete(self, backbone: str) -> None:
        folder = DEMO / backbone
        assert (folder / "model.safetensors").stat().st_size <= 2_000_000
        assert "license: apache-2.0" in (folder / "README.md").read_text()
        assert json.loads((folder / "config.json").read_text())["model_type"] == backbone

    def test_names_letters(self, backbone: str) -> None:
        model = AutoModelForImageClassification.from_pretrained(DEMO / backbone).eval()
        processor = AutoImageProcessor.from_pretrained(DEMO / backbone)
        images, labels = letters(500, seeded(12345))
        inputs = processor([image.numpy() for image in images[:, None].expand(-1, 3, -1, -1)], return_tensors="pt")
        with torch.no_grad():
            named = model(**inputs).logits.argmax(-1)
        assert [model.config.id2label[i] for i in range(len(CLASSES))] == CLASSES
        assert (named == labels).float().mean() > 0.85

    def test_starts_a_new_task_with_a_new_head(self, backbone: str, data: DatasetDict) -> None:
        letter_model = AutoModelForImageClassification.from_pretrained(DEMO / backbone)
        model = AutoModelForImageClassification.from_pretrained(
            DEMO / backbone, num_labels=10, ignore_mismatched_sizes=True
        )
        kept = parameters_of(letter_model, head=False)
        assert all(torch.equal(p, kept[name]) for name, p in parameters_of(model, head=False).items())
        processor = AutoImageProcessor.from_pretrained(DEMO / backbone)
        inputs = processor(data["test"]["image"][:4], return_tensors="pt")
        assert inputs["pixel_values"].shape == (4, 3, 32, 32)
        assert model(**inputs).logits.shape == (4, 10)


def few_shot_accuracy(model: PreTrainedModel, processor: BaseImageProcessor, data: DatasetDict) -> float:
    """A linear classifier on the frozen features, fitted to ten digits of each class."""
    model.eval().classifier = torch.nn.Flatten()
    features, labels = {}, {name: np.asarray(data[name]["label"]) for name in ("train", "test")}
    for name in labels:
        with torch.no_grad():
            features[name] = model(**processor(data[name]["image"][:], return_tensors="pt")).logits.numpy()
    few = np.concatenate([np.flatnonzero(labels["train"] == digit)[:10] for digit in range(10)])
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    return probe.fit(features["train"][few], labels["train"][few]).score(features["test"], labels["test"])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_is_learnt_from_letters_helps_with_digits(backbone: str, data: DatasetDict) -> None:
    processor = AutoImageProcessor.from_pretrained(DEMO / backbone)
    pretrained = AutoModelForImageClassification.from_pretrained(DEMO / backbone)
    torch.manual_seed(0)
    untrained = AutoModelForImageClassification.from_config(pretrained.config)
    accuracy = few_shot_accuracy(pretrained, processor, data)
    assert accuracy > 0.85
    assert accuracy > few_shot_accuracy(untrained, processor, data) + 0.1


def pretrain(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DEMO / "pretrain.py"), "--backbone", "vit", "--output_dir", str(folder)]
    command += ["--max_steps", "2", "--batch_size", "8", *options]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_pretraining_is_reproducible_and_overwrites_only_when_told(tmp_path: Path) -> None:
    folder, weights = tmp_path / "new" / "vit", tmp_path / "new" / "vit" / "model.safetensors"
    done = pretrain(folder)
    assert done.returncode == 0, done.stderr
    assert "held-out letters right" in done.stdout
    assert AutoModelForImageClassification.from_pretrained(folder).config.id2label[0] == "A"
    assert os.listdir(folder.parent) == ["vit"], "something unfinished was left behind"
    first = weights.read_bytes()

    with pytest.raises(px.OutputExistsError, match="--overwrite_output_dir"):
        main(Arguments("vit", output_dir=str(folder)))
    assert weights.read_bytes() == first

    weights.write_bytes(b"")
    again = pretrain(folder, "--overwrite_output_dir")
    assert again.returncode == 0, again.stderr
    assert weights.read_bytes() == first


@pytest.mark.parametrize(("name", "value"), [("max_steps", 0), ("batch_size", 0), ("batch_size", -1)])
def test_pretraining_refuses_bad_numbers(name: str, value: Any) -> None:
    with pytest.raises(px.InvalidArgumentError, match=f"--{name} must be at least 1, got {value}"):
        replace(Arguments("vit"), **{name: value})


def test_pretraining_refuses_a_file_as_its_folder_before_it_trains(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with pytest.raises(FileExistsError, match="notes"):
        main(Arguments("vit", output_dir=str(file)))
    assert file.read_text() == "mine"
