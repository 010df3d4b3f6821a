"""PX: against path enumeration, and what every criterion promises."""

from __future__ import annotations

import copy

import criteria_oracles
import path_enumeration
import pytest
import torch
from networks import CONSERVING, NETWORKS, build, images
from torch import Tensor, nn

import px_hf as px

SMALL = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)
        ),
        (4,),
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False),
            nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 3, bias=False),
        ),
        (2, 4, 4),
    ),
}  # fmt: skip

CRITERIA = [
    px.PX(),
    px.PX(power=0.25),
    px.PX(paths="active"),
    px.PX(paths="active", power=0.25),
    px.PX(paths="active", power=0.25, balance=True),
    px.Magnitude(),
    px.Random(),
]


def prune_some(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) > 0.3 for n, p in model.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize("name", SMALL)
def test_px_equals_the_sum_over_explicit_paths(name: str, paths: str, masked: bool) -> None:
    torch.manual_seed(0)
    make, shape = SMALL[name]
    model = make().double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    masks = prune_some(model) if masked else None
    found = px.PX(paths=paths).score(model, [x[:2], x[2:]], masks=masks)
    by_hand = copy.deepcopy(model)
    for n, p in by_hand.named_parameters():
        if masks:
            p.data.mul_(masks[n])
    expected = path_enumeration.scores(by_hand, x, active=paths == "active")
    assert len(found) == len(expected)
    for score, oracle in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(score, oracle, rtol=1e-10, atol=1e-12 * float(oracle.max()))
        assert float(oracle.sum()) > 0


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("paths", ["all", "active"])
def test_balanced_scores_are_shares_of_what_is_left_of_a_layer(paths: str, masked: bool) -> None:
    torch.manual_seed(0)
    make, shape = SMALL["cnn"]
    model = make().double()
    x = torch.randn(5, *shape, dtype=torch.float64)
    masks = prune_some(model) if masked else None
    plain = px.PX(paths=paths, power=0.5).score(model, [x], masks=masks)
    found = px.PX(paths=paths, power=0.5, balance=True).score(model, [x], masks=masks)
    assert found.keys() == plain.keys()
    for name, score in found.items():
        torch.testing.assert_close(score, criteria_oracles.shares(plain[name]), rtol=1e-12, atol=0)
        assert float(score.max()) == 1


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize("name", CONSERVING)
def test_layer_totals_are_equal(name: str, paths: str) -> None:
    model = build(name).double()
    totals = [
        float(s.sum())
        for s in px.PX(paths=paths).score(model, [images(dtype=torch.float64)], prune_head=True).values()
    ]
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-10)


def test_conservation_over_the_cut_of_a_residual_network() -> None:
    """What enters a residual block leaves it: through its last convolution and through the shortcut."""
    model = build("hf resnet").double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    s = {n: float(v.sum()) for n, v in px.PX().score(model, [x], prune_head=True).items()}
    stage = "resnet.encoder.stages.1.layers.0."
    both = s[stage + "shortcut.convolution.weight"] + s[stage + "layer.1.convolution.weight"]
    assert both == pytest.approx(s["classifier.1.weight"], rel=1e-10)
    assert s["resnet.embedder.embedder.convolution.weight"] == pytest.approx(s["classifier.1.weight"], rel=1e-10)


def test_queries_and_keys_receive_the_flow_of_their_attention() -> None:
    model = build("hf vit").double()
    s = px.PX().score(model, [images(dtype=torch.float64)])
    for layer in range(2):
        name = f"vit.layers.{layer}.attention."
        flow = float(s[name + "o_proj.weight"].sum())
        for projection in ("q_proj", "k_proj", "v_proj"):
            assert float(s[f"{name}{projection}.weight"].sum()) == pytest.approx(flow, rel=1e-10)
            assert float((s[f"{name}{projection}.weight"] > 0).double().mean()) > 0.9


