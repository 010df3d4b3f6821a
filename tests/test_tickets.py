"""Which weights to tune: KS against scipy, Fisher against a loop, and what every selection promises."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from networks import build, images
from scipy.stats import ks_2samp
from torch import Tensor, nn

import px_hf as px
from px_hf.controls import shuffle_rows
from px_hf.model.rows import rows
from px_hf.tickets.ks import statistics

X, Y = images(6), torch.tensor([0, 1, 2, 3, 4, 0])
BATCHES = [(X[:4], Y[:4]), (X[4:], Y[4:])]


def pilot(model: nn.Module, rate: float = 0.05, steps: int = 3) -> nn.Module:
    trained = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate)
    for _ in range(steps):
        output = trained(X)
        nn.functional.cross_entropy(getattr(output, "logits", output), Y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained


# ------------------------------------------------------------------------------------------------ KS


@pytest.mark.parametrize("d", [2, 7, 64, 301])
@pytest.mark.parametrize("ties", [False, True])
def test_d_is_that_of_scipy(d: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(d)
    before = torch.randn(9, d, generator=generator, dtype=torch.float64)
    after = before + torch.rand(9, 1, generator=generator) * torch.randn(9, d, generator=generator)
    after[0] = before[0]
    if ties:
        before, after = before.round(decimals=0), after.round(decimals=0)
    expected = [ks_2samp(a.numpy(), b.numpy(), method="asymp").statistic for a, b in zip(before, after, strict=True)]
    assert torch.allclose(statistics(before, after), torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)
    assert statistics(before, after)[0] == 0


def test_d_of_some_entries_and_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    before, after = torch.randn(5, 40), torch.randn(5, 40)
    allowed = torch.rand(5, 40) < 0.6
    allowed[2] = False
    monkeypatch.setattr("px_hf.tickets.ks._VALUES_AT_A_TIME", 80)
    found = statistics(before, after, allowed)
    for i in (0, 1, 3, 4):
        some = allowed[i]
        assert float(found[i]) == pytest.approx(ks_2samp(before[i][some].numpy(), after[i][some].numpy()).statistic)
    assert found[2] == 0


def test_d_sees_a_set_of_values_and_no_order() -> None:
    before = torch.randn(1, 50)
    assert statistics(before, before.flip(1)) == 0


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.5])
def test_the_border_is_that_of_the_asymptotic_test(alpha: float) -> None:
    """scipy's p of a D just below and above it; d is large, so that asymptotics hold."""
    d = 20_000
    border = float(px.KS(alpha).border(d))
    assert border == pytest.approx(math.sqrt(-0.5 * math.log(alpha / 2)) * math.sqrt(2 / d))
    before = torch.arange(d, dtype=torch.float64)
    for steps, below in ((math.floor(border * d) - 2, True), (math.ceil(border * d) + 2, False)):
        p = ks_2samp(before.numpy(), before.numpy() + steps - 0.5, method="asymp").pvalue
        # scipy sums the whole series, whose first term is the border
        first = 2 * math.exp(-2 * (steps / d) ** 2 * d / 2)
        assert (first > alpha) == below
        assert p == pytest.approx(first, rel=0.06)


def test_under_the_null_about_alpha_of_the_rows_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = (torch.randn(4000, 256, generator=generator) for _ in range(2))
    passed = (statistics(before, after) > px.KS(0.1).border(256)).double().mean()
    assert 0.06 < float(passed) < 0.11


