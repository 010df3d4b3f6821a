"""select against a slow stable sort, on scores full of ties; and the edges of its arguments."""

import math
from collections.abc import Iterator
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from px_hf.errors import InvalidArgumentError, NonFiniteError, TargetError
from px_hf.masks import Masks
from px_hf.scopes import ranking
from px_hf.select import select

SCOPES = ("global", "layer", "row")

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of histograms of a few numbers each: threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def oracle(scores: dict[str, Tensor], sparsity: float, scope: str, within: Masks | None) -> Masks:
    """All weights in one Python list, sorted stably from the top; what is not within goes last."""
    kept: set[tuple[str, int]] = set()
    places_of = {name: [(name, i) for i in range(score.numel())] for name, score in scores.items()}
    layers = list(places_of.values())

    def count(places: list[tuple[str, int]]) -> int:
        return max(1, len(places) - round(Fraction(str(sparsity)) * len(places)))

    every = [place for places in layers for place in places]
    groups = {"global": [(every, count(every))], "layer": [(p, count(p)) for p in layers]}
    groups["row"] = []
    for places, score in zip(layers, scores.values(), strict=True):
        rows = score.shape[0] if score.dim() else 1
        width = len(places) // max(1, rows)
        for row in range(rows):  # dealt out one by one, as cards are
            dealt = len(range(row, count(places), rows))
            groups["row"].append((places[row * width : (row + 1) * width], dealt))
    for places, number in groups[scope]:
        names = {name for name, _ in places}
        value = {(name, i): v for name in names for i, v in enumerate(scores[name].double().flatten().tolist())}
        allowed = [p for p in places if within is None or within[p[0]].flatten()[p[1]]]
        allowed.sort(key=lambda place: -value[place])
        kept |= set(allowed[:number])
    return Masks(
        {
            name: torch.tensor([(name, i) in kept for i in range(score.numel())], dtype=torch.bool).reshape(
                score.shape
            )
            for name, score in scores.items()
        }
    )


