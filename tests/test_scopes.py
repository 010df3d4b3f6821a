"""What every scope promises: one row each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from networks import build, images
from torch import Tensor, nn

import px_hf as px
from px_hf.scopes import SCOPES, Blocks, Global, Layer, NOfM, Row, Scope, Step, Units, as_scope

ROWS = {
    "global": Global(),
    "layer": Layer(),
    "row": Row(),
    "2:4": NOfM(2, 4),
    "1:4": NOfM(1, 4),
    "block:4": Blocks(4),
    "structured": Units(),
    "structured:uniform": Units(uniform=True),
}
"""Text -> the scope it names. A scope without a row fails the suite."""

CONVOLUTIONS = {"block:4": False}
"""Whether a scope chooses among their weights."""

SPARSITY = {"1:4": 0.8, "structured:uniform": 0.3}
"""Of the tests, where it is not a half."""


def test_every_scope_has_a_row() -> None:
    assert {type(scope) for scope in ROWS.values()} == set(SCOPES)


@pytest.mark.parametrize("text", ROWS)
def test_text_and_object_are_the_same(text: str) -> None:
    assert as_scope(text) == ROWS[text]
    assert as_scope(ROWS[text]) is ROWS[text]
    assert ROWS[text].name == text
    assert [known for known in SCOPES if known.parse(text) is not None] == [type(ROWS[text])]


@pytest.mark.parametrize("text", ROWS)
@pytest.mark.parametrize("name", ["hf vit", "timm resnet"])
def test_prune_takes_both_keeps_the_budget_and_prunes_in_nested_rounds(name: str, text: str) -> None:
    class Watched(px.PX):
        seen: ClassVar[list[dict[str, Tensor]]] = []

        def score(self, model: nn.Module, batches: object, *, masks: Mapping[str, Tensor] | None = None, **more: bool):
            self.seen.append(dict(masks or {}))
            return super().score(model, batches, masks=masks, **more)

    if name == "timm resnet" and not CONVOLUTIONS.get(text, True):
        pytest.skip("a ResNet has no linear layer but its head")
    Watched.seen.clear()
    model, sparsity = build(name), SPARSITY.get(text, 0.5)
    settings = {"sparsity": sparsity, "rounds": 3, "progress": False}
    masks = px.prune(model, [images(2)], Watched(), scope=text, **settings)
    assert masks == px.prune(model, [images(2)], px.PX(), scope=ROWS[text], **settings)
    assert len(Watched.seen) == 3
    for earlier, later in zip(Watched.seen[1:], [*Watched.seen[2:], masks], strict=True):
        assert all(not bool((later[name] & ~earlier[name]).any()) for name in masks)
    if ROWS[text].whole_units:
        assert masks.sparsity <= sparsity
        small, rest = px.shrink(model, masks, images(1))
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
        assert rest.total < masks.total
    elif text in ("layer", "row"):
        assert all(abs(int((~mask).sum()) - sparsity * mask.numel()) <= 0.5 for mask in masks.values())
    elif text.startswith("block"):
        assert abs(masks.total - masks.kept - sparsity * masks.total) <= 8
    else:
        assert masks.total - masks.kept == round(sparsity * masks.total)


@pytest.mark.parametrize("text", [text for text, scope in ROWS.items() if not scope.whole_units])
def test_select_takes_both(text: str) -> None:
    scores = {"a": torch.rand(4, 8), "b": torch.rand(8, 8)}
    sparsity = SPARSITY.get(text, 0.5)
    assert px.select(scores, sparsity=sparsity, scope=text) == px.select(scores, sparsity=sparsity, scope=ROWS[text])


def test_a_users_own_scope() -> None:
    @dataclass(frozen=True)
    class OnlyFirst(Scope):
        """Prunes the first weight alone."""

        texts: ClassVar[tuple[str, ...]] = ("first",)

        def targets(self, model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return dict(list(weights.items())[:1])

        def keep(self, step: Step) -> dict[str, Tensor]:
            return Global().keep(step)

    masks = px.prune(build("hf vit"), [], px.Magnitude(), sparsity=0.5, scope=OnlyFirst(), progress=False)
    assert OnlyFirst().name == "first"
    assert len(masks) == 1
    assert masks.sparsity == 0.5


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("channel", r"Unknown scope 'channel', expected one of 'global', .*'n:m, such as 2:4'.*an object of px_hf"),
        ("structured:units", "Unknown scope 'structured:units'"),
        ("4:2", "scope='4:2'.*0 < n < m"),
        (3, "Unknown scope 3"),
        (Global, "Unknown scope <class"),
    ],
)
def test_what_is_no_scope_is_refused(scope: object, message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.prune(build("hf vit"), [], px.Magnitude(), sparsity=0.5, scope=scope)
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.select({"a": torch.rand(4)}, sparsity=0.5, scope=scope)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("partly", [False, True])
def test_blocks_against_a_loop(power: int, partly: bool) -> None:
    """The blocks of the highest sums of powers stay, over both weights; what was pruned in one stays pruned."""
    torch.manual_seed(0)
    scores = {"a": torch.rand(6, 9, dtype=torch.float64), "b": 2 * torch.rand(9, 3, dtype=torch.float64)}
    within = px.Masks({name: torch.rand(score.shape) < (0.7 if partly else 2) for name, score in scores.items()})
    sums = {
        (name, i, j): sum(
            float(score[y, x]) ** power * bool(within[name][y, x])
            for y in range(3 * i, 3 * i + 3) for x in range(3 * j, 3 * j + 3)
        )
        for name, score in scores.items() for i in range(score.shape[0] // 3) for j in range(score.shape[1] // 3)
    }  # fmt: skip
    assert len(sums) == 9
    best = sorted(sums, key=lambda block: -sums[block])[:4]  # 5 of 9 go: 0.55 of 9 is 4.95
    found = Blocks(3, power).choose(scores, 0.55, within=within)
    for name, score in scores.items():
        for y in range(score.shape[0]):
            for x in range(score.shape[1]):
                assert bool(found[name][y, x]) == (((name, y // 3, x // 3) in best) and bool(within[name][y, x]))


def test_a_criterion_says_how_its_scores_add_up_in_blocks() -> None:
    """Magnitude compares sums of squares."""
    model = build("hf vit")
    masks = px.prune(model, [], px.Magnitude(), sparsity=0.5, scope="block:4", progress=False)
    squares = {name: weight.detach().square() for name, weight in model.named_parameters() if name in masks}
    assert masks == Blocks(4, power=1).choose(squares, 0.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: as_scope("block:1"), px.InvalidArgumentError, "a block has 2 × 2 weights or more"),
        (lambda: Blocks(2.5), px.InvalidArgumentError, "a block has 2 × 2"),
        (lambda: as_scope("block:x"), px.InvalidArgumentError, "Unknown scope 'block:x'.*'block:b, such as block:32'"),
        (lambda: pruned("hf vit", "block:5"), px.TargetError, r"cannot be divided into blocks of 5 × 5: .*attention"),
        (lambda: pruned("hf vit", "block:4096"), px.TargetError, "no prunable linear layer has 4096 inputs"),
        (lambda: pruned("timm resnet", "block:4"), px.TargetError, "no prunable linear.*for convolutions another"),
        (lambda: px.select({"a": torch.rand(4, 4, 3)}, sparsity=0.5, scope="block:2"), px.TargetError, "a .4, 4, 3"),
        (lambda: px.prune(build("hf vit"), [images(2)], px.GraSP(), sparsity=0.5, scope="block:4"),
         px.InvalidArgumentError, "GraSP rank weights and cannot be added up to those of blocks"),
    ],
)  # fmt: skip
def test_bad_blocks(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def pruned(name: str, scope: str) -> px.Masks:
    return px.prune(build(name), [], px.Magnitude(), sparsity=0.5, scope=scope, progress=False)


def test_units_cannot_be_chosen_from_scores_alone() -> None:
    with pytest.raises(px.InvalidArgumentError, match=r"scores alone do not tell\. Use px\.prune"):
        px.select({"a": torch.rand(4, 4)}, sparsity=0.5, scope="structured")
