"""Semantic segmentation: models, maps that stay on their images, bad input, and whole runs of prune_segment.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from sklearn.metrics import jaccard_score
from torch import Tensor, nn
from transformers import (
    AutoModelForSemanticSegmentation,
    BeitConfig,
    BeitForSemanticSegmentation,
    ConvNextImageProcessor,
    DPTConfig,
    DPTForSemanticSegmentation,
    MobileViTImageProcessor,
    ResNetConfig,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
    Trainer,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTImageProcessor,
)

import px_hf as px
from px_hf.commands import prune_segment
from px_hf.data import Preprocess
from px_hf.data.embedded import scenes as demo_scenes
from px_hf.data.segmentation import IGNORED, MapSplit, count_classes, find_pair, segmentation_task
from px_hf.model.targets import head_modules, prunable
from px_hf.runs.arguments import FineTuneArguments, ModelArguments
from px_hf.runs.segmentation_job import read_class_names
from px_hf.runs.segmentation_model import four_of, load_model

RECIPES = Path(__file__).parents[1] / "recipes"


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


# --- models ---


def upernet(backbone: Any) -> nn.Module:
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=8, use_auxiliary_head=False, num_labels=3, pool_scales=[1, 2]
    )
    return UperNetForSemanticSegmentation(config)


def resnet() -> nn.Module:
    return upernet(
        ResNetConfig(
            embedding_size=8,
            hidden_sizes=[8, 12],
            depths=[1, 1],
            layer_type="basic",
            out_features=["stage1", "stage2"],
        )
    )


def swin() -> nn.Module:
    return upernet(
        SwinConfig(
            image_size=32,
            patch_size=4,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
            out_features=["stage1", "stage2"],
        )
    )


def segformer() -> nn.Module:
    return SegformerForSemanticSegmentation(
        SegformerConfig(
            num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3],
            strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, num_labels=3,
        )
    )  # fmt: skip


VIT: dict[str, Any] = {
    "image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 24, "num_labels": 3, "use_auxiliary_head": False,
}  # fmt: skip


def dpt() -> nn.Module:
    return DPTForSemanticSegmentation(
        DPTConfig(**VIT, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16)
    )


def beit() -> nn.Module:
    return BeitForSemanticSegmentation(BeitConfig(**VIT, out_indices=[0, 1, 2, 4], pool_scales=[1, 2]))


MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "upernet resnet": (resnet, {"decode_head"}),
    "upernet swin": (swin, {"decode_head"}),
    "segformer": (segformer, {"decode_head"}),
    "dpt": (dpt, {"neck", "head"}),
    "beit": (beit, {"fpn", "decode_head"}),
}


class Summed(nn.Module):
    """Logits added over positions: a classifier."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits.sum((2, 3))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("paths", ["all", "active"])
def test_a_map_of_logits_is_scored_as_its_sum_over_positions(name: str, paths: str) -> None:
    torch.manual_seed(0)
    build, heads = MODELS[name]
    model = build()
    names = prunable(model)
    assert {child for child, module in model.named_children() if module in head_modules(model)} == heads
    assert names
    assert not [weight for weight in names if weight.split(".")[0] in heads]
    images = [torch.randn(2, 3, 32, 32)]
    masks = px.prune(model, images, px.PX(paths, 0.25), sparsity=0.5, rounds=2, progress=False)
    assert masks.kept == masks.total - round(masks.total / 2)
    scores = px.PX(paths).score(model, images, prune_head=True)
    expected = px.PX(paths).score(Summed(model), images, prune_head=True)
    assert {f"model.{weight}" for weight in scores} == expected.keys()
    for weight, score in scores.items():
        torch.testing.assert_close(score, expected[f"model.{weight}"], rtol=1e-4, atol=0)
    assert any(bool(score.any()) for score in scores.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # of httpx2, by huggingface_hub 2.4
def test_a_pushed_segmentation_model_is_one_to_everyone(hub: HubServer, name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False)
    masks.apply_(model)
    px.push_to_hub(model, masks, "alice/map", image_processor=ViTImageProcessor())
    card = ModelCard.load("alice/map")
    assert card.data.pipeline_tag == "image-segmentation"
    assert "Semantic segmentation model" in card.text
    assert 'AutoModelForSemanticSegmentation.from_pretrained("alice/map")' in card.text
    assert 'pipeline("image-segmentation", model="alice/map")' in card.text
    assert "ImageClassification" not in card.text
    images = torch.randn(1, 3, 32, 32)
    for load in (px.from_pretrained, AutoModelForSemanticSegmentation.from_pretrained):
        loaded = load("alice/map").eval()
        assert type(loaded) is type(model)
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
        with torch.no_grad():  # kernels round by where weights lie in memory
            logits, expected = loaded(pixel_values=images).logits, model(pixel_values=images).logits
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-8)


