"""Masks merged by votes, and the criterion that ranks by them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import build, images

import px_hf as px
from px_hf.criteria.instant_soup import _DENSITIES

KEPT = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0]]
MASKS = [px.Masks({"a": torch.tensor(row, dtype=torch.bool)}) for row in KEPT]
BATCHES = [(images(6), torch.tensor([0, 1, 2, 3, 4, 0])), (images(4, seed=2), torch.tensor([4, 3, 2, 1]))]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rule": "union"}, [1, 1, 1, 0]),
        ({}, [1, 1, 1, 0]),
        ({"rule": "intersection"}, [1, 0, 0, 0]),
        ({"at_least": 3}, [1, 0, 0, 0]),
        ({"at_least": 1}, [1, 1, 1, 0]),
    ],
)
def test_by_hand(settings: dict[str, Any], expected: list[int]) -> None:
    assert px.vote(MASKS, **settings)["a"].tolist() == [bool(each) for each in expected]


def test_a_majority_is_more_than_half() -> None:
    assert px.vote(MASKS[:2])["a"].tolist() == [True, True, False, False]
    assert px.vote(MASKS[:1]) == MASKS[0]


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: px.vote([]), px.InvalidArgumentError, "one or more"),
        (lambda: px.vote([{}]), px.InvalidArgumentError, "sequence of Masks"),
        (lambda: px.vote(MASKS, rule="most"), px.InvalidArgumentError, "'majority'"),
        (lambda: px.vote(MASKS, at_least=4), px.InvalidArgumentError, "from 1 to 3"),
        (lambda: px.vote([*MASKS, px.Masks({"b": torch.ones(4).bool()})]), px.TargetError, "masks 1 and 4"),
    ],
)
def test_bad_input(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call()


def test_the_soup_counts_votes_and_tells_equal_ones_apart_by_magnitude() -> None:
    model = build("cnn")
    soup = px.InstantSoup(cooks=3, steps=2, learning_rate=0.2)
    scores = soup.score(model, BATCHES)
    counts = {name: score.floor() for name, score in scores.items()}
    assert max(float(count.max()) for count in counts.values()) == 3 * len(_DENSITIES)
    assert len({float(v) for count in counts.values() for v in count.flatten()}) > len(_DENSITIES), "cooks disagree"
    other = px.InstantSoup(cooks=3, steps=2, learning_rate=0.2, seed=1).score(model, BATCHES)
    assert any(not torch.equal(scores[name], other[name]) for name in scores)


def test_a_tiny_step_gives_magnitude() -> None:
    model = build("hf vit")
    masks = [
        px.select(by.score(model, BATCHES), sparsity=0.9)
        for by in (px.InstantSoup(2, 1, learning_rate=1e-9), px.Magnitude())
    ]
    assert masks[0] == masks[1]
