"""Frozen features, the probes on them, and the intervals of their scores: slow oracles and properties."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from networks import build, sizes
from PIL import Image
from sklearn import metrics as sklearn_metrics
from sklearn.linear_model import LogisticRegression
from sklearn.linear_model import Ridge as SklearnRidge
from torch import nn
from transformers import ViTImageProcessor

from px_hf.data import Preprocess, Split, classification_task
from px_hf.errors import DataError, NonFiniteError
from px_hf.evaluation import (
    KNN,
    PROBES,
    Examples,
    FeatureCache,
    LinearProbe,
    Probe,
    Ridge,
    classification_scores,
    head_inputs,
)
from px_hf.evaluation.features import features_key
from px_hf.evaluation.intervals import MEANS_OVER_CLASSES, bootstrap, unit_counts, wilson
from px_hf.evaluation.scores import segmentation_scores
from px_hf.metrics.mean_iou.mean_iou import confusion_matrices
from px_hf.model.targets import head_modules

CLASSES = 4


def clusters(count: int, seed: int, spread: float = 1.5) -> Examples:
    """Gaussians around one centre per class, in 6 dimensions of different scale, one of them constant."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, 6))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    features = centres[labels] + spread * rng.normal(size=(count, 6)) * [1, 1, 1, 1, 1, 0]
    features[:, 5] = 3.0
    return Examples((features * [1, 10, 0.1, 1, 1, 1]).astype(np.float32), labels)


TRAIN, VALIDATION, TEST = clusters(120, 1), clusters(40, 2), clusters(200, 3)


def slow_knn(x: np.ndarray, k: int, temperature: float) -> np.ndarray:
    rows = []
    for one in x.astype(np.float64):
        cosine = [one @ y / np.linalg.norm(one) / np.linalg.norm(y) for y in TRAIN.features.astype(np.float64)]
        votes = np.zeros(CLASSES)
        for i in sorted(range(len(cosine)), key=lambda i: -cosine[i])[:k]:
            votes[TRAIN.labels[i]] += np.exp(cosine[i] / temperature)
        rows.append(votes / votes.sum())
    return np.stack(rows)


def test_knn_votes_as_defined() -> None:
    for k in (1, 7, 120):
        fitted = KNN((k,), temperature=0.3).fit(TRAIN, VALIDATION, CLASSES)
        np.testing.assert_allclose(fitted.scores(TEST.features), slow_knn(TEST.features, k, 0.3), atol=1e-5)


def standardised(features: np.ndarray) -> np.ndarray:
    varying = TRAIN.features[:, :5].astype(np.float64)
    return (features[:, :5] - varying.mean(0)) / varying.std(0)


@pytest.mark.parametrize("penalty", [10.0, 1e-2, 1e-6])
def test_ridge_is_scikit_learns(penalty: float) -> None:
    fitted = Ridge((penalty,)).fit(TRAIN, VALIDATION, CLASSES)
    expected = SklearnRidge(alpha=penalty * len(TRAIN.labels), solver="svd")
    expected.fit(standardised(TRAIN.features), np.eye(CLASSES)[TRAIN.labels])
    np.testing.assert_allclose(fitted.scores(TEST.features), expected.predict(standardised(TEST.features)), atol=1e-9)


@pytest.mark.parametrize("strength", [1e-3, 1.0])
def test_linear_probe_is_logistic_regression_wherever_it_starts(strength: float) -> None:
    fitted = LinearProbe((1e-4, strength)).fit(TRAIN, VALIDATION, CLASSES)
    if fitted.chosen == {"C": 1e-4}:
        fitted = LinearProbe((strength,)).fit(TRAIN, VALIDATION, CLASSES)
    expected = LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
    expected.fit(standardised(TRAIN.features), TRAIN.labels)
    found = fitted.scores(TEST.features)
    np.testing.assert_allclose(found, expected.predict_proba(standardised(TEST.features)), atol=2e-3)
    np.testing.assert_allclose(found.sum(1), 1)
    assert fitted.note == ""


def test_linear_probe_says_when_it_has_not_converged() -> None:
    assert LinearProbe(max_iter=1).fit(TRAIN, VALIDATION, CLASSES).note == "not converged after 1 steps"


@pytest.mark.parametrize("name", PROBES)
def test_every_probe_learns_chooses_on_validation_and_fits_on_training_alone(name: str) -> None:
    probe: Probe = PROBES[name]
    fitted = probe.fit(TRAIN, VALIDATION, CLASSES)
    scores = fitted.scores(TEST.features)
    assert scores.shape == (200, CLASSES)
    assert (scores.argmax(1) == TEST.labels).mean() > 0.45  # chance is 0.25
    on_validation = (fitted.scores(VALIDATION.features).argmax(1) == VALIDATION.labels).mean()
    assert fitted.validation_accuracy == on_validation
    # another validation set may choose another setting; with the same one the probe is the same
    other = probe.fit(TRAIN, clusters(300, 9), CLASSES)
    if other.chosen == fitted.chosen:
        np.testing.assert_array_equal(other.scores(TEST.features), scores)
    grid = next(iter(vars(probe).values()))
    single = [type(probe)((value,)).fit(TRAIN, VALIDATION, CLASSES).validation_accuracy for value in grid]
    assert fitted.validation_accuracy == pytest.approx(max(single), abs=1 / 40 + 1e-9)
    assert not fitted.probabilities or np.allclose(scores.sum(1), 1)