# --- data ---


def raw_processor(**settings: Any) -> Preprocess:
    """Pixels as they are, 0 to 255."""
    plain = {"do_resize": False, "do_rescale": False, "do_normalize": False}
    return Preprocess(ViTImageProcessor(**{**plain, **settings}))


def coded(count: int, size: tuple[int, int] = (12, 16), classes: int = 5, seed: int = 0, void: int = 200) -> Dataset:
    """Images whose red channel is their map; `void` does not count."""
    rng = np.random.default_rng(seed)
    maps = [rng.choice([*range(classes), void], size).astype(np.uint8) for _ in range(count)]
    images = [np.stack([m, np.zeros_like(m), np.full_like(m, 7)], -1) for m in maps]
    features = Features({"image": ImageFeature(), "mask": ImageFeature()})
    columns = {"image": [Image.fromarray(i) for i in images], "mask": [Image.fromarray(m) for m in maps]}
    return Dataset.from_dict(columns, features=features)


def coded_split(**settings: Any) -> MapSplit:
    raw = DatasetDict({"train": coded(20), "test": coded(3, seed=1)})
    options = {"labels": list("abcde"), "ignore_index": 200, **settings}
    return segmentation_task(raw, raw_processor(), **options).train


def test_the_map_stays_on_its_image_through_crops_and_mirrors() -> None:
    split = coded_split()
    torch.manual_seed(0)
    sizes, mirrored = set(), 0
    for position in range(len(split)):
        image, drawn = split.pair(position)
        for varied in (split, split.augmented(True, False), split.augmented(True, True), split.augmented(False, True)):
            item = varied[position]
            red, labels = item["pixel_values"][0].long(), item["labels"]
            assert labels.dtype == torch.int64
            assert torch.equal(torch.where(labels == IGNORED, 200, labels), red)
            sizes.add(tuple(labels.shape))
        mirrored += not torch.equal(labels, torch.from_numpy(np.array(drawn)).long())
        assert image.size == drawn.size
    assert len(sizes) > 5
    assert 3 < mirrored < 17  # of 20, by a fair coin


def test_maps_are_resized_by_their_nearest_pixels() -> None:
    raw = DatasetDict({"train": coded(4), "test": coded(1)})
    pixels = raw_processor(do_resize=True, size={"height": 6, "width": 8})
    item = segmentation_task(raw, pixels, labels=list("abcde"), ignore_index=200).train[0]
    assert item["pixel_values"].shape == (3, 6, 8)
    assert item["labels"].shape == (6, 8)
    assert set(item["labels"].unique().tolist()) <= {*range(5), IGNORED}


def test_reduced_labels_start_with_one() -> None:
    plain, reduced = coded_split(), coded_split(labels=list("bcde"), reduce_labels=True)
    before, after = (torch.cat([split[i]["labels"].flatten() for i in range(3)]) for split in (plain, reduced))
    assert torch.equal(after, torch.where(before <= 0, IGNORED, before - 1))


