"""Batches as people have them: each is right, or refused by an error that names it and says what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
import timm
import torch
from networks import build, images
from PIL import Image
from torch import Tensor, nn

import px_hf as px

X, Y = images(6), torch.tensor([0, 1, 2, 3, 4, 0])


def rows() -> datasets.Dataset:
    return datasets.Dataset.from_dict({"pixel_values": X.numpy(), "label": Y.tolist()})


class Examples(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return X[index], int(Y[index])


class Iterated(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return iter([(X[i], int(Y[i])) for i in range(len(X))])


class Once:
    """Looks like a list of batches, and is empty the second time."""

    def __init__(self) -> None:
        self.left = iter([(X, Y)])

    def __iter__(self) -> Iterator[Any]:
        return self.left


RIGHT = {
    "a list of labels": lambda: [(X, Y.tolist())],
    "an array of labels": lambda: [(X, Y.numpy())],
    "a list of label tensors": lambda: [(X, list(Y))],
    "the key label": lambda: [{"pixel_values": X, "label": Y}],
    "the key label, a list": lambda: [{"pixel_values": X, "label": Y.tolist()}],
    "datasets": lambda: rows().with_format("torch").batch(6),
    "streaming datasets": lambda: rows().to_iterable_dataset().with_format("torch").batch(6),
    "a loader with workers": lambda: torch.utils.data.DataLoader(Examples(), batch_size=6, num_workers=2),
    "a loader of datasets": lambda: torch.utils.data.DataLoader(rows().with_format("torch"), batch_size=6),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_what_is_unambiguous_is_right(make: Any) -> None:
    model = build("hf vit")
    settings: Any = {"sparsity": 0.5, "rounds": 2, "progress": False}
    expected = px.prune(model, [(X, Y)], px.SNIP(), **settings)
    assert px.prune(model, make(), px.SNIP(), **settings) == expected


def test_one_label_for_a_batch_of_one() -> None:
    model = build("hf vit")
    expected, found = px.SNIP().score(model, [(X[:1], Y[:1])]), px.SNIP().score(model, [(X[:1], 0)])
    assert all(torch.equal(score, expected[name]) for name, score in found.items())


SINGLE = r"batch 0 is a single example.*\(3, 8, 8\).*DataLoader\(dataset, batch_size=32\).*image\[None\]"
PIL = Image.new("RGB", (8, 8))

REFUSED = {
    "datasets, not batched": (lambda: rows().with_format("torch"), SINGLE),
    "streaming, not batched": (lambda: rows().to_iterable_dataset().with_format("torch"), SINGLE),
    "an iterable Dataset": (lambda: Iterated(), SINGLE),
    "a list of examples": (lambda: [(X[0], 0), (X[1], 1)], SINGLE),
    "a list of images": (lambda: list(X), SINGLE),
    "a map-style Dataset": (lambda: Examples(), "batches is a Examples.*single examples.*DataLoader"),
    "one batch": (lambda: X, "Put a single batch into a list"),
    "a generator": (lambda: (batch for batch in [(X, Y)]), "can be read only once"),
    "read only once": (lambda: Once(), "batches is empty.*can be read only once"),
    "datasets without a format": (lambda: rows().batch(3), r"with_format\('torch'\)"),
    "a list of tensors": (lambda: [{"pixel_values": list(X), "labels": Y}], r"torch\.stack"),
    "an array": (lambda: [X.numpy()], "from_numpy"),
    "PIL": (lambda: [PIL], "batch 0 holds images of type Image.*image processor"),
    "PIL, several": (lambda: [{"pixel_values": [PIL, PIL], "label": [0, 1]}], "PIL images.*image processor"),
    "uint8": (lambda: [(X, Y), ((X * 255).byte(), Y)], r"batch 1 are torch\.uint8.*image processor"),
    "grayscale": (lambda: [(X, Y), (X[:, :1], Y)], r"batch 1 have 1 channel.*takes 3.*convert\('RGB'\)"),
    "grayscale, 3-D": (lambda: [(X[:, 0], Y)], r"batch 0 have shape \(6, 8, 8\).*images\[:, None\]"),
    "another key": (lambda: [{"image": X, "label": Y}], "expected 'pixel_values'.*image processor"),
    "texts as labels": (lambda: [(X, ["cat"] * 6)], "batch 0 has no labels.*list of class indices"),
    "one label for all": (lambda: [(X, 0)], "single example"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("network", ["hf vit", "cnn"])
def test_the_rest_is_an_error_that_says_what_to_do(name: str, network: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(px.DataError, match=f"(?s){message}"):
        px.prune(build(network), make(), px.SNIP(), sparsity=0.5, rounds=2, progress=False)


@pytest.mark.parametrize("criterion", [px.PX(), px.PX("active"), px.NTKSAP()], ids=["px", "px-active", "ntksap"])
def test_every_kind_of_criterion_says_it(criterion: px.Criterion) -> None:
    with pytest.raises(px.DataError, match="batch 1 have 1 channel"):
        criterion.score(build("hf vit"), [X, X[:, :1]])


def test_images_of_a_network_that_takes_them_without_channels() -> None:
    class Gray(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.conv(x.unsqueeze(1))).mean((2, 3)))

    assert px.SNIP().score(Gray(), [(X[:, 0], Y % 3)])["conv.weight"].any()


def test_another_failure_of_the_model_is_its_own() -> None:
    with pytest.raises(ValueError, match="Input image size") as error:
        px.SNIP().score(build("hf vit"), [(torch.rand(2, 3, 16, 16), Y[:2])])
    assert not isinstance(error.value, px.PxError)


def test_the_weights_before_all_feature_maps_are_pruned() -> None:
    model = timm.create_model("resnet10t", features_only=True)
    example = torch.rand(1, 3, 32, 32)
    for masks in (
        px.prune(model, [example], px.PX("active"), sparsity=0.5, rounds=1, progress=False),
        px.prune(model, [], px.Magnitude(), sparsity=0.5, progress=False),
    ):
        assert set(masks) == {name for name, p in model.named_parameters() if p.dim() > 1}
        assert np.isclose(masks.sparsity, 0.5, atol=1e-4)
    assert px.report(model, masks, example).macs