@pytest.mark.parametrize("paths", ["all", "active"])
def test_eager_attention_equals_sdpa(paths: str) -> None:
    model, other = build("hf vit").double(), build("hf vit, eager").double()
    other.load_state_dict(model.state_dict())
    batches = [images(dtype=torch.float64)]
    expected = px.PX(paths=paths).score(model, batches)
    for name, score in px.PX(paths=paths).score(other, batches).items():
        # transformers' eager attention takes its softmax in float32
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-8 * float(expected[name].max()))


@pytest.mark.parametrize("paths", ["all", "active"])
def test_equals_the_network_with_batchnorm_folded(paths: str) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    nn.init.uniform_(norm.weight, 0.5, 2)
    rest = [nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)]
    model = nn.Sequential(conv, norm, *rest).double().eval()
    folded = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, norm), *copy.deepcopy(rest))
    batches = [images(dtype=torch.float64)]
    one, two = px.PX(paths=paths).score(model, batches), px.PX(paths=paths).score(folded, batches)
    for a, b in zip(one.values(), two.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.max()))


@pytest.mark.parametrize("criterion", CRITERIA, ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_fit_and_the_model_is_untouched(name: str, criterion: px.Criterion) -> None:
    model = build(name)
    torch.manual_seed(5)
    model.train()
    list(model.modules())[-2].eval()  # a mixture of flags must come back as it was
    parameters = dict(model.named_parameters())
    next(iter(parameters.values())).grad = torch.ones_like(next(iter(parameters.values())))
    before = copy.deepcopy(model.state_dict())
    flags = [m.training for m in model.modules()]
    random_state = torch.get_rng_state()
    scores = criterion.score(model, [images(4)])
    assert scores
    for n, score in scores.items():
        assert score.shape == parameters[n].shape
        assert bool(torch.isfinite(score).all())
        assert bool((score >= 0).all())
        assert float(score.sum()) > 0
    assert flags == [m.training for m in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    for n, value in model.state_dict().items():
        assert torch.equal(value, before[n])
    for n, p in parameters.items():
        assert p.grad is None or n == next(iter(parameters))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("paths", ["all", "active"])
def test_the_model_is_untouched_when_scoring_raises(paths: str) -> None:
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
        px.PX(paths=paths).score(model, [torch.randn(3, 4)])
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    x = torch.randn(2, 4).cumsum(0)  # no mode is left behind
    assert x.shape == (2, 4)


@pytest.mark.parametrize("paths", ["all", "active"])
def test_score_of_batches_is_the_sum_over_their_examples(paths: str) -> None:
    model, x = build("timm vit").double(), images(5, dtype=torch.float64)
    together = px.PX(paths=paths).score(model, [x[:3], x[3:]])
    parts = [px.PX(paths=paths).score(model, [one[None]]) for one in x]
    for name, score in together.items():
        torch.testing.assert_close(score, sum(p[name] for p in parts), rtol=1e-9, atol=1e-12 * float(score.max()))


def test_pruned_weights_score_zero_and_masking_equals_zeroing() -> None:
    model = build("cnn")
    masks = prune_some(model)
    zeroed = copy.deepcopy(model)
    for n, p in zeroed.named_parameters():
        if n in masks:
            p.data.mul_(masks[n])
    found = px.PX(paths="active").score(model, [images()], masks=masks)
    direct = px.PX(paths="active").score(zeroed, [images()])
    for n, score in found.items():
        assert not score[~masks[n]].any()
        torch.testing.assert_close(score, direct[n])


DEPTHS = [("unit gain", 1.0), ("exploding", 30.0), ("vanishing", 1 / 30)]


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize(("kind", "gain"), DEPTHS, ids=[d[0] for d in DEPTHS])
def test_deep_networks_stay_in_range(kind: str, gain: float, paths: str) -> None:
    """200 layers of 64 units: path sums up to 10^300 and beyond, in a float32 model."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Flatten()]
    width = 3 * 64
    for _ in range(200):
        layer = nn.Linear(width, 64, bias=False)
        nn.init.normal_(layer.weight, std=gain * (2 / width) ** 0.5)
        layers += [layer, nn.LayerNorm(64), nn.ReLU()]
        width = 64
    model = nn.Sequential(*layers, nn.Linear(64, 5, bias=False))
    scores = px.PX(paths=paths).score(model, [images()])
    totals = torch.tensor([float(s.double().sum()) for s in scores.values()])
    assert bool(torch.isfinite(totals).all())
    assert float((totals / totals[0] - 1).abs().max()) < 1e-4
    assert float(totals[0]) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_scored_in_float32(dtype: torch.dtype) -> None:
    model = build("timm vit")
    full = px.PX().score(model, [images()])
    half = px.PX().score(model.to(dtype), [images()])
    for name, score in half.items():
        assert score.dtype == torch.float32
        assert float(score.sum()) == pytest.approx(float(full[name].sum()), rel=0.05)


def test_autocast_does_not_round_path_sums() -> None:
    model = build("cnn")
    plain = px.PX(paths="active").score(model, [images()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = px.PX(paths="active").score(model, [images()])
    totals = [float(s.double().sum()) for s in under.values()]
    assert all(s.dtype == torch.float32 for s in under.values())
    assert totals == pytest.approx([totals[0]] * len(totals), rel=1e-5)
    assert totals[0] == pytest.approx(float(next(iter(plain.values())).sum()), rel=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: px.PX(paths="some"), "'some'.*'all'"),
        (lambda: px.PX(balance=1), "balance=1"),
        (lambda: px.PX(power=-1), "power=-1"),
        (lambda: px.PX(power=float("nan")), "power=nan"),
    ],
)
def test_bad_settings(make, message: str) -> None:
    with pytest.raises(px.InvalidArgumentError, match=message):
        make()


def test_zero_head_is_said() -> None:
    model = build("mlp")
    nn.init.zeros_(model[-1].weight)
    with pytest.warns(UserWarning, match="every score is 0"):
        px.PX().score(model, [images()], masks=None)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.spare(x)
        return self.head(self.used(x).relu())


class LearnedBias(Unused):
    """The input of ``spare`` does not depend on the data."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x).relu() + self.spare(torch.ones(4)))


class Lost(Unused):
    """``spare`` acts on the data, but only through a statistic, which is frozen."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.used(x).relu()) / self.spare(x).norm()


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize("model", [Unused, LearnedBias])
def test_a_weight_that_no_path_can_lead_through_stays_dense_and_is_named(model: type[nn.Module], paths: str) -> None:
    with pytest.warns(UserWarning, match=r"1 prunable weight.*stay dense.*spare\.weight"):
        scores = px.PX(paths=paths).score(model(), [torch.randn(2, 4)])
    assert list(scores) == ["used.weight"]
    with pytest.warns(UserWarning, match=r"spare\.weight"):
        masks = px.prune(model(), [torch.randn(2, 4)], px.PX(paths=paths), sparsity=0.5, rounds=2, progress=False)
    assert list(masks) == ["used.weight"]


@pytest.mark.parametrize("paths", ["all", "active"])
def test_a_weight_whose_paths_are_lost_is_an_error(paths: str) -> None:
    with pytest.raises(px.TargetError, match=r"the output depends on 1 prunable weight.*spare\.weight"):
        px.PX(paths=paths).score(Lost(), [torch.randn(2, 4)])


@pytest.mark.parametrize("paths", ["all", "active"])
def test_exponents_on_the_device_give_the_same_scores(paths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator, exponents are tensors that nobody waits for."""
    model, batches = build("hf resnet"), [torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))]
    expected = px.PX(paths=paths).score(model, batches)
    monkeypatch.setattr("px_hf.ops.tracer.excess", lambda data: torch.frexp(data.detach().amax()).exponent)
    for name, score in px.PX(paths=paths).score(model, batches).items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-9 * float(expected[name].max()))


@pytest.mark.parametrize("paths", ["all", "active"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_scores_without_gradients_around(context, paths: str) -> None:
    model = build("cnn")
    expected = px.PX(paths=paths).score(model, [images()])
    with context():
        found = px.PX(paths=paths).score(model, [images() * 1])
    for name, score in found.items():
        assert torch.equal(score, expected[name])