def test_splits_share_no_example() -> None:
    raw = DatasetDict({"train": coded(20)})
    task = segmentation_task(raw, raw_processor(), labels=list("abcde"), ignore_index=200)
    assert task.test is None
    assert len(task.validation) == 3
    assert sorted([*task.train.indices, *task.validation.indices]) == list(range(20))
    assert len(task.train.sample(5, seed=0)) == 5
    assert count_classes(raw, "train", "mask", 200, False) == 5
    assert count_classes(raw, "train", "mask", 200, True) == 4


def columns(*names: str, other: str | None = None) -> Features:
    return Features({name: ImageFeature() for name in names} | ({other: Value("int64")} if other else {}))


@pytest.mark.parametrize(
    ("features", "named", "expected"),
    [
        (columns("image", "annotation"), {}, ("image", "annotation")),
        (columns("mask", "picture", other="label"), {}, ("picture", "mask")),
        (columns("image", "label"), {}, ("image", "label")),
        (columns("pixel_values", "depth", "labels"), {}, ("pixel_values", "labels")),
        (columns("a", "b"), {"image": "b", "annotation": "a"}, ("b", "a")),
        (columns("a", "b"), {"annotation": "a"}, ("b", "a")),
        (columns("a", "b"), {}, "the image column is unclear"),
        (columns("image", other="label"), {}, "the annotation column is unclear"),
        (columns("image", other="label"), {"annotation": "label"}, "'label' for the annotation holds no images"),
        (columns("image", "mask"), {"annotation": "maps"}, "No column 'maps' for the annotation"),
    ],
)
def test_columns_are_found_by_type_and_name(features: Features, named: dict[str, str], expected: Any) -> None:
    if isinstance(expected, tuple):
        assert find_pair(features, **named) == expected
    else:
        with pytest.raises(px.DataError, match=expected):
            find_pair(features, **named)


def one(image: Image.Image | bytes, drawn: Image.Image | bytes) -> DatasetDict:
    def encoded(value: Image.Image | bytes) -> Any:
        return value if isinstance(value, Image.Image) else {"bytes": value, "path": None}

    rows = {"image": [encoded(image)] * 2, "mask": [encoded(drawn)] * 2}
    return DatasetDict({"train": Dataset.from_dict(rows, features=columns("image", "mask"))})


PICTURE, MAP = Image.new("RGB", (8, 6)), Image.new("L", (8, 6), 1)
BAD_PAIRS: dict[str, tuple[DatasetDict, str]] = {
    "class": (
        one(PICTURE, Image.new("L", (8, 6), 9)),
        r"at index \d, column 'mask', has the classes 9, expected 0 to 1",
    ),
    "colours": (one(PICTURE, PICTURE), "'mask', is a picture of mode RGB; expected one class number"),
    "sizes": (one(PICTURE, Image.new("L", (6, 8))), r"is \(6, 8\), its image \(8, 6\)"),
    "image": (one(b"no image", MAP), r"Unreadable image in split 'train' at index \d, column 'image'"),
    "map": (one(PICTURE, b"no image"), r"Unreadable image in split 'train' at index \d, column 'mask'"),
}


def test_images_and_maps_of_all_sizes_and_modes() -> None:
    """One set with eight modes of images and four of maps, of which palette indices are the classes, not colours."""
    rng = np.random.default_rng(0)
    images, maps = [], []
    for row, mode in enumerate(["RGB", "L", "RGBA", "P", "1", "CMYK", "LA", "I;16"]):
        size = (10 + row, 9 + 2 * row)
        grey = Image.fromarray(rng.integers(0, 255, size[::-1], dtype=np.uint8))
        images.append(Image.fromarray(np.asarray(grey).astype(np.uint16)) if mode == "I;16" else grey.convert(mode))
        classes = rng.integers(0, 2, size[::-1], dtype=np.uint8)
        drawn = Image.fromarray(classes)
        if row % 4 == 1:
            drawn.putpalette([9, 8, 7, 6, 5, 4] * 128)
        maps.append(
            [drawn, drawn, Image.fromarray(classes.astype(np.uint16)), drawn.point(lambda x: 255 * x, "1")][row % 4]
        )
    rows = Dataset.from_dict({"image": images, "mask": maps}, features=columns("image", "mask"))
    pixels = raw_processor(do_resize=True, size={"height": 12, "width": 12})
    split = segmentation_task(DatasetDict({"train": rows, "validation": rows}), pixels, labels=["a", "b"]).train
    for position in range(len(split)):
        item = split[position]
        assert item["pixel_values"].shape == (3, 12, 12)
        assert set(item["labels"].unique().tolist()) == {0, 1}
    split.require_labels()