def test_the_rows_that_a_pilot_has_shifted() -> None:
    model = build("hf vit")
    before = copy.deepcopy(model.state_dict())
    after = copy.deepcopy(model)
    with torch.no_grad():
        after.vit.layers[0].mlp.fc1.weight[3] += 1.0
        after.vit.embeddings.position_embeddings[0, 2] -= 1.0
        after.vit.layernorm.weight.mul_(3)
        after.classifier.weight.add_(5)
    masks = px.select_trainable(model, [], px.KS(), after=after)
    found = {name: rows(mask).any(1).nonzero().flatten().tolist() for name, mask in masks.items() if mask.any()}
    assert found == {
        "vit.layers.0.mlp.fc1.weight": [3],
        "vit.embeddings.position_embeddings": [2],
        "vit.layernorm.weight": [0],
    }
    assert masks == px.KS().select(model, after.state_dict())
    assert "classifier.weight" in px.KS().select(before, after.state_dict())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_at_most_a_fraction_and_those_furthest_above_the_border() -> None:
    before = {"a": torch.zeros(20, 64), "b": torch.zeros(64)}
    shift = torch.linspace(0, 1, 20)
    values = torch.arange(64.0).repeat(20, 1)
    before["a"], after = values, {"a": values + shift[:, None] * 64, "b": torch.zeros(64)}
    passed = rows(px.KS(0.05).select(before, after)["a"]).any(1)
    some = rows(px.KS(0.05).select(before, after, fraction=0.2)["a"]).any(1)
    assert 4 < int(passed.sum()) < 20
    assert some.nonzero().flatten().tolist() == [16, 17, 18, 19]


def test_pruned_weights_are_no_values_of_a_row() -> None:
    before, after = {"a": torch.randn(1, 400)}, {"a": torch.randn(1, 400)}
    kept = torch.arange(400)[None] < 100
    within = px.Masks({"a": kept})
    after["a"][:, :100] = before["a"][:, :100] + 10
    for state in (before, after):
        state["a"][~kept] = 0
    assert torch.equal(px.KS().select(before, after, within=within)["a"], kept)


BAD_KS = {
    "alpha of 0": (lambda m: px.KS(0.0), px.InvalidArgumentError, r"in \(0, 1\)"),
    "alpha of True": (lambda m: px.KS(True), px.InvalidArgumentError, r"in \(0, 1\)"),
    "no pilot": (lambda m: px.select_trainable(m, [], px.KS()), px.InvalidArgumentError, "after=pilot"),
    "no change": (lambda m: px.KS().select(m, m), px.TargetError, "none of .* rows passes"),
    "another model": (lambda m: px.KS().select(m, build("cnn")), px.TargetError, "do not match"),
    "NaN": (
        lambda m: px.KS().select(m, {n: p * math.nan for n, p in m.named_parameters()}),
        px.NonFiniteError,
        "NaN or infinite",
    ),
    "fraction": (lambda m: px.KS().select(m, pilot(m), fraction=0), px.InvalidArgumentError, r"in \(0, 1\]"),
}