@pytest.mark.parametrize("name", PROBES)
def test_a_class_without_training_examples_and_dead_features_are_survived(name: str) -> None:
    some = TRAIN.labels < 3
    train = Examples(np.zeros_like(TRAIN.features[some]), TRAIN.labels[some])
    scores = PROBES[name].fit(train, VALIDATION, CLASSES).scores(np.zeros((2, 6), np.float32))
    assert scores.shape == (2, CLASSES)
    assert np.isfinite(scores).all()


def test_features_must_be_finite_and_fit_their_labels() -> None:
    with pytest.raises(NonFiniteError, match="1 of 2 examples have features that are NaN"):
        Examples(np.array([[1.0, np.nan], [0.0, 0.0]]), np.array([0, 1]))
    with pytest.raises(DataError, match=r"Features \[2, 2\] and labels \[1\]"):
        Examples(np.zeros((2, 2)), np.array([0]))
    with pytest.raises(DataError, match="at least 1"):
        Examples(np.zeros((0, 2)), np.zeros(0, int))


# --- scores and intervals ---


def test_wilson_is_its_formula() -> None:
    z = 1.959963984540054
    for right, count in ((0, 5), (7, 7), (3, 11), (990, 1000)):
        p = right / count
        centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
        half = z / (1 + z**2 / count) * np.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
        assert wilson(right, count) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-12)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_bootstrap_draws_examples_anew() -> None:
    """The interval is that of drawing examples one by one and asking scikit-learn each time."""
    rng = np.random.default_rng(0)
    true = rng.integers(0, 5, 80)
    predicted = np.where(rng.random(80) < 0.6, true, rng.integers(0, 6, 80))
    scores = np.eye(6)[predicted]
    oracles = {
        "macro_f1": lambda t, p: sklearn_metrics.f1_score(t, p, average="macro"),
        "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
    }
    result = classification_scores(scores, true)
    for name, oracle in oracles.items():
        drawn = [rng.integers(0, 80, 80) for _ in range(1000)]
        low, high = np.quantile([oracle(true[d], predicted[d]) for d in drawn], [0.025, 0.975])
        assert result[name]["value"] == oracle(true, predicted)
        assert (result[name]["low"], result[name]["high"]) == pytest.approx((low, high), abs=0.02)
        counts = unit_counts(sklearn_metrics.confusion_matrix(true, predicted, labels=range(6)))
        assert float(MEANS_OVER_CLASSES[name](counts)) == pytest.approx(oracle(true, predicted), abs=1e-12)
    assert result["accuracy"]["value"] == (true == predicted).mean()
    assert (result["accuracy"]["low"], result["accuracy"]["high"]) == wilson(int((true == predicted).sum()), 80)
    assert "calibration_error" not in classification_scores(scores, true, probabilities=False)


def test_segmentation_scores_are_those_of_all_pixels_with_images_drawn_anew() -> None:
    rng = np.random.default_rng(0)
    true = rng.integers(0, 3, (12, 6, 6))
    predicted = np.where(rng.random(true.shape) < 0.7, true, 0)
    confusions = confusion_matrices(predicted, true, 3, 255)
    result = segmentation_scores(confusions)["mean_iou"]
    expected = sklearn_metrics.jaccard_score(true.ravel(), predicted.ravel(), average="macro")
    assert (
        result["value"]
        == expected
        == pytest.approx(float(MEANS_OVER_CLASSES["mean_iou"](unit_counts(confusions.sum(0)))))
    )
    drawn = [rng.integers(0, 12, 12) for _ in range(1000)]
    values = [sklearn_metrics.jaccard_score(true[d].ravel(), predicted[d].ravel(), average="macro") for d in drawn]
    assert (result["low"], result["high"]) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=0.02)


def test_an_interval_of_certainty_has_no_width() -> None:
    units = unit_counts(np.array([[[5, 0], [0, 3]]]))
    assert bootstrap("macro_f1", units) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("shape", "labels"), [((3, 2), [0, 1]), ((0, 2), []), ((2, 2), [0, 2]), ((2, 2), [-1, 0]), ((2,), [0, 1])]
)
def test_scores_that_do_not_fit_are_an_error(shape: tuple[int, ...], labels: list[int]) -> None:
    with pytest.raises(DataError):
        classification_scores(np.zeros(shape), np.array(labels, dtype=int))


# --- features ---


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8))