@pytest.mark.parametrize(("drawn", "message"), [
    (None, r"No map in split 'test' at index 0, column 'mask'.*leave the split out"),
    (Image.new("L", (8, 6), 255), "No pixel of split 'test', column 'mask', counts: all are 255.*not published"),
])  # fmt: skip
def test_a_split_without_labels_is_named(drawn: Image.Image | None, message: str) -> None:
    test = Dataset.from_dict({"image": [PICTURE] * 2, "mask": [drawn] * 2}, features=columns("image", "mask"))
    raw = DatasetDict({**one(PICTURE, MAP), "test": test})
    task = segmentation_task(raw, raw_processor(), labels=["a", "b"])
    task.train.require_labels()
    assert task.test is not None
    with pytest.raises(px.DataError, match=message):
        task.test.require_labels()


@pytest.mark.parametrize("case", BAD_PAIRS)
def test_a_bad_example_is_named(case: str) -> None:
    raw, message = BAD_PAIRS[case]
    task = segmentation_task(raw, raw_processor(), labels=["a", "b"])
    with pytest.raises(px.DataError, match=message):
        task.train[0]


@pytest.mark.parametrize(
    ("raw", "settings", "message"),
    [
        (one(PICTURE, MAP), {"labels": ["a"]}, "1 classes .*expected at least 2"),
        (one(PICTURE, MAP), {"train_split": "x"}, "No split 'x' to train on"),
        (one(PICTURE, MAP), {"validation_split": "x"}, "No split 'x' to validate on"),
        (one(PICTURE, MAP), {"validation_share": 0.0}, "cannot be taken off"),
        (DatasetDict({**one(PICTURE, MAP), "test": coded(2).select([])}), {}, "Split 'test' is empty"),
        (
            DatasetDict({**one(PICTURE, MAP), "test": coded(2).remove_columns("mask")}),
            {},
            "'test' has no column 'mask'",
        ),
    ],
)
def test_bad_data_is_an_error(raw: DatasetDict, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(px.DataError, match=message):
        segmentation_task(raw, raw_processor(), **{"labels": ["a", "b"], **settings})


def test_a_processor_that_moves_pixels_is_refused() -> None:
    for processor in (MobileViTImageProcessor(), ConvNextImageProcessor(size={"shortest_edge": 224})):
        with pytest.raises(px.DataError, match=r"ImageProcessor\w* crops or pads images"):
            segmentation_task(one(PICTURE, MAP), Preprocess(processor), labels=["a", "b"])
    for processor in (
        MobileViTImageProcessor(do_center_crop=False),
        ConvNextImageProcessor(size={"shortest_edge": 384}),
        SegformerImageProcessor(size={"height": 64, "width": 48}),
    ):
        assert segmentation_task(one(PICTURE, MAP), Preprocess(processor), labels=["a", "b"]).labels == ["a", "b"]


# --- the embedded scenes, and whole runs ---


def test_scenes_have_every_class_and_never_change() -> None:
    data, again = demo_scenes.scenes(), demo_scenes.scenes.__wrapped__()
    seen: set[bytes] = set()
    for name, split in data.items():
        maps = np.stack([np.asarray(m) for m in split["annotation"]])
        assert set(np.unique(maps)) == {*range(len(demo_scenes.SCENE_CLASSES)), demo_scenes.VOID}
        assert np.array_equal(maps, np.stack([np.asarray(m) for m in again[name]["annotation"]]))
        seen |= {image.tobytes() for image in split["image"]}
    assert len(seen) == sum(len(split) for split in data.values())


def settings(folder: Path, out: str, *more: str) -> list[str]:
    return [
        *("--model_name_or_path", str(folder / "backbone"), "--output_dir", str(folder / out)),
        *("--max_train_samples", "40", "--max_eval_samples", "13", "--num_train_epochs", "2", "--decoder_size", "8"),
        *("--scoring_images", "6", "--rounds", "2", "--disable_tqdm", "true", "--compare_dense", "false"),
        *("--sparsity", "0.5", "--per_device_eval_batch_size", "4", *more),
    ]


REPAIRED = ("--repair", "layers")


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    prune_segment.main(settings(folder, "finished", "--compare_dense", "true", *REPAIRED))
    return folder / "finished"


def mean_iou_of(out: Path) -> float:
    """On the same 13 test scenes, by stock transformers and scikit-learn."""
    model = AutoModelForSemanticSegmentation.from_pretrained(out).eval()
    processor = ViTImageProcessor.from_pretrained(out)
    data = demo_scenes.scenes()["test"]
    chosen = np.sort(np.random.default_rng(42).permutation(len(data))[:13])
    rows = data.select(chosen)
    with torch.no_grad():
        logits = model(**processor(list(rows["image"]), return_tensors="pt")).logits
    predicted = nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1).numpy().ravel()
    true = np.stack([np.asarray(m) for m in rows["annotation"]]).ravel()
    counted = true != demo_scenes.VOID
    return float(jaccard_score(true[counted], predicted[counted], average="macro"))


