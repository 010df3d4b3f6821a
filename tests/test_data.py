"""Any dataset to checked splits: columns, labels, splits, images, transforms, the calibration set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ConvNextImageProcessor, ViTImageProcessor
from transformers.models.timm_wrapper.image_processing_timm_wrapper import TimmWrapperImageProcessor

from px_hf.data import (
    Augment,
    DataSource,
    Preprocess,
    calibration_set,
    classification_task,
    read_dataset,
)
from px_hf.data.split import to_rgb
from px_hf.errors import DataError

NAMES = ["ant", "bee", "cat"]
COLOURS = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]


def picture(label: int, row: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    """A plain image whose colour is its class and whose shade is its row."""
    return Image.new("RGB", size, tuple(max(0, value - row) for value in COLOURS[label % 3]))


def rows(labels: list, feature: object = None, images: list | None = None, column: str = "label") -> Dataset:
    images = images or [picture(k if isinstance(k, int) else 0, row) for row, k in enumerate(labels)]
    features = Features({"image": ImageFeature(), column: feature or ClassLabel(names=NAMES)})
    return Dataset.from_dict({"image": images, column: labels}, features=features)


def processor(size: int = 8) -> ViTImageProcessor:
    return ViTImageProcessor(size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.25] * 3)


BALANCED = [0, 1, 2] * 6


# --- columns and labels ---


@pytest.mark.parametrize(
    ("feature", "labels", "classes", "encoded"),
    [
        (ClassLabel(names=NAMES), [2, 0, 1], NAMES, [2, 0, 1]),
        (Value("int32"), [2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        (Value("uint8"), [2, 0, 1], ["0", "1", "2"], [2, 0, 1]),
        (Value("string"), ["wasp", "ant", "bee"], ["ant", "bee", "wasp"], [2, 0, 1]),
    ],
)
def test_label_types(feature: object, labels: list, classes: list[str], encoded: list[int]) -> None:
    raw = DatasetDict({"train": rows(labels, feature), "validation": rows(labels, feature)})
    task = classification_task(raw)
    assert task.labels == classes
    assert task.train.labels.tolist() == encoded
    assert task.test is None


def test_columns_are_found_by_type_and_usual_name() -> None:
    table = {
        "picture": [picture(k, 0) for k in BALANCED],
        "coarse": [0] * 18,
        "label": BALANCED,
        "weight": [1] * 18,
    }
    features = Features(
        {
            "picture": ImageFeature(),
            "coarse": ClassLabel(names=["animal"]),
            "label": ClassLabel(names=NAMES),
            "weight": Value("int64"),
        }
    )
    task = classification_task(DatasetDict({"train": Dataset.from_dict(table, features=features)}))
    assert task.labels == NAMES
    assert task.train.image == "picture"


def test_named_column_of_encoded_bytes_without_the_image_type(tmp_path: Path) -> None:
    files = []
    for row, label in enumerate(BALANCED):
        picture(label, row).save(tmp_path / f"{row}.png")
        files.append((tmp_path / f"{row}.png").read_bytes())
    raw = DatasetDict({"train": Dataset.from_dict({"data": files, "label": BALANCED})})
    with pytest.raises(DataError, match="No column is of type Image"):
        classification_task(raw)
    task = classification_task(raw, image_column="data")
    assert task.train.images([0])[0].size == (12, 10)


IMAGES = [picture(0, 0)] * 3
BAD_TASKS = {
    "no image column": (
        Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]}),
        {},
        r"No column is of type Image.*text \(string\), label \(int64\).*image_column_name",
    ),
    "no label column": (
        Dataset.from_dict({"image": IMAGES}, features=Features({"image": ImageFeature()})),
        {},
        r"No column is of type ClassLabel.*image \(Image\).*label_column_name",
    ),
    "two label columns": (
        Dataset.from_dict(
            {"image": IMAGES, "fine": [0, 1, 2], "coarse": [0, 0, 1]},
            features=Features({"image": ImageFeature(), "fine": Value("int8"), "coarse": Value("int8")}),
        ),
        {},
        r"2 columns 'fine', 'coarse' are of classes",
    ),
    "named column absent": (rows([0, 1, 2]), {"label_column": "digit"}, "No column 'digit' for the label"),
    "named column no labels": (rows([0, 1, 2]), {"label_column": "image"}, "'image' holds Image, expected"),
    "named column no images": (rows([0, 1, 2]), {"image_column": "label"}, "no images but ClassLabel of 3"),
    "labels not integers": (
        rows([0.5, 1.0, 2.0], Value("float32")),
        {"label_column": "label"},
        "'label' holds float32, expected ClassLabel, integers or strings",
    ),
    "negative label": (rows([0, 1, 2, -1]), {}, r"Label -1 in split 'train' at index 3"),
    "missing label": (
        rows([0, None, 2]),
        {},
        r"Label None in split 'train' at index 1, column 'label': the label is missing",
    ),
    "class missing": (rows([0, 0, 2, 2]), {}, r"1 of 3 classes have no example.*'train': 'bee'"),
    "integer class missing": (rows([0, 3, 1], Value("int64")), {}, r"1 of 4 classes have no example.*: '2'"),
    "empty": (rows([], Value("int64")), {}, "training split 'train' is empty"),
    "one class": (rows([0, 0], ClassLabel(names=["ant"])), {}, r"'label' of split 'train' has the classes \['ant'\]"),
    "no training split": (rows([0, 1, 2]), {"train_split": "training"}, r"No split 'training'.*'train'"),
    "no validation split": (rows([0, 1, 2]), {"validation_split": "val"}, r"No split 'val'.*'train'"),
    "single example": (rows([0, 0, 1, 1, 2]), {}, r"'cat' has 1 training example.*name a validation split"),
    "validation share": (rows(BALANCED), {"validation_share": 1.0}, r"validation share is 1.0"),
}


@pytest.mark.parametrize("case", BAD_TASKS)
def test_bad_dataset_is_a_clear_error(case: str) -> None:
    train, arguments, message = BAD_TASKS[case]
    with pytest.raises(DataError, match=message):
        classification_task(DatasetDict({"train": train}), **arguments)


@pytest.mark.parametrize(
    ("test", "message"),
    [
        (rows([-1, -1]), r"Label -1 in split 'test' at index 0.*leave that split out"),
        (
            rows([0, 1], ClassLabel(names=["bee", "ant", "cat"])),
            r"Split 'test' has other classes.*another order",
        ),
        (rows([0, 1], column="target"), r"Split 'test' has no column 'label'"),
        (rows([None, None]), r"Label None in split 'test' at index 0, column 'label': the label is missing"),
        (rows([0, 3], Value("int64")), r"Label 3 in split 'test' at index 1, column 'label' is none of the 3 classes"),
        (rows([]), "Split 'test' is empty"),
        (
            rows(["wasp"], Value("string")),
            r"Label 'wasp' in split 'test' at index 0, column 'label' is none of the 3 classes",
        ),
    ],
)
def test_bad_test_split_is_a_clear_error_unless_ignored(test: Dataset, message: str) -> None:
    train = rows(BALANCED)
    if test.features.get("label") == Value("string"):
        train = rows([NAMES[k] for k in BALANCED], Value("string"))
    raw = DatasetDict({"train": train, "test": test})
    with pytest.raises(DataError, match=message):
        classification_task(raw)
    assert classification_task(raw, test_split=None).test is None


@pytest.mark.parametrize("own_validation", [True, False])
def test_a_task_without_a_test_split_gets_one_that_nothing_else_sees(own_validation: bool) -> None:
    data = {"train": rows(BALANCED)} | ({"validation": rows([2, 1, 0])} if own_validation else {})
    before = classification_task(DatasetDict(data), validation_share=0.3)
    task = before.with_test(0.3, seed=1)
    assert task.test is before.validation
    assert task.validation.name == task.train.name == "train"
    parts = [task.train.indices, task.validation.indices]
    assert sorted(np.concatenate(parts)) == sorted(before.train.indices)
    assert all(set(part.labels) == {0, 1, 2} for part in (task.train, task.validation))
    assert task.with_test() is task


# --- splits ---


def test_validation_is_a_seeded_stratified_share_of_train_and_never_of_test() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 10
    raw = DatasetDict({"train": rows(labels), "test": rows(BALANCED)})
    tasks = [classification_task(raw, validation_share=0.2, seed=seed) for seed in (0, 0, 1)]
    first = tasks[0]
    assert first.validation.name == "train"
    assert np.bincount(first.validation.labels).tolist() == [8, 4, 2]
    assert sorted([*first.train.indices, *first.validation.indices]) == list(range(70))
    assert first.test is not None
    assert len(first.test) == 18
    assert np.array_equal(first.train.indices, tasks[1].train.indices)
    assert not np.array_equal(first.train.indices, tasks[2].train.indices)


def test_validation_split_is_used_where_there_is_one() -> None:
    raw = DatasetDict({"train": rows(BALANCED), "valid": rows([0, 1])})
    task = classification_task(raw)
    assert (task.validation.name, len(task.validation), len(task.train)) == ("valid", 2, 18)


def test_sample_is_seeded() -> None:
    train = classification_task(DatasetDict({"train": rows(BALANCED)})).train
    assert len(train.sample(5, seed=0)) == 5
    assert np.array_equal(train.sample(5, seed=0).indices, train.sample(5, seed=0).indices)
    assert train.sample(None, seed=0) is train


# --- images ---


def test_every_mode_becomes_rgb() -> None:
    half = Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    half.putpixel((1, 0), (10, 20, 30, 0))
    palette = Image.new("RGB", (2, 2), (200, 100, 0)).convert("P", palette=Image.Palette.ADAPTIVE)
    deep = Image.fromarray(np.array([[0, 32768, 65535]], dtype=np.uint16))
    table = {
        "gray": (Image.new("L", (2, 1), 77), [(77, 77, 77)] * 2),
        "bits": (Image.new("1", (2, 1), 1), [(255, 255, 255)] * 2),
        "gray with alpha": (Image.new("LA", (1, 1), (50, 0)), [(255, 255, 255)]),
        "transparent is white": (half, [(10, 20, 30), (255, 255, 255)]),
        "palette": (palette, [(200, 100, 0)] * 4),
        "cmyk": (Image.new("CMYK", (1, 1), (0, 255, 255, 0)), [(255, 0, 0)]),
        "16 bits": (deep, [(0, 0, 0), (127, 127, 127), (255, 255, 255)]),
        "float": (Image.new("F", (1, 1), 128.0), [(128, 128, 128)]),
    }
    for name, (image, expected) in table.items():
        converted = to_rgb(image)
        assert converted.mode == "RGB", name
        pixels = np.asarray(converted).reshape(-1, 3)
        assert np.abs(pixels.astype(int) - np.array(expected)).max() <= 1, name


def test_unreadable_image_is_named_by_split_and_index(tmp_path: Path) -> None:
    files = []
    for row, label in enumerate(BALANCED):
        picture(label, row).save(tmp_path / f"{row}.png")
        files.append({"bytes": (tmp_path / f"{row}.png").read_bytes(), "path": None})
    files[4]["bytes"] = b"not an image"
    files[7]["bytes"] = files[7]["bytes"][:-30]
    files[9] = None
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=NAMES)})
    train = Dataset.from_dict({"image": files, "label": BALANCED}, features=features)
    raw = DatasetDict({"train": train.cast_column("image", ImageFeature()), "validation": rows([0, 1, 2])})
    split = classification_task(raw).train.with_pixels(Preprocess(processor()))
    for row in (4, 7, 9):
        with pytest.raises(DataError, match=f"Unreadable image in split 'train' at index {row}"):
            split.__getitems__([0, row])
    # also from the share that was split off, and through a loader with a worker process
    share = split.select(np.array([1, 9]))
    with pytest.raises(DataError, match="in split 'train' at index 9"):
        list(DataLoader(share, batch_size=2, num_workers=1))


def test_items_are_what_the_image_processor_gives() -> None:
    task = classification_task(DatasetDict({"train": rows(BALANCED), "validation": rows([0, 1, 2])}))
    pixels = Preprocess(processor())
    batch = next(iter(DataLoader(task.train.with_pixels(pixels), batch_size=4)))
    expected = processor()([picture(k, row) for row, k in enumerate(BALANCED[:4])], return_tensors="pt")
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    assert batch["labels"].tolist() == BALANCED[:4]
    assert batch["labels"].dtype == torch.int64
    with pytest.raises(DataError, match="with_pixels"):
        task.train[0]


def timm_processor() -> TimmWrapperImageProcessor:
    return TimmWrapperImageProcessor({"input_size": [3, 24, 24], "crop_pct": 0.9, "interpolation": "bicubic"})


def cropping_processor() -> ConvNextImageProcessor:
    return ConvNextImageProcessor(size={"shortest_edge": 24}, crop_pct=0.875)


@pytest.mark.parametrize("make", [lambda: processor(24), timm_processor, cropping_processor])
def test_every_image_processor_gives_one_shape_for_images_of_any_size(make: object) -> None:
    images = [picture(0, 0, size) for size in ((12, 10), (40, 30), (9, 33))]
    preprocess = Preprocess(make())  # type: ignore[operator]
    torch.manual_seed(0)
    for pixels in (preprocess, Augment(preprocess)):
        assert pixels(images).shape == (3, 3, 24, 24)


def test_a_processor_that_does_not_resize_is_a_clear_error() -> None:
    with pytest.raises(DataError, match=r"images of 2 sizes.*do_resize"):
        Preprocess(ViTImageProcessor(do_resize=False))([picture(0, 0, (8, 8)), picture(0, 0, (9, 8))])


def test_augmentation_crops_and_mirrors_only_when_asked() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 240, 8, dtype=np.uint8)[None, :, None], (30, 1, 3)))
    preprocess = Preprocess(processor(30))
    plain = preprocess([ramp])[0]
    torch.manual_seed(0)
    flips = [Augment(preprocess, random_crop=False)([ramp])[0] for _ in range(20)]
    mirrored = [torch.equal(image, plain.flip(-1)) for image in flips]
    assert 3 < sum(mirrored) < 17
    assert sum(torch.equal(image, plain) for image in flips) == 20 - sum(mirrored)
    crops = [Augment(preprocess, horizontal_flip=False)([ramp])[0] for _ in range(20)]
    assert all(image[0, 0, -1] >= image[0, 0, 0] for image in crops)  # cropped, never mirrored
    assert sum(torch.equal(image, plain) for image in crops) < 3
    untouched = Augment(preprocess, random_crop=False, horizontal_flip=False)([ramp])[0]
    assert torch.equal(untouched, plain)


# --- the calibration set ---


def test_calibration_set_is_balanced_seeded_and_from_the_training_share_only() -> None:
    labels = [0] * 40 + [1] * 20 + [2] * 8
    task = classification_task(DatasetDict({"train": rows(labels), "test": rows(BALANCED)}), seed=3)
    draw = [
        calibration_set(
            task.train, task.labels, Preprocess(processor()), examples_per_class=5, seed=seed, batch_size=4
        )
        for seed in (7, 7, 8)
    ]
    first, same, other = draw
    assert len(first) == 4
    assert [len(batch["labels"]) for batch in first] == [4, 4, 4, 3]
    assert np.bincount(first.split.labels).tolist() == [5, 5, 5]
    assert set(first.split.indices) <= set(task.train.indices)
    assert not set(first.split.indices) & set(task.validation.indices)
    for left, right in zip(first, same, strict=True):
        assert torch.equal(left["pixel_values"], right["pixel_values"])
        assert torch.equal(left["labels"], right["labels"])
    assert first.describe() == same.describe()
    assert first.describe()["sha256"] != other.describe()["sha256"]
    assert first.describe()["examples"] == 15


@pytest.mark.parametrize("cache_bytes", [0, 2**20])
def test_calibration_set_can_be_iterated_again(cache_bytes: int) -> None:
    train = classification_task(DatasetDict({"train": rows(BALANCED)})).train
    batches = calibration_set(train, NAMES, Preprocess(processor()), examples_per_class=2, batch_size=4)
    batches = type(batches)(batches.split, 2, 0, 4, cache_bytes)
    first, second = list(batches), list(batches)
    assert len(first) == 2
    for left, right in zip(first, second, strict=True):
        assert torch.equal(left["pixel_values"], right["pixel_values"])
        assert (left is right) == bool(cache_bytes)


def test_too_few_examples_for_calibration_names_classes_and_counts() -> None:
    train = rows([0] * 9 + [1] * 4 + [2] * 3)
    task = classification_task(DatasetDict({"train": train, "validation": rows([0])}))
    with pytest.raises(DataError, match=r"2 of 3 classes have fewer in split 'train': 'bee': 4, 'cat': 3"):
        calibration_set(task.train, task.labels, Preprocess(processor()), examples_per_class=5)
    with pytest.raises(DataError, match="expected at least 1"):
        calibration_set(task.train, task.labels, Preprocess(processor()), examples_per_class=0)


# --- sources ---


def test_image_folders_parquet_files_and_a_local_dataset_folder_read_the_same(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("test", 3)):
        for row in range(count):
            folder = tmp_path / "folders" / split / NAMES[row % 3]
            folder.mkdir(parents=True, exist_ok=True)
            picture(row % 3, row).convert("L").save(folder / f"{row:02d}.png")
        (tmp_path / "files").mkdir(exist_ok=True)
        rows([row % 3 for row in range(count)]).to_parquet(tmp_path / "files" / f"{split}.parquet")
    sources = [
        DataSource(train_dir=str(tmp_path / "folders/train"), test_dir=str(tmp_path / "folders/test")),
        DataSource(train_file=str(tmp_path / "files/train.parquet"), test_file=str(tmp_path / "files/test.parquet")),
        DataSource(dataset_name=str(tmp_path / "files")),
    ]
    for source in sources:
        task = classification_task(read_dataset(source, cache_dir=str(tmp_path / "cache")))
        assert task.labels == NAMES
        assert (len(task.train), len(task.validation), len(task.test or [])) == (9, 3, 3)
        assert task.train.images([0])[0].mode == "RGB"


@pytest.mark.parametrize("names", [["b", "a"], ["a", "b", "c"]])
def test_parquet_files_of_a_folder_with_other_class_names_are_an_error(tmp_path: Path, names: list[str]) -> None:
    """datasets reads them with the names of the first file: labels would mean other classes, silently."""
    image = Image.new("RGB", (4, 4))
    for split, classes in (("train", ["a", "b"]), ("test", names)):
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=classes)})
        Dataset.from_dict({"image": [image] * 4, "label": [0, 1] * 2}, features=features).to_parquet(
            tmp_path / f"{split}.parquet"
        )
    with pytest.raises(DataError, match=r"test.parquet has other classes in column 'label'.*\['a', 'b'\]"):
        read_dataset(DataSource(dataset_name=str(tmp_path)))


def test_a_class_folder_missing_from_train_dir_is_named(tmp_path: Path) -> None:
    for split, names in (("train", NAMES[:2]), ("validation", NAMES)):
        for label, name in enumerate(names):
            (tmp_path / split / name).mkdir(parents=True)
            picture(label, 0).save(tmp_path / split / name / "0.png")
    source = DataSource(train_dir=str(tmp_path / "train"), validation_dir=str(tmp_path / "validation"))
    with pytest.raises(DataError, match=r"no example in the training split 'train': 'cat'"):
        classification_task(read_dataset(source, cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (DataSource(), "0 kinds of data source"),
        (DataSource(dataset_name="beans", train_dir="x"), "2 kinds of data source"),
        (DataSource(train_dir="no/such/folder"), "No such file or folder: no/such/folder"),
        (DataSource(train_file="no/such.parquet"), "No such file or folder: no/such.parquet"),
        (DataSource(dataset_name="./no/such"), "Cannot read the dataset './no/such': Couldn't find"),
        (DataSource(validation_dir="."), "No training data: only validation is named"),
    ],
)
def test_bad_source_is_a_clear_error(source: DataSource, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_dataset(source)
