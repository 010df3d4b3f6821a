"""A user's own op rules."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import px_hf as px
from px_hf.ops import registry


class Cumulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).cumsum(-1))


def cumsum(call: Any, input: Tensor, dim: int) -> Any:
    return call.flow(lambda s: s.cumsum(dim), input)


def tables() -> tuple[Any, ...]:
    return (
        dict(registry.RULES), set(registry.SHAPE_OPS), set(registry.READS_INPUT), set(registry.GATE_OPS),
        dict(registry.DECOMPOSITIONS),
    )  # fmt: skip


@pytest.mark.parametrize("op", ["cumsum", torch.Tensor.cumsum, [torch.cumsum, torch.Tensor.cumsum]])
def test_an_added_rule_is_used(op: Any) -> None:
    model, x = Cumulated(), torch.tensor([[1.0, 2.0, 3.0]])
    with px.add_rule(op, cumsum):
        scores = px.PX(paths="active").score(model, [x], prune_head=True)
    # A path x_i -> body_ji -> every k ≥ j -> head_lk
    after = model.head.weight.detach().square().sum(0).flip(0).cumsum(0).flip(0)
    expected = model.body.weight.detach().square() * x.square() * after[:, None]
    torch.testing.assert_close(scores["body.weight"], expected)


def test_it_is_undone() -> None:
    before = tables()
    with px.add_rule("cumsum", cumsum), px.add_rule("relu", lambda call, x: None, shape=True, reads_input=True):
        assert tables() != before
    assert tables() == before
    handle = px.add_rule(F.linear, lambda call, x, w, b: call.flow(lambda s: s, x))
    assert tables() != before
    handle.remove()
    handle.remove()
    assert tables() == before
    with px.add_rule(F.multi_head_attention_forward, lambda call, *args: None):
        assert F.multi_head_attention_forward not in registry.DECOMPOSITIONS
    assert tables() == before
    with pytest.raises(px.UnsupportedOpError, match="cumsum"):
        px.PX().score(Cumulated(), [torch.ones(1, 3)])


@pytest.mark.parametrize(("op", "function", "message"), [
    ("cumsumm", cumsum, "no function or tensor method of that name"),
    (3, cumsum, "3 cannot be called"),
    ("cumsum", None, "None cannot be called"),
])  # fmt: skip
def test_bad_arguments(op: Any, function: Any, message: str) -> None:
    before = tables()
    with pytest.raises(px.InvalidArgumentError, match=message):
        px.add_rule(op, function)
    assert tables() == before


def test_the_example_runs() -> None:
    example = doctest.DocTestFinder().find(px.add_rule, "add_rule")[0]
    assert doctest.DocTestRunner().run(example).failed == 0
    assert len(example.examples) >= 4