def test_a_run_reports_the_mean_iou_of_the_saved_model(finished: Path) -> None:
    results = json.loads((finished / "all_results.json").read_text())
    masks = px.Masks.from_pretrained(finished)
    model = AutoModelForSemanticSegmentation.from_pretrained(finished)
    assert not masks.revived(model)
    assert masks.kept == results["weights_kept"] == masks.total - round(masks.total / 2)
    assert all(name.startswith("backbone.") for name in masks)
    assert results["repair"] == model.config.px["repair"] == "layers"
    assert model.config.id2label[3] == "triangle"
    for name in ("dense", "pruned"):
        score = results[name]["test"]["mean_iou"]
        assert score["low"] <= score["value"] <= score["high"]
        assert results[name]["test"]["images"] == 13
        assert len(results[name]["test"]["iou_by_class"]) == 5
    assert results["pruned"]["test"]["mean_iou"]["value"] == pytest.approx(mean_iou_of(finished), abs=1e-3)
    for name in ("segmentation.png", "per_layer_sparsity.png"):
        assert Image.open(finished / name).size[0] > 300


def test_two_processes_count_every_scene_once(folder: Path, finished: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    command = [*TWO, str(RECIPES / "prune_segment.py"), *settings(folder, "two", *REPAIRED)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((folder / "two/all_results.json").read_text())
    assert results["pruned"]["test"]["images"] == 13
    assert results["pruned"]["test"]["mean_iou"]["value"] == pytest.approx(mean_iou_of(folder / "two"), abs=1e-3)
    assert px.Masks.from_pretrained(folder / "two") == px.Masks.from_pretrained(finished)


def test_an_interrupted_run_resumes_to_the_same_end(folder: Path, finished: Path) -> None:
    out = folder / "interrupted"
    shutil.copytree(finished, out)
    with pytest.raises(px.OutputExistsError, match="already holds a model"):
        prune_segment.main(settings(folder, "interrupted"))
    checkpoints = sorted(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    shutil.rmtree(checkpoints[-1])
    for name in ("config.json", "model.safetensors", "masks.safetensors", "all_results.json"):
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "sparse", ignore_errors=True)
    (out / "preprocessor_config.json").unlink()
    resume = ["--compare_dense", "true", "--resume_from_checkpoint", "true"]
    prune_segment.main(settings(folder, "interrupted", *REPAIRED, *resume))
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    first, again = (json.loads((path / "all_results.json").read_text()) for path in (finished, out))
    assert again["pruned"] == first["pruned"]
    assert again["dense"] == first["dense"]


def test_whole_units_are_taken_out_and_a_resumed_run_takes_out_the_same(folder: Path) -> None:
    more = ["--scope", "structured", "--sparsity", "0.3"]
    prune_segment.main(settings(folder, "structured", *more))
    out = folder / "structured"
    first = json.loads((out / "all_results.json").read_text())
    assert first["parameters_kept"] == px.from_pretrained(out).num_parameters() < first["parameters"]
    checkpoint = str(min(out.glob("checkpoint-*"), key=lambda path: int(path.name.removeprefix("checkpoint-"))))
    resume = ["--resume_from_checkpoint", checkpoint, "--overwrite_output_dir"]
    prune_segment.main(settings(folder, "structured", *more, *resume))
    again = json.loads((out / "all_results.json").read_text())
    assert {**again, "seconds": None} == {**first, "seconds": None}


def test_a_gradual_run_and_a_resumed_one(folder: Path) -> None:
    more = ["--schedule", "gradual", "--save_strategy", "steps", "--save_steps", "3", "--save_total_limit", "9"]
    more += ["--horizontal_flip", "false"]  # a batch that Trainer fetched ahead is drawn anew within an epoch
    prune_segment.main(settings(folder, "gradual", *more))
    out = folder / "gradual"
    first = json.loads((out / "all_results.json").read_text())
    weights = (out / "model.safetensors").read_bytes()
    assert first["sparsity"] == pytest.approx(0.5, abs=1e-3)
    assert (first["schedule"], first["rounds"]) == ("gradual", 2)
    assert first["pruned"]["test"]["mean_iou"]["value"] == pytest.approx(mean_iou_of(out), abs=1e-3)
    resume = ["--resume_from_checkpoint", str(out / "checkpoint-3"), "--overwrite_output_dir"]  # before the last round
    prune_segment.main(settings(folder, "gradual", *more, *resume))
    assert (out / "model.safetensors").read_bytes() == weights
    again = json.loads((out / "all_results.json").read_text())
    assert {**again, "seconds": None} == {**first, "seconds": None}


def test_the_schedule_has_its_own_rounds() -> None:
    for more, rounds in (([], 10), (["--schedule", "gradual"], 8), (["--schedule", "gradual", "--rounds", "5"], 5)):
        assert prune_segment.parse(more)[1].rounds == rounds


def test_a_data_set_of_ones_own_with_classes_counted_from_its_maps(folder: Path) -> None:
    for split, count in (("train", 12), ("test", 3)):
        coded(count).to_parquet(folder / f"{split}.parquet")
    own = ["--train_file", str(folder / "train.parquet"), "--test_file", str(folder / "test.parquet")]
    prune_segment.main(settings(folder, "own", *own, "--ignore_index", "200", "--num_train_epochs", "1"))
    results = json.loads((folder / "own/all_results.json").read_text())
    assert results["pruned"]["test"]["images"] == 3
    assert len(results["pruned"]["test"]["iou_by_class"]) == 5


@pytest.mark.parametrize(("architecture", "maps"), [("test_resnet", [1, 2, 3, 4]), ("test_vit", [2, 3, 4, 5])])
def test_a_backbone_of_timm_on_a_dataset_folder_with_a_name_for_void(
    folder: Path, architecture: str, maps: list[int]
) -> None:
    """Its pretrained weights are under the decoder; stock transformers loads the result; void is no class."""
    torch.manual_seed(1)
    source = timm.create_model(architecture)
    dense = px.Masks({name: torch.ones_like(p, dtype=torch.bool) for name, p in prunable(source).items()})
    px.save_pretrained(source, dense, folder / architecture)
    (folder / "own-set").mkdir(exist_ok=True)
    for split, count in (("train", 10), ("validation", 3), ("test", 3)):
        coded(count, classes=4, void=4).to_parquet(folder / f"own-set/{split}.parquet")
    (folder / "names.json").write_text(json.dumps({"classes": [*"abcd", "void"]}))
    own = ["--dataset_name", str(folder / "own-set"), "--class_names_file", str(folder / "names.json")]
    model_args = ModelArguments(model_name_or_path=str(folder / architecture))
    model = load_model(model_args, 8, list("abcd"), FineTuneArguments(str(folder / "none"), use_cpu=True))
    assert list(model.config.backbone_config.out_indices) == maps
    for name, weight in prunable(model).items():
        assert torch.equal(
            weight, source.get_parameter(name.removeprefix("backbone._backbone.").removeprefix("model."))
        )

    argv = settings(folder, f"of-{architecture}", *own, "--ignore_index", "4", "--num_train_epochs", "1")
    argv[argv.index("--model_name_or_path") + 1] = str(folder / architecture)
    prune_segment.main(argv)
    results = json.loads((folder / f"of-{architecture}/all_results.json").read_text())
    assert len(results["pruned"]["test"]["iou_by_class"]) == 4
    saved = AutoModelForSemanticSegmentation.from_pretrained(folder / f"of-{architecture}")
    assert saved.config.id2label == dict(enumerate("abcd"))
    assert not px.Masks.from_pretrained(folder / f"of-{architecture}").revived(saved)


def test_a_bad_map_of_the_test_split_is_found_before_anything_is_trained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    for split, classes in (("train", 3), ("test", 5)):
        coded(6, classes=classes).to_parquet(folder / f"late-{split}.parquet")
    own = ["--train_file", str(folder / "late-train.parquet"), "--test_file", str(folder / "late-test.parquet")]
    with pytest.raises(px.DataError, match=r"split 'test' at index 0, column 'mask', has the classes 3, 4"):
        prune_segment.main(settings(folder, "late", *own, "--ignore_index", "200"))
    assert not (folder / "late").exists()


@pytest.mark.parametrize(
    ("count", "expected"), [(1, [0]), (4, [0, 1, 2, 3]), (5, [1, 2, 3, 4]), (12, [2, 5, 8, 11]), (24, [5, 11, 17, 23])]
)
def test_four_stages_that_end_with_the_last(count: int, expected: list[int]) -> None:
    assert four_of(range(count)) == expected


BAD_ARGUMENTS = [
    (["--sparsity", "1.0"], r"must be in \[0, 1\)"),
    (["--schedule", "gradual", "--until", "2"], "until=2.0"),
    (["--schedule", "gradual", "--max_steps", "1"], "rounds=2 do not fit into training"),
    (["--scoring_images", "0"], "--scoring_images must be at least 1"),
    (["--class_names_file", "no/such.json"], "Cannot read --class_names_file no/such.json"),
    (["--train_file", "no/such.parquet"], "No such file or folder"),
    (["--sparcity", "0.5"], "Did you mean --sparsity"),
    (["--model_name_or_path", str(RECIPES / "demo" / "vit")], "neither a segmentation model nor a backbone"),
]


@pytest.mark.parametrize(("more", "message"), BAD_ARGUMENTS, ids=[row[0][0] + row[0][1][-8:] for row in BAD_ARGUMENTS])
def test_bad_arguments(folder: Path, more: list[str], message: str) -> None:
    with pytest.raises((px.InvalidArgumentError, px.DataError), match=message):
        prune_segment.main(settings(folder, "bad", *more))
    assert not (folder / "bad").exists()


@pytest.mark.parametrize(
    "content", ['["a", "b"]', '{"0": "a", "1": "b"}', '{"classes": ["a", "b"]}', '{"id2label": {"1": "b", "0": "a"}}']
)
def test_class_names_are_read_from_every_usual_form(tmp_path: Path, content: str) -> None:
    (tmp_path / "names.json").write_text(content)
    assert read_class_names(str(tmp_path / "names.json")) == ["a", "b"]
