"""Every op rule against its oracle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import ROWS, Row
from torch import Tensor, nn

import px_hf as px
from px_hf.ops import ACTIVE, RULES, G, H, Tracer, Weight
from px_hf.ops.registry import DECOMPOSITIONS

READINGS = {"H": H, "G": G, "ACTIVE": ACTIVE}


def trace(op, x: Tensor, s: Tensor, reading, parameters: dict[str, Tensor]) -> Tensor:
    """Path sums after ``op``, for path sums ``s`` before it."""
    weights = {p: Weight(p.square() if reading.weights else p != 0) for p in parameters.values()}
    x = x.clone()
    with torch.no_grad(), Tracer(nn.Identity(), reading, weights, torch.float64) as tracer:
        tracer.start(x, s)
        paths = tracer.paths(op(x, parameters))
    assert paths is not None
    return paths.data.detach() * 2.0 ** int(paths.exponent)


def draw(row: Row) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(row.shape, generator=generator, dtype=torch.float64) * 4
    s = torch.rand(row.shape, generator=generator, dtype=torch.float64)
    parameters = {n: torch.randn(d, generator=generator, dtype=torch.float64) for n, d in row.parameters.items()}
    for p in parameters.values():  # some pruned weights
        p.flatten()[:: max(p.numel() // 3, 2)] = 0
    return x, s, parameters


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rule_equals_its_oracle(row: Row, reading: str) -> None:
    x, s, parameters = draw(row)
    found = trace(row.op, x, s, READINGS[reading], parameters)
    torch.testing.assert_close(found, row.expected(reading, s, x, parameters), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rule_is_linear_and_non_negative(row: Row, reading: str) -> None:
    x, s, parameters = draw(row)
    other = s.flip(0) ** 2
    one, two, both = (trace(row.op, x, t, READINGS[reading], parameters) for t in (s, other, s + 3 * other))
    assert bool((one >= 0).all())
    torch.testing.assert_close(both, one + 3 * two, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("op", [F.gelu, F.silu], ids=["gelu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gates_near_zero_are_their_limit(op, dtype: torch.dtype) -> None:
    """(φ(z)/z)² with φ(z) = z/2 + O(z²), where φ(z)/z as written is 0/0 or nearly so."""
    z = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e-20, -1e-6, 1e-6], dtype=dtype)
    with torch.no_grad(), Tracer(nn.Identity(), H, {}, dtype) as tracer:
        tracer.start(z, torch.ones_like(z))
        paths = tracer.paths(op(z))
    assert paths is not None
    torch.testing.assert_close(paths.data, torch.full_like(z, 0.25), rtol=3e-6, atol=0)


def test_every_rule_has_an_oracle() -> None:
    rules = {rule.__name__ for rule in RULES.values()} | {f.__name__ for f in DECOMPOSITIONS.values()}
    assert rules == {row.rule for row in ROWS}


IN_PLACE = [
    ("relu_", lambda x: x.relu_(), lambda x: x.relu()),
    ("F.relu", lambda x: F.relu(x, inplace=True), F.relu),
    ("F.silu", lambda x: F.silu(x, inplace=True), F.silu),
    ("F.silu, by place", lambda x: F.silu(x, True), F.silu),
    ("F.hardswish", lambda x: F.hardswish(x, inplace=True), F.hardswish),
    ("F.elu", lambda x: F.elu(x, 1.0, True), F.elu),
    ("sigmoid_", lambda x: x.sigmoid_(), torch.sigmoid),
    ("add_", lambda x: x.add_(x.flip(0)), lambda x: x + x.flip(0)),
    ("+=", lambda x: x.__iadd__(x.flip(0)), lambda x: x + x.flip(0)),
    ("mul_", lambda x: x.mul_(3), lambda x: x * 3),
    ("gate mul_", lambda x: (x * 1.0).mul_(x.sigmoid()), lambda x: x * x.sigmoid()),
    ("div_", lambda x: x.div_(3), lambda x: x / 3),
    ("clone first", lambda x: x.clone().add_(1), lambda x: x + 1),
]


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize(("name", "inplace", "plain"), IN_PLACE, ids=[row[0] for row in IN_PLACE])
def test_in_place_equals_out_of_place(name: str, inplace, plain, reading: str) -> None:
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    s = x.square() + 1
    found = trace(lambda x, _: inplace(x), x, s, READINGS[reading], {})
    torch.testing.assert_close(found, trace(lambda x, _: plain(x), x, s, READINGS[reading], {}))


def test_path_sums_survive_in_place_on_the_input() -> None:
    """The tensor that an in-place op changed carries the new path sums from then on."""

    def op(x: Tensor, _: dict[str, Tensor]) -> Tensor:
        x.relu_()
        return x + x

    x = torch.tensor([[-1.0, 2.0]], dtype=torch.float64)
    assert trace(op, x, torch.ones_like(x), H, {}).tolist() == [[0.0, 2.0]]


class Unruly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.odd = nn.ModuleDict({"cumulated": Cumulated()})
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.special.bessel_j0(self.odd["cumulated"](self.first(x)).relu()))


class Cumulated(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


def test_one_error_lists_all_unknown_ops_with_their_modules() -> None:
    with pytest.raises(px.UnsupportedOpError) as caught:
        px.PX().score(Unruly(), [torch.randn(2, 4)])
    message = str(caught.value)
    assert "cumsum" in message
    assert "odd.cumulated" in message
    assert "bessel_j0" in message
    assert isinstance(caught.value, NotImplementedError)


def test_a_rule_that_returns_the_wrong_shape_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, torch.cumsum, lambda call, x, *args: call.flow(lambda s: s.sum(-1), x))
    x = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match="the rule of this operation is wrong"):
        trace(lambda x, _: torch.cumsum(x, -1), x, x, H, {})