def split_of(images: list[Any], name: str = "train") -> Split:
    encoded = []
    for image in images:
        buffer = io.BytesIO()
        if isinstance(image, Image.Image):
            image.save(buffer, "PNG")
        encoded.append({"bytes": buffer.getvalue() or image, "path": None})
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b"])})
    labels = [row % 2 for row in range(len(images))]
    rows = Dataset.from_dict({"image": encoded, "label": labels}, features=features)
    task = classification_task(DatasetDict({name: rows, "validation": rows}), train_split=name)
    return task.train.with_pixels(Preprocess(ViTImageProcessor(size={"height": 16, "width": 16})))


class NoHead(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize("name", ["hf vit", "hf resnet", "timm vit", "timm resnet"])
def test_the_head_makes_the_logits_of_the_features(name: str) -> None:
    model = build(name).float().train()
    size = sizes(name)
    split = split_of([picture(i) for i in range(5)]).with_pixels(
        Preprocess(ViTImageProcessor(size={"height": size, "width": size}))
    )
    found = head_inputs(model, split, batch_size=2, progress=False)
    assert model.training
    (head,) = [module for module in head_modules(model) if isinstance(module, nn.Linear)]
    images = torch.stack([item["pixel_values"] for item in split.__getitems__(range(5))])
    with torch.no_grad():
        output = model.eval()(images)
    logits = getattr(output, "logits", output)
    torch.testing.assert_close(head(torch.from_numpy(found)), logits, rtol=1e-4, atol=1e-5)


def test_a_model_without_a_head_gives_its_output() -> None:
    split = split_of([picture(i) for i in range(3)])
    found = head_inputs(NoHead(), split, progress=False)
    expected = torch.stack([item["pixel_values"].mean((1, 2)) for item in split.__getitems__(range(3))])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_features_are_computed_once_and_again_when_the_file_is_damaged(tmp_path: Path) -> None:
    cache, calls = FeatureCache(tmp_path / "features"), []

    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(6, dtype=np.float32).reshape(3, 2)

    for _ in range(2):
        np.testing.assert_array_equal(cache.compute("key", compute), compute())
    assert len(calls) == 3  # two of them by this test
    (file,) = (tmp_path / "features").iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    np.testing.assert_array_equal(cache.compute("key", compute), compute())
    assert len(calls) == 5
    cache.compute("other", compute)
    assert len(list((tmp_path / "features").iterdir())) == 2


def test_the_key_of_features_is_what_they_depend_on() -> None:
    model = build("hf resnet").float()
    images = [picture(i) for i in range(4)]
    split = split_of(images)
    key = features_key(model, split, 8)
    assert features_key(build("hf resnet").float(), split_of(images, "other"), 8) == key
    changed = {
        "pixel": (model, split_of([*images[:3], picture(9)])),
        "order": (model, split_of(images[::-1])),
        "fewer": (model, split.select(np.arange(3))),
        "processor": (model, split.with_pixels(Preprocess(ViTImageProcessor(size={"height": 8, "width": 8})))),
    }
    keys = {features_key(*pair, 8) for pair in changed.values()} | {features_key(model, split, 4)}
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    keys |= {key, features_key(model, split, 8)}
    assert len(keys) == len(changed) + 3


def test_an_empty_split_is_named() -> None:
    split = split_of([picture(0), picture(1)], "some")
    with pytest.raises(DataError, match="Split 'some' is empty"):
        head_inputs(NoHead(), split.select(np.arange(0)), progress=False)


PROCESSES = """
import sys
import numpy as np
from test_probes import NoHead, build, picture, split_of
from px_hf.distributed import processes
from px_hf.evaluation import FeatureCache, head_inputs
from px_hf.errors import DataError
group = processes()
out = sys.argv[1]
model = build("hf resnet").float()
split = split_of([picture(i) for i in range(7)])
calls = []
def compute():
    calls.append(1)
    return head_inputs(model, split, batch_size=2, progress=False)
cache = FeatureCache(f"{out}/cache")
first = cache.compute("key", compute)
again = cache.compute("key", compute)
assert len(calls) == 1
assert (first is None) == (again is None) == (not group.is_main)
np.save(f"{out}/{group.world_size}-{group.rank}.npy", head_inputs(model, split, batch_size=2, progress=False))
try:
    head_inputs(model, split_of([picture(0), picture(1), b"no image", picture(3)]), batch_size=1, progress=False)
except DataError as error:
    assert "at index 2" in str(error)
else:
    raise AssertionError("the unreadable image was not noticed")
import torch.distributed as dist
if dist.is_initialized():
    dist.destroy_process_group()
"""


def test_two_processes_compute_each_image_once_and_fail_together(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(PROCESSES)
    clean = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    env = clean | {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"}
    env |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for command in ([sys.executable], launcher):
        (tmp_path / str(len(command))).mkdir()
        done = subprocess.run(
            [*command, str(tmp_path / "script.py"), str(tmp_path / str(len(command)))],
            env=env, capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one = np.load(tmp_path / "1" / "1-0.npy")
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / str(len(launcher)) / f"2-{rank}.npy"), one)
