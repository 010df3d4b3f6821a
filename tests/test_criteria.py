"""Every criterion: against a slow oracle in float64, and what all of them promise."""

from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import criteria_oracles as oracles
import pytest
import torch
from networks import NETWORKS, build, images
from test_processes import environment
from torch import Tensor, nn

import px_hf as px
from px_hf.criteria.grasp import place_among_floats
from px_hf.criteria.ntksap import noise
from px_hf.model.targets import prunable
from px_hf.scoring.given import Given

CRITERIA = [
    px.SNIP(),
    px.GraSP(),
    px.SynFlow(),
    px.SynFlowL2(),
    px.NTKSAP(),
    px.NTKSAP(inputs="data"),
    px.NTKTrace(),
    px.NTKTrace(probes=2),
    px.Wanda(),
    px.LAMP(),
    px.Random(densities="erk"),
    px.GemMiner(epochs=1),
    px.GemMiner(epochs=1, start="magnitude"),
    px.InstantSoup(cooks=2, steps=2),
]
"""Beside those of test_px.py: a new criterion joins by a row in one of them."""

LABELS = torch.tensor([0, 3, 1, 4, 2, 2])


def net() -> nn.Sequential:
    """Convolution, BatchNorm, pooling, linear; 5 classes."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.GELU(),
        nn.Conv2d(4, 6, 3, groups=2, bias=False), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    ).double()  # fmt: skip
    nn.init.uniform_(model[1].running_mean, -0.3, 0.3)
    nn.init.uniform_(model[1].running_var, 0.5, 2)
    return model


def data(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    x = images(6, dtype=dtype)
    return x, [(x[:4], LABELS[:4]), (x[4:], LABELS[4:])]


def some_masks(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) > 0.3 for n, p in prunable(model, True).items()}


def places(scores: dict[str, Tensor], count: int = 8) -> list[tuple[str, int]]:
    """A few weights of each layer."""
    return [(n, i) for n, s in scores.items() for i in range(0, s.numel(), max(1, s.numel() // count))]


# ------------------------------------------------------------------------------------------- oracles


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_snip(masked: bool) -> None:
    model, (x, batches) = net(), data()
    masks = some_masks(model) if masked else None
    found = px.SNIP().score(model, batches, masks=masks, prune_head=True)
    by_hand = oracles.copied(model, masks)
    for name, i in places(found):
        expected = oracles.snip(by_hand, x, LABELS, name, i)
        assert float(found[name].view(-1)[i]) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_grasp_ranks_by_weight_times_curvature_times_gradient(masked: bool) -> None:
    model, (x, batches) = net(), data()
    masks = some_masks(model) if masked else None
    found = px.GraSP().score(model, batches, masks=masks)
    by_hand = oracles.copied(model, masks)
    checked = [(n, i) for n, i in places(found, 12) if masks is None or bool(masks[n].view(-1)[i])]
    expected = [oracles.grasp(by_hand, x, LABELS, list(found), n, i) for n, i in checked]
    scores = [float(found[n].view(-1)[i]) for n, i in checked]
    assert min(expected) < 0 < max(expected)
    order = sorted(range(len(checked)), key=lambda j: expected[j])
    close = 1e-6 * max(map(abs, expected))
    for a, b in itertools.pairwise(order):
        assert scores[a] < scores[b] or expected[b] - expected[a] < close


def test_place_among_floats_keeps_every_order() -> None:
    tiny = torch.finfo(torch.float32).smallest_normal / 2**23
    largest = torch.finfo(torch.float32).max
    ordered = torch.tensor([-largest, -1.5, -1.0, -tiny, 0.0, tiny, 2 * tiny, 1.0, 1 + 2**-23, largest])
    found = place_among_floats(ordered)
    assert bool((found.diff() > 0).all())
    assert float(found.min()) >= 0
    assert float(found[4]) == float(place_among_floats(torch.tensor([-0.0]))) == 2**31
    assert found[5] - found[3] == 2  # neighbours of 0


PATHS = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)
        ),
        (4,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False),
            nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False),
        ),
        (2, 4, 4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize(("criterion", "order"), [(px.SynFlow(), 1), (px.SynFlowL2(), 2)], ids=["SynFlow", "L2"])
@pytest.mark.parametrize("name", PATHS)
def test_synflow_is_the_sum_over_explicit_paths(name: str, criterion: px.Criterion, order: int, masked: bool) -> None:
    torch.manual_seed(0)
    make, shape = PATHS[name]
    model = make().double()
    masks = some_masks(model) if masked else None
    found = criterion.score(model, [torch.randn(2, *shape, dtype=torch.float64)], masks=masks, prune_head=True)
    expected = oracles.path_sums(oracles.copied(model, masks), shape, order)
    for score, oracle in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(score, oracle, rtol=1e-10, atol=0)


@pytest.mark.parametrize("criterion", [px.SynFlow(), px.SynFlowL2()], ids=str)
def test_synflow_equals_that_of_the_network_with_batchnorm_folded(criterion: px.Criterion) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, -1, 2)
    rest = [nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)]
    model = nn.Sequential(conv, norm, *rest).double().eval()
    folded = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, norm), *copy.deepcopy(rest))
    x = [images(dtype=torch.float64)]
    for a, b in zip(criterion.score(model, x).values(), criterion.score(folded, x).values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["hf vit", "hf resnet"])
def test_synflow_l2_is_px_without_data(name: str) -> None:
    """With a dense head Eq. 9 is a constant times it, see docs/MATHEMATICS.md."""
    model, x = build(name).double(), [images(3, dtype=torch.float64)]
    one, two = px.SynFlowL2().score(model, x), px.PX().score(model, x)
    ratios = torch.cat([(two[n][s > 0] / s[s > 0]) for n, s in one.items()])
    torch.testing.assert_close(ratios, ratios[0].expand_as(ratios), rtol=1e-8, atol=0)


@pytest.mark.parametrize("kind", ["noise", "data"])
def test_ntk_sap(kind: str) -> None:
    model, (x, _) = net(), data()
    masks = some_masks(model)
    found = px.NTKSAP(inputs=kind, epsilon=0.1, seed=7).score(model, [x], masks=masks)
    by_hand = oracles.copied(model, masks)
    given = noise(x, "7:0:0:images") if kind == "noise" else x
    shifts = {n: 0.1 * noise(model.get_parameter(n), f"7:0:0:{n}") * masks[n] for n in found}
    for name, i in places(found):
        if bool(masks[name].view(-1)[i]):
            expected = oracles.ntk_sap(by_hand, given, shifts, masks, name, i)
            assert float(found[name].view(-1)[i]) == pytest.approx(expected, rel=1e-5, abs=1e-10)


def test_noise_is_standard_gaussian() -> None:
    draw = noise(torch.empty(20000), "a")
    assert abs(float(draw.mean())) < 0.03
    assert float(draw.std()) == pytest.approx(1, abs=0.03)
    assert not torch.equal(draw, noise(torch.empty(20000), "b"))


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
def test_ntk_trace(masked: bool) -> None:
    model, (x, batches) = net(), data()
    masks = some_masks(model) if masked else None
    found = px.NTKTrace().score(model, batches, masks=masks, prune_head=True)
    by_hand = oracles.copied(model, masks)
    for name, score in found.items():
        torch.testing.assert_close(score, oracles.ntk_trace(by_hand, x, name), rtol=1e-9, atol=1e-14)


def test_ntk_trace_of_one_output_is_exact_with_one_probe() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x = [images(dtype=torch.float64)]
    exact, sampled = (c.score(model, x, prune_head=True) for c in (px.NTKTrace(), px.NTKTrace(probes=1)))
    for name in exact:
        torch.testing.assert_close(sampled[name], exact[name])


def test_ntk_trace_probes_are_unbiased() -> None:
    model, (_, batches) = net(), data()
    exact, sampled = (c.score(model, batches) for c in (px.NTKTrace(), px.NTKTrace(probes=600)))
    for name in exact:
        assert float((sampled[name] - exact[name]).norm() / exact[name].norm()) < 0.06


def test_ntk_trace_does_not_depend_on_how_gradients_are_batched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (_, batches) = net(), data()
    expected = px.NTKTrace().score(model, batches)
    monkeypatch.setattr("px_hf.scoring.squared_gradients._GRADIENTS_AT_A_TIME", 1)
    monkeypatch.setattr("px_hf.scoring.masked_network._NUMBERS_AT_A_TIME", 1)
    for name, score in px.NTKTrace().score(model, batches).items():
        torch.testing.assert_close(score, expected[name])


@pytest.mark.parametrize("name", ["cnn", "hf vit", "hf resnet", "timm resnet"])
def test_wanda(name: str) -> None:
    model = build(name).double()
    masks = some_masks(model)
    x = images(3, dtype=torch.float64)
    found = px.Wanda().score(model, [x[:2], x[2:]], masks=masks)
    expected = oracles.wanda(oracles.copied(model, masks), x)
    for n, score in found.items():
        torch.testing.assert_close(score, expected[n], rtol=1e-6, atol=1e-9)


def test_wanda_with_groups_and_fused_attention() -> None:
    """Each group of a convolution has its own inputs; q, k and v of torch's attention have the same."""
    model, (x, _) = net(), data()
    score = px.Wanda().score(model, [x])["3.weight"]
    with torch.no_grad():
        inside = model.eval()[:3](x)
    for o in range(6):
        group = inside[:, 2 * (o // 3) : 2 * (o // 3) + 2]
        norms = torch.stack(
            [group[:, i, dy : dy + 2, dx : dx + 2].norm() for i in (0, 1) for dy in range(3) for dx in range(3)]
        )
        torch.testing.assert_close(score[o].flatten(), model[3].weight[o].detach().abs().flatten() * norms)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(x, x, x, need_weights=False)[0].mean(1))

    torch.manual_seed(0)
    attention = Attention().double()
    tokens = torch.randn(3, 5, 4, dtype=torch.float64)
    found = px.Wanda().score(attention, [tokens])
    expected = attention.mix.in_proj_weight.detach().abs() * tokens.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found["mix.in_proj_weight"], expected)
    identity = copy.deepcopy(attention.mix)
    with torch.no_grad():
        identity.out_proj.weight.copy_(torch.eye(4))
        identity.out_proj.bias.zero_()
        mixed = identity(tokens, tokens, tokens)[0]
    expected = attention.mix.out_proj.weight.detach().abs() * mixed.flatten(0, 1).norm(dim=0)
    torch.testing.assert_close(found["mix.out_proj.weight"], expected)


