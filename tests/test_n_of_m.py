"""Scope "n:m" against a slow oracle on scores full of ties; and what prune promises with it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from networks import build, images, sizes
from torch import Tensor, nn

import px_hf as px
from px_hf.scopes import NOfM, n_of_m
from px_hf.select import select

SHAPES = {"linear": (3, 8), "conv": (4, 8, 3, 2), "wide": (2, 16), "conv1d": (3, 16, 1)}
VALUES = {
    "ties": lambda shape, generator: torch.randint(0, 4, shape, generator=generator).float() / 8,
    "zeros of both signs": lambda shape, generator: torch.where(torch.rand(shape, generator=generator) < 0.5, -0.0, 0),
    "all different": lambda shape, generator: torch.rand(shape, generator=generator, dtype=torch.float64),
    "half": lambda shape, generator: torch.rand(shape, generator=generator).half(),
}


def groups_of(shape: tuple[int, ...], m: int) -> list[list[tuple[int, ...]]]:
    """The indices of each group: one output, one place of the kernel, m inputs in a row."""
    outputs, inputs, *kernel = shape
    return [
        [(i, j, *place) for j in range(start, start + m)]
        for i in range(outputs)
        for start in range(0, inputs, m)
        for place in itertools.product(*map(range, kernel))
    ]


def oracle(
    scores: dict[str, Tensor], sparsity: float, n: int, m: int, within: px.Masks | None, final: bool
) -> dict[str, Tensor]:
    def allowed(name: str, index: tuple[int, ...]) -> bool:
        return within is None or bool(within[name][index])

    def best_first(places: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
        """Sorted by score, then in the order of the tensors and, within one, row-major."""
        order = {name: i for i, name in enumerate(scores)}
        return sorted(places, key=lambda place: (-abs(float(scores[place[0]][place[1]])), order[place[0]], place[1]))

    every = [
        (name, index)
        for name, score in scores.items()
        for index in itertools.product(*map(range, score.shape))
        if allowed(name, index)
    ]
    total = sum(score.numel() for score in scores.values())
    count = max(1, total - round(Fraction(str(sparsity)) * total))
    in_group = [
        place
        for name, score in scores.items()
        for group in groups_of(tuple(score.shape), m)
        for place in best_first([(name, index) for index in group if allowed(name, index)])[:n]
    ]
    if count <= total * n // m:
        kept = set(best_first(in_group)[:count])
    else:
        assert not final
        others = [place for place in every if place not in set(in_group)]
        kept = set(in_group) | set(best_first(others)[: max(0, count - len(in_group))])
    found = {name: torch.zeros(score.shape, dtype=torch.bool) for name, score in scores.items()}
    for name, index in kept:
        found[name][index] = True
    return found


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES.keys())
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 8)])
@pytest.mark.parametrize("extra", [0.0, 0.1, 0.3])
def test_against_a_slow_oracle(values, n: int, m: int, extra: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(n_of_m, "_CHUNK", 3 * m)
    generator = torch.Generator().manual_seed(0)
    scores = {name: values(shape, generator) for name, shape in SHAPES.items()}
    sparsity = round(min(0.99, 1 - n / m + extra), 4)
    some = px.Masks({name: torch.rand(s.shape, generator=generator) < 0.7 for name, s in scores.items()})
    for within in (None, some):
        found = select(scores, sparsity=sparsity, scope=f"{n}:{m}", within=within)
        assert found == px.Masks(oracle(scores, sparsity, n, m, within, final=True))
        for step in (0.0, 0.2, sparsity):
            found = NOfM(n, m).choose(scores, step, within=within, final=False)
            assert found == px.Masks(oracle(scores, step, n, m, within, final=False))


def assert_pattern(masks: px.Masks, n: int, m: int, exactly: bool) -> None:
    for mask in masks.values():
        for group in groups_of(tuple(mask.shape), m):
            kept = sum(bool(mask[index]) for index in group)
            assert kept == n if exactly else kept <= n


def test_groups_lie_along_the_input_channels() -> None:
    """Of a convolution [out, in, y, x], not along y and x; of equal scores the earlier channel is kept."""
    score = torch.arange(2 * 4 * 1 * 3.0).reshape(2, 4, 1, 3)
    mask = select({"conv": score}, sparsity=0.5, scope="2:4")["conv"]
    assert mask.equal(torch.tensor([False, False, True, True])[None, :, None, None].expand(2, 4, 1, 3))
    mask = select({"conv": torch.ones(2, 4, 1, 3)}, sparsity=0.5, scope="2:4")["conv"]
    assert mask.equal(torch.tensor([True, True, False, False])[None, :, None, None].expand(2, 4, 1, 3))


def test_groups_in_any_memory_layout() -> None:
    score = torch.rand(4, 8, 3, 3)
    masks = select({"conv": score}, sparsity=0.6, scope="2:4")
    assert masks == select({"conv": score.contiguous(memory_format=torch.channels_last)}, sparsity=0.6, scope="2:4")


CRITERIA = {
    "px": px.PX(),
    "px-active": px.PX(paths="active", power=0.25),
    "magnitude": px.Magnitude(),
    "wanda": px.Wanda(),
    "random": px.Random(),
    "synflow": px.SynFlow(),
}


@pytest.mark.parametrize("name", ["mlp", "hf vit", "hf resnet", "timm vit"])
@pytest.mark.parametrize("criterion", CRITERIA.values(), ids=CRITERIA.keys())
def test_exact_by_construction_for_any_criterion(name: str, criterion: px.Criterion) -> None:
    model = build(name)
    batches = [images(3) if sizes(name) == 8 else torch.rand(2, 3, 32, 32)]
    for rounds in (1, 3):
        masks = px.prune(model, batches, criterion, sparsity=0.5, scope="2:4", rounds=rounds, progress=False)
        assert_pattern(masks, 2, 4, exactly=True)
        assert masks.sparsity == 0.5
    masks = px.prune(model, batches, criterion, sparsity=0.8, scope="2:4", rounds=3, progress=False)
    assert_pattern(masks, 2, 4, exactly=False)
    assert masks.total - masks.kept == round(0.8 * masks.total)
    densities = {float(mask.float().mean()) for mask in masks.values()}
    assert len(densities) > 1  # the budget beyond the pattern is spent over all layers


def test_rounds_only_shrink_and_keep_the_best_of_each_group() -> None:
    seen: list[dict[str, Tensor]] = []

    class Watched(px.SynFlow):
        def score(self, model, batches, *, masks=None, prune_head=False):
            seen.append({} if masks is None else dict(masks))
            return super().score(model, batches, masks=masks, prune_head=prune_head)

    last = px.prune(build("hf vit"), [images(2)], Watched(), sparsity=0.5, scope="1:2", rounds=4, progress=False)
    steps = [*seen[1:], dict(last.items())]
    total = last.total
    for t, (before, after) in enumerate(itertools.pairwise(steps), start=2):
        assert all(bool((after[name] <= before[name]).all()) for name in after)
        assert sum(int(mask.sum()) for mask in after.values()) == total - round(total * (1 - 0.5 ** (t / 4)))
    for step in steps:
        for mask in step.values():
            assert bool((mask.unflatten(1, (-1, 2)).sum(2) >= 1).all())


def test_layers_with_fewer_inputs_than_m_stay_dense() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),  # 3 colours
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),  # depthwise
        nn.ReLU(),
        nn.Conv2d(8, 8, 1, groups=2),  # 4 inputs for each output
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    masks = px.prune(model, [images(2)], px.PX(), sparsity=0.5, scope="2:4", rounds=3, progress=False)
    assert list(masks) == ["4.weight", "7.weight"]
    assert masks.sparsity == 0.5
    assert px.report(model, masks).weights == 8 * 4 + 5 * 8


@pytest.mark.parametrize(
    ("model", "scope", "sparsity", "error", "message"),
    [
        (nn.Linear(6, 5), "2:4", 0.5, px.TargetError, r"whole groups of 4: weight \[5, 6\]"),
        (build("cnn"), "2:4", 0.5, px.TargetError, r"2 weights .*3\.weight \[6, 6, 3, 3\]"),
        (nn.Conv2d(3, 8, 3), "2:4", 0.5, px.TargetError, "No prunable weight has 4 inputs"),
        (nn.ConvTranspose2d(8, 8, 3), "2:4", 0.5, px.TargetError, "transposed convolutions: weight"),
        (nn.Linear(8, 5), "2:4", 0.4, px.InvalidArgumentError, r"0\.4 is less than scope='2:4'.* Use 0\.5 "),
        (nn.Linear(8, 5), "1:8", 0.5, px.InvalidArgumentError, r"Use 0\.875"),
        (nn.Linear(8, 5), "4:2", 0.5, px.InvalidArgumentError, "'4:2'.* 0 < n < m"),
        (nn.Linear(8, 5), "4:4", 0.5, px.InvalidArgumentError, "0 < n < m"),
        (nn.Linear(8, 5), "0:4", 0.5, px.InvalidArgumentError, "0 < n < m"),
        (nn.Linear(8, 5), "2:4:8", 0.5, px.InvalidArgumentError, "'n:m, such as 2:4'"),
        (nn.Linear(8, 5), "two:four", 0.5, px.InvalidArgumentError, "'n:m, such as 2:4'"),
        (nn.Linear(8, 5), "-2:4", 0.5, px.InvalidArgumentError, "'n:m, such as 2:4'"),
    ],
)
def test_bad_input_is_refused_before_any_work(model, scope, sparsity, error, message) -> None:
    class Untouched(px.Magnitude):
        def score(self, *args, **kwargs):
            raise AssertionError("scored")

    with pytest.raises(error, match=message):
        px.prune(model, [], Untouched(), sparsity=sparsity, scope=scope, progress=False)


def test_select_refuses_what_is_no_pattern() -> None:
    with pytest.raises(px.InvalidArgumentError, match="less than scope"):
        select({"a": torch.rand(4, 8)}, sparsity=0.4, scope="2:4")
    with pytest.raises(px.TargetError, match=r"b \[8\]"):
        select({"a": torch.rand(4, 8), "b": torch.rand(8)}, sparsity=0.5, scope="2:4")


@pytest.mark.parametrize(("n", "m"), [(1, 3), (2, 3), (1, 7), (5, 6)])
def test_fractions_that_floats_miss(n: int, m: int) -> None:
    masks = select({"a": torch.rand(50, 42)}, sparsity=1 - n / m, scope=f"{n}:{m}")
    assert masks.kept * m == masks.total * n


def test_parse() -> None:
    found = [NOfM.parse(text) for text in ("2:4", "global", "a:b", "16:32")]
    assert found == [NOfM(2, 4), None, None, NOfM(16, 32)]