@pytest.mark.parametrize(("call", "error", "match"), BAD_KS.values(), ids=BAD_KS)
def test_bad_input_of_ks(call: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        call(build("hf vit"))


# ------------------------------------------------------------------------------------------------ Fisher


def fisher_loop(model: nn.Module, labels: Tensor) -> dict[str, Tensor]:
    """One backward pass per image, in float64."""
    model = copy.deepcopy(model).double().eval()
    total: dict[str, Tensor] = {}
    for image, label in zip(X.double(), labels, strict=True):
        model.zero_grad()
        output = model(image[None])
        nn.functional.cross_entropy(getattr(output, "logits", output), label[None]).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = total.get(name, 0) + parameter.grad.square()
    return total


@pytest.mark.parametrize("name", ["cnn", "hf vit", "timm vit"])
def test_fisher_is_the_sum_of_squared_gradients(name: str) -> None:
    model = build(name)
    expected = fisher_loop(model, Y)
    for parameter, score in px.Fisher().score(model, BATCHES).items():
        assert torch.allclose(score.double(), expected[parameter], rtol=1e-3, atol=1e-6 * expected[parameter].max())


def test_fisher_of_the_networks_own_answers_is_the_mean_over_them() -> None:
    """Many draws against the exact expectation Σ_k p_k (∂ log p_k/∂θ)²."""
    model = build("cnn")
    p = model(X).softmax(1).double()
    exact = {name: torch.zeros(()) for name in px.Fisher().score(model, BATCHES)}
    for k in range(5):
        for i in range(len(X)):
            one = copy.deepcopy(model)
            (-one(X[i : i + 1]).log_softmax(1)[0, k]).backward()
            exact = {n: total + p[i, k].detach() * one.get_parameter(n).grad.square() for n, total in exact.items()}
    draws = [px.Fisher("model", seed=seed).score(model, BATCHES) for seed in range(20)]
    for name, expected in exact.items():
        mean = torch.stack([draw[name] for draw in draws]).double().mean(0)
        assert float(mean.sum() / expected.sum()) == pytest.approx(1, rel=0.25)


# ------------------------------------------------------------------------------------------------ rankings

RANKINGS: dict[str, Any] = {
    "px": px.PX(), "magnitude": px.Magnitude(), "fisher": px.Fisher(), "random": px.Random(),
    "talos": px.Fisher("model"), "snip": px.SNIP(),
}  # fmt: skip


@pytest.mark.parametrize("by", RANKINGS.values(), ids=RANKINGS)
@pytest.mark.parametrize("granularity", ["row", "weight"])
@pytest.mark.parametrize("lowest", [False, True])
def test_exactly_the_fraction_is_chosen(by: Any, granularity: Any, lowest: bool) -> None:
    model = build("timm vit")
    before = copy.deepcopy(model.state_dict())
    masks = px.select_trainable(model, BATCHES, by, fraction=0.25, granularity=granularity, lowest=lowest)
    if granularity == "weight":
        assert masks.kept == masks.total - round(0.75 * masks.total)
    else:
        flags = [rows(mask) for mask in masks.values()]
        assert all(torch.equal(f.any(1), f.all(1)) for f in flags)
        count = sum(len(f) for f in flags)
        assert sum(int(f.any(1).sum()) for f in flags) == count - round(0.75 * count)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_rows_are_ranked_by_their_mean_score() -> None:
    model = build("cnn")
    means = torch.cat([rows(s).double().mean(1) for s in px.Magnitude().score(model).values()])
    for lowest in (False, True):
        masks = px.select_trainable(model, [], px.Magnitude(), fraction=0.5, lowest=lowest)
        chosen = torch.cat([rows(mask).any(1) for mask in masks.values()]).nonzero().flatten()
        best = means.topk(len(chosen), largest=not lowest).indices
        assert chosen.tolist() == sorted(best.tolist())


@pytest.mark.parametrize("by", [px.Fisher(), px.KS()], ids=str)
def test_a_ticket_of_a_pruned_model_has_none_of_its_zeros(by: Any) -> None:
    model = build("hf vit")
    pruned = px.prune(model, [], px.Magnitude(), sparsity=0.8, progress=False)
    pruned.apply_(model)
    after = pilot(model, 0.5) if isinstance(by, px.KS) else None
    ticket = px.select_trainable(model, BATCHES, by, within=pruned, after=after)
    control = shuffle_rows(ticket, within=pruned)
    assert any(mask.any() for mask in ticket.values())
    for name, kept in pruned.items():
        assert not (ticket[name] & ~kept).any()
        assert not (control[name] & ~kept).any()


def test_the_random_control_has_as_many_rows_of_each_length() -> None:
    model = build("hf vit")
    ticket = px.KS(0.5).select(model, pilot(model, 0.02), fraction=0.3)

    def counts(masks: px.Masks) -> dict[int, int]:
        found: dict[int, int] = {}
        for mask in masks.values():
            found[rows(mask).shape[1]] = found.get(rows(mask).shape[1], 0) + int(rows(mask).any(1).sum())
        return found

    control = shuffle_rows(ticket, seed=1)
    assert counts(control) == counts(ticket)
    assert control.kept == ticket.kept
    assert control != ticket
    assert control == shuffle_rows(ticket, seed=1) != shuffle_rows(ticket, seed=2)


BAD = {
    "by": ({"by": "px"}, "expected a criterion"),
    "fraction of 0": ({"fraction": 0}, r"in \(0, 1\]"),
    "fraction of 2": ({"fraction": 2}, r"in \(0, 1\]"),
    "fraction as text": ({"fraction": "some"}, r"in \(0, 1\]"),
    "granularity": ({"granularity": "column"}, "'row' or 'weight'"),
    "a pilot of a ranking": ({"after": {}}, "for px.KS"),
    "KS by weights": ({"by": px.KS(), "granularity": "weight", "after": {}}, "for rankings"),
}


@pytest.mark.parametrize(("given", "match"), BAD.values(), ids=BAD)
def test_bad_input(given: dict[str, Any], match: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=match):
        px.select_trainable(build("cnn"), [], **{"by": px.Magnitude(), **given})