def test_wanda_prunes_every_output_alike_by_default() -> None:
    masks = px.prune(build("hf vit"), [images()], px.Wanda(), sparsity=0.5, rounds=1, progress=False)
    for mask in masks.values():
        kept = mask.flatten(1).sum(1)
        assert int(kept.max() - kept.min()) <= 1


class ByHand(nn.Module):
    """Multiplies by a weight that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x @ self.inside.weight)


def test_wanda_names_weights_whose_inputs_it_cannot_know() -> None:
    with pytest.raises(px.TargetError, match=r"inside\.weight"):
        px.Wanda().score(ByHand(), [torch.randn(2, 4)])


def test_lamp() -> None:
    model = build("cnn")
    for name, score in px.LAMP().score(model, prune_head=True).items():
        torch.testing.assert_close(score, oracles.lamp(model.get_parameter(name)), rtol=1e-12, atol=0)


def test_lamp_of_equal_weights_keeps_the_earlier() -> None:
    layer = nn.Sequential(nn.Linear(4, 1, bias=False), nn.Linear(1, 1))
    nn.init.constant_(layer[0].weight, -2)
    assert px.LAMP().score(layer)["0.weight"].tolist() == [[1, 1 / 2, 1 / 3, 1 / 4]]


def test_lamp_of_zeros_and_of_pruned_weights() -> None:
    layer = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 1))
    nn.init.zeros_(layer[0].weight)
    assert px.LAMP().score(layer)["0.weight"].tolist() == [[0, 0, 0]]
    with torch.no_grad():
        layer[0].weight.copy_(torch.tensor([[3.0, 1.0, 2.0]]))
    kept = {"0.weight": torch.tensor([[True, True, False]])}
    assert px.LAMP().score(layer, masks=kept)["0.weight"].tolist() == [[1, pytest.approx(0.1), 0]]


@pytest.mark.parametrize("sparsity", [0.3, 0.8, 0.95])
def test_erk_densities(sparsity: float) -> None:
    model = build("hf resnet")
    masks = px.prune(model, [], px.Random(densities="erk"), sparsity=sparsity, progress=False)
    expected = oracles.erk_densities({n: tuple(m.shape) for n, m in masks.items()}, 1 - sparsity)
    for name, mask in masks.items():
        assert int(mask.sum()) == pytest.approx(expected[name] * mask.numel(), abs=1.01), name
    assert max(expected.values()) > 1.3 * (1 - sparsity)
    assert masks != px.prune(model, [], px.Random(1, densities="erk"), sparsity=sparsity, progress=False)


def test_gem_miner() -> None:
    model, (_, batches) = net(), data()
    masks = some_masks(model)
    criterion = px.GemMiner(epochs=3, learning_rate=0.1, regularization=0.01)
    found = criterion.score(model, batches, masks=masks)
    expected = oracles.gem_miner(oracles.copied(model, masks), batches, list(found), epochs=3, rate=0.1, decay=0.01)
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name] * masks[name], rtol=0, atol=1e-8)
        assert float((score - score.mean()).abs().max()) > 0.1


def test_gem_miner_remembers_its_scores_between_rounds() -> None:
    model, (_, batches) = net(), data()
    criterion = px.GemMiner(epochs=1)
    mining = criterion.begin()
    first, second = (mining.score(model, batches) for _ in range(2))
    assert all(torch.equal(first[n], s) for n, s in criterion.score(model, batches).items())
    assert not any(torch.equal(first[n], s) for n, s in second.items())


def test_gem_miner_finds_a_subnetwork_that_fits_the_data() -> None:
    model, (x, batches) = build("mlp").double(), data()
    losses = {}
    for criterion in (px.GemMiner(epochs=20), px.Random()):
        masks = px.prune(model, batches, criterion, sparsity=0.6, rounds=4, progress=False)
        losses[type(criterion)] = float(oracles.loss(oracles.copied(model, dict(masks)), x, LABELS).detach())
    assert losses[px.GemMiner] < losses[px.Random] - 0.3


# ------------------------------------------------------------------------------- what all promise


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_fit_and_the_model_is_untouched(name: str, criterion: px.Criterion) -> None:
    model = build(name)
    torch.manual_seed(5)
    model.train()
    list(model.modules())[-2].eval()  # a mixture of flags must come back as it was
    parameters = dict(model.named_parameters())
    first, frozen = list(parameters)[:2]
    parameters[first].grad = torch.ones_like(parameters[first])
    parameters[frozen].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    masks = some_masks(model)
    scores = criterion.score(model, [(images(4), LABELS[:4])], masks=masks)
    assert list(scores) == list(prunable(model))
    for n, score in scores.items():
        assert score.shape == parameters[n].shape
        assert not score.requires_grad
        assert bool(torch.isfinite(score).all())
        assert bool((score >= 0).all())
        assert float(score.sum()) > 0
        assert not score[~masks[n]].any()
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    for n, value in model.state_dict().items():
        assert torch.equal(value, before[n])
    for n, p in parameters.items():
        assert p.requires_grad == (n != frozen)
        assert (p.grad is None) == (n != first)
    assert bool((parameters[first].grad == 1).all())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


GRADIENTS = [c for c in CRITERIA if not isinstance(c, (px.SynFlow, px.LAMP, px.Random))]


@pytest.mark.parametrize("criterion", GRADIENTS, ids=str)
def test_the_model_is_untouched_when_scoring_raises(criterion: px.Criterion) -> None:
    class Explodes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.last(self.norm(self.first(x)).relu_())
            raise RuntimeError("boom")

    model = Explodes().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="boom"):
        criterion.score(model, [(torch.randn(3, 4), torch.tensor([0, 1, 1]))])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("criterion", [px.PX(), px.PX(paths="active"), px.Magnitude(), *CRITERIA], ids=str)
def test_compiled_parts_change_neither_scores_nor_names(criterion: px.Criterion) -> None:
    model, (_, batches) = net(), data()
    masks = some_masks(model)
    expected = criterion.score(model, batches, masks=masks)
    model[2].compile(backend="eager")
    model[3] = torch.compile(model[3], backend="eager")
    found = criterion.score(nn.DataParallel(model), batches, masks=masks)
    assert list(found) == list(expected)
    assert all(torch.equal(score, expected[name]) for name, score in found.items())
    px.select(found, sparsity=0.5).apply_(model)


def test_a_criterion_states_its_formula_and_nothing_else() -> None:
    class Ones(px.Criterion):
        def formula(self, given: Given) -> dict[str, Tensor]:
            return {name: torch.ones_like(weight) for name, weight in given.weights().items()}

    model = net()
    masks = some_masks(model)
    found = Ones().score(model, masks=masks, prune_head=True)
    assert all(torch.equal(score, masks[name].double()) for name, score in found.items())
    assert not any("score" in vars(type(criterion)) for criterion in px.CRITERIA.values())
    with pytest.raises(NotImplementedError, match=r"Criterion states no formula"):
        px.Criterion().score(model)


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("criterion", GRADIENTS, ids=str)
@pytest.mark.parametrize("name", CONTEXTS)
def test_contexts_around_change_nothing(name: str, criterion: px.Criterion) -> None:
    model, (_, batches) = build("cnn"), data(torch.float32)
    masks = some_masks(model)
    expected = criterion.score(model, batches, masks=masks)
    with CONTEXTS[name]():
        found = criterion.score(model, batches, masks=masks)
    for name, score in found.items():
        assert torch.equal(score, expected[name])


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
def test_half_precision_models_are_scored_in_float32(criterion: px.Criterion) -> None:
    model, (_, batches) = build("timm vit"), data(torch.float32)
    scores = criterion.score(model.to(torch.bfloat16), batches)
    full = criterion.score(model.float(), batches)  # of the rounded weights
    for name, score in scores.items():
        assert score.dtype in (torch.float32, torch.float64)
        if not isinstance(criterion, (px.GraSP, px.GemMiner)):  # whose scores are places, or learnt
            assert float(score.double().sum()) == pytest.approx(float(full[name].double().sum()), rel=0.1)


@pytest.mark.parametrize("criterion", [px.SNIP(), px.GraSP(), px.NTKTrace(), px.Wanda()], ids=str)
def test_batches_only_add_up(criterion: px.Criterion) -> None:
    model, (x, batches) = net(), data()
    together = criterion.score(model, [(x, LABELS)])
    for name, score in criterion.score(model, batches).items():
        torch.testing.assert_close(score, together[name], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c.needs_labels], ids=str)
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (images(), "batch 0 has no labels.*pair"),
        ({"pixel_values": images()}, "batch 0 has no labels"),
        ((images(), ["cat"] * 6), "batch 0 has no labels"),
        ((images(), [0, 1, 2]), r"shape \(3,\); expected.*\(6,\)"),
        ((images(), LABELS.float()), r"labels of batch 0 are torch\.float32"),
        ((images(), LABELS[:3]), r"shape \(3,\); expected.*\(6,\)"),
        ((images(), LABELS + 1), r"lie in 1 to 5, but the network has classes 0 to 4"),
        ((images(), -LABELS), r"lie in -4 to 0"),
    ],
)
def test_bad_labels(batch, message: str, criterion: px.Criterion) -> None:
    with pytest.raises(px.DataError, match=message):
        criterion.score(build("mlp"), [batch])


def test_labels_of_a_mapping_are_read() -> None:
    model, (_, batches) = build("mlp"), data(torch.float32)
    expected = px.SNIP().score(model, batches)
    found = px.SNIP().score(model, [{"pixel_values": x, "labels": y} for x, y in batches])
    assert all(torch.equal(s, expected[n]) for n, s in found.items())


BAD = [
    (lambda: px.GraSP(temperature=0), "temperature=0"),
    (lambda: px.GraSP(temperature=float("nan")), "temperature=nan"),
    (lambda: px.NTKSAP(epsilon=-1), "epsilon=-1"),
    (lambda: px.NTKSAP(inputs="zeros"), "'zeros'.*'noise'"),
    (lambda: px.NTKTrace(probes=0), "probes=0"),
    (lambda: px.NTKTrace(probes=1.5), r"probes=1\.5"),
    (lambda: px.Random(densities="uniform"), "'uniform'.*'erk'"),
    (lambda: px.GemMiner(epochs=0), "epochs=0"),
    (lambda: px.InstantSoup(cooks=0), "cooks=0"),
    (lambda: px.InstantSoup(steps=True), "steps=True"),
    (lambda: px.InstantSoup(learning_rate=1.0), "learning_rate=1.0"),
    (lambda: px.GemMiner(learning_rate=0), "learning_rate=0"),
    (lambda: px.GemMiner(regularization=-1), "regularization=-1"),
    (lambda: px.GemMiner(start="ones"), "'ones'.*'uniform'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[row[1] for row in BAD])
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        make()


@pytest.mark.parametrize("criterion", GRADIENTS, ids=str)
def test_images_that_are_not_finite_are_an_error(criterion: px.Criterion) -> None:
    if criterion == px.NTKSAP():
        pytest.skip("looks at noise instead of the images")
    _, batches = data(torch.float32)
    batches[1] = (batches[1][0] * torch.nan, batches[1][1])
    with pytest.raises(px.NonFiniteError, match="batch 1 is not finite"):
        criterion.score(build("mlp"), batches)


@pytest.mark.parametrize("criterion", [px.SNIP(), px.GraSP(), px.NTKSAP(), px.NTKTrace(), px.SynFlow()], ids=str)
def test_a_head_of_zeros_is_said(criterion: px.Criterion) -> None:
    model, (_, batches) = build("hf vit"), data(torch.float32)
    nn.init.zeros_(model.classifier.weight)
    with pytest.warns(UserWarning, match="every score is 0"):
        criterion.score(model, batches)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x).relu())


@pytest.mark.parametrize("criterion", [c for c in GRADIENTS if not isinstance(c, px.Wanda)], ids=str)
def test_a_weight_that_is_not_used_stays_dense_and_is_named(criterion: px.Criterion) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 4), torch.tensor([0, 1, 1, 0]))]
    with pytest.warns(UserWarning, match=r"1 prunable weight.*stay dense.*spare\.weight"):
        masks = px.prune(Unused(), batches, criterion, sparsity=0.5, rounds=2, progress=False)
    assert list(masks) == ["used.weight"]


@pytest.mark.parametrize("name", px.CRITERIA)
@pytest.mark.parametrize("network", ["timm resnet", "hf vit"])
def test_prune_with_every_name(name: str, network: str) -> None:
    model, (_, batches) = build(network), data(torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*layer.*lost all their weights")
        masks = px.prune(model, batches, px.CRITERIA[name], sparsity=0.7, rounds=2, progress=False)
    assert masks.sparsity == pytest.approx(0.7, abs=0.01)
    assert list(masks) == list(prunable(model))


# --------------------------------------------------------------------------------------- processes

HERE = Path(__file__).parent

SCRIPT = """
import sys, warnings, torch, torch.distributed as dist
import px_hf as px
from networks import build, images
from test_criteria import CRITERIA
torch.set_num_threads(1)
px.distributed.processes()
warnings.simplefilter("ignore")
x, labels = images(7), torch.arange(7) % 5
batches = [(x[i : i + 2], labels[i : i + 2]) for i in range(0, 7, 2)]
rank = dist.get_rank() if dist.is_initialized() else 0
for i, criterion in enumerate(CRITERIA):
    masks = px.prune(build(sys.argv[2]), batches, criterion, sparsity=0.7, rounds=2, progress=False)
    masks.save(f"{sys.argv[1]}/{rank}/{i}.safetensors")
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("network", "counts"),
    [
        ("timm vit", (2,)),
        pytest.param("timm vit", (3, 5), marks=pytest.mark.slow),
        pytest.param("hf resnet", (2, 3, 4), marks=pytest.mark.slow),
    ],
)
def test_masks_do_not_depend_on_the_number_of_processes(network: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    """Four batches over N processes; of five, one has none."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
    for n in (1, *counts):
        command = ([*run, str(n)] if n > 1 else [sys.executable]) + [str(script), str(tmp_path / str(n)), network]
        env = environment(PYTHONPATH=os.pathsep.join([str(HERE), str(HERE.parent)]))
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr
    files = sorted((tmp_path / "1" / "0").glob("*.safetensors"))
    assert len(files) == len(CRITERIA)
    for file in files:
        expected = px.Masks.load(file)
        for n in counts:
            for rank in range(n):
                assert px.Masks.load(tmp_path / str(n) / str(rank) / file.name) == expected, (n, rank, file.name)