def heavy_ties(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randint(0, 4, shape, generator=generator).to(dtype) / 8


def zeros_and_negative_zeros(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -0.0, 0.0).to(dtype)


def denormals(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return torch.randint(0, 5, shape, generator=generator).to(integer).view(dtype)


def many_magnitudes(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    exponent = torch.randint(-14, 15, shape, generator=generator).double()
    return (torch.rand(shape, generator=generator).double() * 2.0**exponent).to(dtype)


def close_neighbours(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Equal in all digits but the last."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return (
        torch.ones(shape, dtype=dtype)
        .view(integer)
        .add(torch.randint(0, 3, shape, generator=generator).to(integer))
        .view(dtype)
    )


def largest(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    limits = torch.tensor([torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    return limits[torch.randint(0, 2, shape, generator=generator)]


VALUES = [heavy_ties, zeros_and_negative_zeros, denormals, many_magnitudes, close_neighbours, largest]
DTYPES = {
    "float16": [torch.float16],
    "bfloat16": [torch.bfloat16],
    "float32": [torch.float32],
    "float64": [torch.float64],
    "16 and 32 bit": [torch.bfloat16, torch.float32, torch.float16],
    "all": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
}
SHAPES = [(3, 4, 2), (1,), (), (0, 5), (17,), (5, 2, 2, 2)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("values", VALUES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES.keys())
def test_against_a_stable_sort(dtypes, values, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    for case in range(8):
        monkeypatch.setattr(ranking, "_CHUNK", [2**20, 7, 5, 23][case % 4])
        scores = {f"layer{i}": values(generator, shape, dtypes[i % len(dtypes)]) for i, shape in enumerate(SHAPES)}
        sparsity = [0.0, 0.5, 0.9, 0.99, float(torch.rand((), generator=generator))][case % 5]
        within = (
            Masks({name: torch.rand(s.shape, generator=generator) < 0.6 for name, s in scores.items()})
            if case % 3 == 0
            else None
        )
        moved = {name: score.to(device) for name, score in scores.items()}
        for scope in SCOPES:
            found = select(moved, sparsity=sparsity, scope=scope, within=within)
            assert found == oracle(scores, sparsity, scope, within)
            assert list(found) == list(scores)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_count_is_exact_for_every_sparsity(scope: str) -> None:
    scores = {"a": torch.zeros(7, 5), "b": torch.ones(9, 5)}
    for percent in range(100):
        sparsity = percent / 100
        masks = select(scores, sparsity=sparsity, scope=scope)
        sizes = [80] if scope == "global" else [35, 45]
        assert masks.kept == sum(max(1, size - round(Fraction(percent, 100) * size)) for size in sizes)


@pytest.mark.parametrize(
    ("sparsity", "total", "pruned"),
    [
        (0.9, 5, 4),
        (0.5, 5, 2),
        (0.5, 7, 4),
        (0.7, 5, 4),
        (0.1, 5, 0),
        (0.99, 10, 9),
        (0.999999, 3, 2),
        (1e-9, 4, 0),
    ],
)
def test_halves_go_to_the_even_pruned_count_and_one_weight_stays(sparsity: float, total: int, pruned: int) -> None:
    assert total - select({"a": torch.rand(total)}, sparsity=sparsity).kept == pruned


def test_equal_scores_keep_the_earlier_place() -> None:
    masks = select({"b": torch.ones(2, 2), "a": torch.ones(2)}, sparsity=0.5)
    assert masks["b"].tolist() == [[True, True], [True, False]]
    assert masks["a"].tolist() == [False, False]


def test_place_is_row_major_whatever_the_memory_layout() -> None:
    score = torch.ones(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    assert select({"a": score}, sparsity=0.5)["a"].flatten().tolist() == [True] * 12 + [False] * 12


def test_dtypes_compare_by_value() -> None:
    third = torch.tensor([1 / 3])
    scores = {
        "half": third.half(),
        "double": third.double(),
        "float": third,
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
    }
    order = sorted(scores, key=lambda name: -scores[name].item())
    for keep in range(1, 4):
        masks = select(scores, sparsity=1 - keep / 4)
        assert {name for name in scores if masks[name].all()} == set(order[:keep])


def test_layer_scope_keeps_one_weight_of_each_tensor() -> None:
    masks = select(
        {"big": torch.rand(1000), "tiny": torch.zeros(2), "one": torch.zeros(1)}, sparsity=0.99, scope="layer"
    )
    assert [int(mask.sum()) for mask in masks.values()] == [10, 1, 1]


def test_within_only_shrinks() -> None:
    scores = {"a": torch.rand(100), "b": torch.rand(100)}
    first = select(scores, sparsity=0.5)
    reverse = {name: 1 - score for name, score in scores.items()}
    second = select(reverse, sparsity=0.8, within=first)
    assert second.kept == 40
    assert all((second[name] <= first[name]).all() for name in scores)
    assert select(reverse, sparsity=0.1, within=first) == first
    none_of_b = Masks({"a": torch.ones(100).bool(), "b": torch.zeros(100).bool()})
    layered = select(scores, sparsity=0.5, scope="layer", within=none_of_b)
    assert [int(mask.sum()) for mask in layered.values()] == [50, 0]


def test_scores_are_left_alone() -> None:
    score = torch.rand(10, requires_grad=True)
    before = score.detach().clone()
    select({"a": score}, sparsity=0.5)
    assert torch.equal(score, before)
    assert score.grad is None


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.2, float("nan"), float("inf"), "half", None, True, 90])
def test_bad_sparsity(sparsity: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"got {sparsity!r}"):
        select({"a": torch.ones(3)}, sparsity=sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ({}, InvalidArgumentError, "an entry or more"),
        ([torch.ones(3)], InvalidArgumentError, "an entry or more"),
        ({"a": torch.ones(0)}, InvalidArgumentError, "at least one weight"),
        ({"a": torch.ones(3).long()}, InvalidArgumentError, "'a' must be a float tensor, got torch.int64"),
        ({"a": [1.0]}, InvalidArgumentError, "'a' must be a float tensor, got list"),
        (
            {"a": torch.ones(3), "b": torch.tensor([1, -2.0])},
            InvalidArgumentError,
            "1 of the 2 scores of 'b' .* -2",
        ),
        ({"a": torch.ones(3), "b": torch.tensor([math.nan, 1])}, NonFiniteError, "1 of the 2 scores of 'b'"),
        ({"a": torch.tensor([math.inf]), "b": torch.ones(2)}, NonFiniteError, "1 of the 1 scores of 'a'"),
        ({"a": torch.tensor([-math.inf, math.nan])}, NonFiniteError, "2 of the 2 scores of 'a'"),
        ({"a": torch.tensor([math.inf], dtype=torch.float16)}, NonFiniteError, "'a'"),
    ],
)
def test_bad_scores(scores, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        select(scores, sparsity=0.5)


def test_bad_scores_are_found_where_nothing_may_be_kept() -> None:
    within = Masks({"a": torch.tensor([True, False])})
    with pytest.raises(NonFiniteError, match="'a'"):
        select({"a": torch.tensor([1.0, math.nan])}, sparsity=0.5, within=within)


def test_unknown_scope() -> None:
    with pytest.raises(InvalidArgumentError, match="'block', expected one of 'global', 'layer'"):
        select({"a": torch.ones(3)}, sparsity=0.5, scope="block")


@pytest.mark.parametrize(
    ("within", "error"),
    [
        (Masks({"a": torch.ones(3).bool()}), TargetError),
        (Masks({"a": torch.ones(4).bool(), "b": torch.ones(2).bool()}), TargetError),
        (
            Masks({"a": torch.ones(3).bool(), "b": torch.ones(2).bool(), "c": torch.ones(2).bool()}),
            TargetError,
        ),
        ({"a": torch.ones(3).bool(), "b": torch.ones(2).bool()}, InvalidArgumentError),
    ],
)
def test_within_of_other_weights(within, error: type[Exception]) -> None:
    with pytest.raises(error, match="within"):
        select({"a": torch.ones(3), "b": torch.ones(2)}, sparsity=0.5, within=within)
