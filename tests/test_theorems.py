"""What holds for PX, exactly, and what does not. The proofs are in docs/MATHEMATICS.md.

Small networks in float64, against explicit Jacobians, explicit paths and other ways to write the same
network. Names of tests are quoted by that page.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import path_enumeration
import pytest
import timm
import torch
import torch.nn.functional as F
from networks import build, images, sizes
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from transformers import ViTConfig, ViTForImageClassification

import px_hf as px

PATHS = ["all", "active"]


class Residual(nn.Module):
    """A bias-free ResNet: an identity shortcut, then one with a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.a1, self.a2 = nn.Conv2d(4, 3, 3, padding=1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.b1, self.b2 = nn.Conv2d(4, 3, 3, 2, 1, bias=False), nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(4, 5, 1, 2, bias=False)
        self.fc = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.a2(self.a1(x).relu())).relu()
        x = (self.shortcut(x) + self.b2(self.b1(x).relu())).relu()
        out: Tensor = self.fc(x.mean((2, 3)))
        return out


class Transformer(nn.Module):
    """One bias-free block with RMSNorm, two heads and GELU; ``frozen`` holds every gate at its value.

    Without biases and centring the frozen network equals the network at x, and is linear in each weight.
    """

    def __init__(self, frozen: bool = False, norm: str = "rms") -> None:
        super().__init__()
        self.frozen, self.norm = frozen, norm
        names = {"embed": (4, 3), "q": (4, 4), "k": (4, 4), "v": (4, 4), "o": (4, 4), "fc1": (5, 4), "fc2": (4, 5)}
        for name, (rows, columns) in {**names, "head": (3, 4)}.items():
            self.add_module(name, nn.Linear(columns, rows, bias=False))
        self.gain = nn.Parameter(torch.rand(4) + 0.5)

    def normalised(self, x: Tensor) -> Tensor:
        if self.norm == "layer":
            return x * x.var(-1, unbiased=False, keepdim=True).rsqrt().detach() * self.gain if self.frozen else (
                F.layer_norm(x, (4,), self.gain, eps=0)
            )  # fmt: skip
        if self.frozen:
            return x * x.square().mean(-1, keepdim=True).rsqrt().detach() * self.gain
        return F.rms_norm(x, (4,), self.gain, eps=0.0)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.frozen:
            return (q @ k.mT / 2**0.5).softmax(-1).detach() @ v
        return F.scaled_dot_product_attention(q, k, v)

    def gelu(self, z: Tensor) -> Tensor:
        return z * (F.gelu(z) / z).detach() if self.frozen else F.gelu(z)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.normalised(x)
        q, k, v = (layer(y).unflatten(-1, (2, 2)).transpose(-3, -2) for layer in (self.q, self.k, self.v))
        x = x + self.o(self.attention(q, k, v).transpose(-3, -2).flatten(-2))
        x = x + self.fc2(self.gelu(self.fc1(self.normalised(x))))
        out: Tensor = self.head(x.mean(-2))
        return out


class SqueezeExcite(nn.Module):
    """A convolution whose channels are gated by a two-layer branch of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.fc = nn.Conv2d(2, 4, 3, bias=False), nn.Linear(4, 3, bias=False)
        self.reduce, self.expand = nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.expand(F.silu(self.reduce(x.mean((2, 3))))).sigmoid()
        out: Tensor = self.fc((x * gate[:, :, None, None]).relu().mean((2, 3)))
        return out


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for below, above in itertools.pairwise(widths):
        layers += [nn.Linear(below, above, bias=False), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False),
        nn.ReLU(), nn.Flatten(), nn.Linear(8, 3, bias=False),
    )  # fmt: skip


def pooled_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 1, bias=False),
        nn.LeakyReLU(0.2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3, bias=False),
    )  # fmt: skip


def max_pooled_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp(4, 5, 6, 3), (4,)),
    "cnn": (cnn, (2, 4, 4)),
    "batchnorm, average pools": (pooled_cnn, (2, 6, 6)),
    "max-pool": (max_pooled_cnn, (2, 6, 6)),
    "resnet": (Residual, (2, 4, 4)),
    "transformer": (Transformer, (3, 3)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    construct, shape = NETWORKS[name]
    model = construct().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model, torch.randn(3, *shape, dtype=torch.float64)


def prune_some(model: nn.Module, keep: float = 0.7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {n: torch.rand(p.shape, generator=generator) < keep for n, p in model.named_parameters() if p.dim() > 1}


def zeroed(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    model = copy.deepcopy(model)
    for name, p in model.named_parameters():
        if name in masks:
            p.data.mul_(masks[name])
    return model


def flows(model: nn.Module, x: Tensor, paths: str, masks: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """∂R/∂θ² = S/θ² of every kept weight."""
    scores = px.PX(paths=paths).score(model, [x], masks=masks, prune_head=True)
    parameters = dict(model.named_parameters())
    return {n: torch.where(s > 0, s / parameters[n].detach().square(), 0.0) for n, s in scores.items()}


def total(values: dict[str, Tensor]) -> float:
    return float(sum(v.sum() for v in values.values()))


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """∂f/∂θ, [N · K, numel], by automatic differentiation."""
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
    return {n: j.reshape(-1, parameters[n].numel()) for n, j in found.items()}


def trace(model: nn.Module, x: Tensor, names: list[str], masks: dict[str, Tensor] | None = None) -> float:
    """Tr Θ = ‖∂f/∂θ‖_F² over the kept weights."""
    found = jacobians(model, x)
    kept = {n: found[n] if masks is None else found[n] * masks[n].flatten() for n in names}
    return float(sum(j.square().sum() for j in kept.values()))


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert one.keys() == two.keys()
    for name, score in one.items():
        torch.testing.assert_close(score, two[name], rtol=rtol, atol=1e-12 * float(score.max()), msg=name)


def spread(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Largest over smallest ratio of two sets of scores, minus 1: 0 where they are proportional."""
    a, b = (torch.cat([s[n].flatten() for n in one]) for s in (one, two))
    ratio = a[b > 0] / b[b > 0]
    return float(ratio.max() / ratio.min() - 1)


# --------------------------------------------------------------------- the trace and its bounds


@dataclass
class Explicit:
    """A sequential network, path by path."""

    activation: Tensor
    """J_v^f: x_in a_p of every image, class and path, [N, K, P]."""
    by_weight: Tensor
    """J_θ^v: ∂v_p/∂θ, [P, W]."""
    value: Tensor
    """v_p, [P]."""
    end: Tensor
    """Whether a path ends in a class, [K, P]."""
    theta: Tensor
    """[W]."""

    @property
    def jacobian(self) -> Tensor:
        return (self.activation @ self.by_weight).flatten(0, 1)


def explicit(model: nn.Module, x: Tensor) -> Explicit:
    assert isinstance(model, nn.Sequential)
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    weights = [layer.weight.detach().flatten() for layer in layers]
    offsets = [0, *itertools.accumulate(len(w) for w in weights)]
    gates, values = [], x
    for module in model:
        values = module(values).detach()
        if isinstance(module, nn.ReLU):
            gates.append((values > 0).double().flatten(1))
    kept = [
        (start, path)
        for start, path in path_enumeration.enumerate_paths(model, tuple(x.shape[1:]))
        if all(weights[depth][w] != 0 for depth, w, _ in path)
    ]
    classes, pixels = layers[-1].weight.shape[0], x.flatten(1)
    activation = torch.zeros(len(x), classes, len(kept), dtype=torch.float64)
    by_weight = torch.zeros(len(kept), offsets[-1], dtype=torch.float64)
    end = torch.zeros(classes, len(kept), dtype=torch.float64)
    for p, (start, path) in enumerate(kept):
        gate = torch.stack([gates[depth][:, unit] for depth, _, unit in path[:-1]]).prod(0)
        activation[:, path[-1][2], p] = pixels[:, start] * gate
        end[path[-1][2], p] = 1
        for one, (depth, w, _) in enumerate(path):
            others = [weights[d][v] for other, (d, v, _) in enumerate(path) if other != one]
            by_weight[p, offsets[depth] + w] = torch.stack(others).prod()
    theta = torch.cat(weights)
    return Explicit(activation, by_weight, by_weight @ theta / len(layers), end, theta)


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_eq6_by_explicit_path_matrices(name: str, masked: bool) -> None:
    """J_θ^f = J_v^f J_θ^v, and Tr Θ ≤ Σ ∂R/∂θ² = Σ_k h_k ‖J_θ^{v_k}‖² ≤ ‖J_v^f‖² ‖J_θ^v‖²."""
    model, x = make(name)
    masks = prune_some(model) if masked else {}
    model = zeroed(model, masks)
    paths = explicit(model, x)
    found = jacobians(model, x)
    jacobian = torch.cat([found[n] for n, _ in model.named_parameters()], 1) * (paths.theta != 0)
    torch.testing.assert_close(paths.jacobian, jacobian)

    h = paths.activation.square().sum((0, 2))
    kernel = paths.end @ paths.by_weight.square().sum(1)
    flow = total(flows(model, x, "all", masks))
    assert flow == pytest.approx(float((h * kernel).sum()), rel=1e-10)
    assert 0 < float(jacobian.square().sum()) < flow < float(h.sum() * kernel.sum())


VALUE_PATHS = {"transformer": ["embed", "v", "o", "fc1", "fc2", "head"]}
"""Weights that value paths lead through: with its gates frozen, f does not depend on the others."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_trace_is_bounded_by_the_flow(name: str, masked: bool, seed: int) -> None:
    """Tr Θ ≤ Σ_θ ∂R/∂θ², by explicit Jacobians; of the transformer, with its gates frozen."""
    model, x = make(name, seed)
    masks = prune_some(model) if masked else None
    pruned = zeroed(model, masks or {})
    if name == "transformer":
        frozen = Transformer(frozen=True).double()
        frozen.load_state_dict(pruned.state_dict())
        torch.testing.assert_close(frozen(x), pruned(x))
        pruned = frozen
    names = [f"{n}.weight" for n in VALUE_PATHS.get(name, [])] or [
        n for n, p in model.named_parameters() if p.dim() > 1
    ]
    found = flows(model, x, "all", masks)
    assert 0 < trace(pruned, x, names, masks) <= total({n: found[n] for n in names})


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_active_paths_are_the_trace_without_interference(name: str, masked: bool) -> None:
    """∂R/∂θ² = Σ_p (∂f/∂v_p · ∂v_p/∂θ)²: the diagonal of the double sum over paths in (∂f/∂θ)²."""
    model, x = make(name)
    masks = prune_some(model) if masked else {}
    model = zeroed(model, masks)
    paths = explicit(model, x)
    found = torch.cat([f.flatten() for f in flows(model, x, "active", masks).values()])
    diagonal = (paths.activation.square() @ paths.by_weight.square()).sum((0, 1))
    torch.testing.assert_close(found, diagonal)


def test_active_paths_are_the_mean_over_signs_of_the_paths() -> None:
    """Per weight: S_active(θ) = E[θ² Σ (∂f/∂θ)²], all 2^8 patterns of independent signs."""
    torch.manual_seed(0)
    model, x = mlp(2, 2, 2, 1).double(), torch.randn(5, 2, dtype=torch.float64)
    paths = explicit(model, x)
    scores = torch.zeros_like(paths.theta)
    patterns = list(itertools.product([1.0, -1.0], repeat=len(paths.value)))
    for pattern in patterns:
        sign = torch.tensor(pattern, dtype=torch.float64).unsqueeze(1)
        gradient = paths.activation @ (sign * paths.by_weight)
        scores += (paths.theta * gradient).square().sum((0, 1)) / len(patterns)
    found = px.PX(paths="active").score(model, [x], prune_head=True)
    torch.testing.assert_close(torch.cat([s.flatten() for s in found.values()]), scores)
    assert bool(scores.any())


def test_active_paths_are_the_mean_over_signs_of_the_weights() -> None:
    """The same in an MLP, where no two paths to an output use the same weights: all 2^10 patterns."""
    torch.manual_seed(0)
    model, x = mlp(2, 2, 2, 1).double(), torch.randn(5, 2, dtype=torch.float64)
    paths = explicit(model, x)
    traces = []
    for pattern in itertools.product([1.0, -1.0], repeat=len(paths.theta)):
        signs = torch.tensor(pattern, dtype=torch.float64)
        sign = torch.where(paths.by_weight != 0, signs, 1.0).prod(1, keepdim=True)
        traces.append(float((paths.activation @ (sign * paths.by_weight)).square().sum()))
    assert total(flows(model, x, "active")) == pytest.approx(sum(traces) / len(traces), rel=1e-10)


def test_signs_of_shared_weights_do_not_separate_paths() -> None:
    """Does not hold: pooled positions of a convolution use the same weights, whatever their signs."""
    model = nn.Sequential(
        nn.Conv2d(1, 1, (1, 2), bias=False), nn.Conv2d(1, 1, (1, 2), bias=False), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).double()
    x = torch.ones(1, 1, 1, 5, dtype=torch.float64)
    values = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    names = ["0.weight", "1.weight"]
    traces = []
    for pattern in itertools.product([1.0, -1.0], repeat=4):
        signed = values * torch.tensor(pattern, dtype=torch.float64)
        model[0].weight.data = signed[:2].view(1, 1, 1, 2)
        model[1].weight.data = signed[2:].view(1, 1, 1, 2)
        traces.append(trace(model, x, names))
    assert sum(traces) / len(traces) > 2 * total(flows(model, x, "active"))


@pytest.mark.parametrize(("kind", "above"), [("constructive", True), ("destructive", False)])
def test_active_paths_are_no_bound(kind: str, above: bool) -> None:
    torch.manual_seed(0)
    model, x = mlp(4, 6, 1).double(), torch.rand(2, 4, dtype=torch.float64) + 0.5
    for p in model.parameters():
        p.data.abs_()
    if kind == "destructive":  # half of the inputs nearly cancel the other half
        model[0].weight.data[:, 2:] = -0.99 * model[0].weight.data[:, :2] * x[0, :2] / x[0, 2:]
        x = x[:1]
    names = [n for n, _ in model.named_parameters()]
    interference = trace(model, x, names) / total(flows(model, x, "active")) - 1
    assert interference > 0.3 if above else interference < -0.3


# --------------------------------------------------------------------------- where the bound ends


def test_bound_of_eq6_leaves_out_paths_that_start_at_a_bias() -> None:
    """Does not hold with biases: at x = 0 no path is active, but the bias moves f."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 1, bias=False)).double()
    nn.init.ones_(model[0].bias)
    x = torch.zeros(1, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="every score is 0"):
        assert total(px.PX().score(model, [x], prune_head=True)) == 0
    assert trace(model, x, ["2.weight"]) == pytest.approx(2)


def test_bound_of_eq6_does_not_cover_a_maximum_over_unlike_units() -> None:
    """Does not hold: g averages a max-pool's window, exact only where its entries have equal path sums."""

    class Maxout(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(1, 4, bias=False), nn.Linear(1, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).amax(1, keepdim=True))
            return out

    model = Maxout().double()
    model.first.weight.data = torch.tensor([[2.0], [0.1], [0.1], [0.1]], dtype=torch.float64)
    x = torch.ones(1, 1, dtype=torch.float64)
    assert trace(model, x, ["first.weight", "last.weight"]) > 2 * total(flows(model, x, "all"))


def test_layernorm_centring_is_left_out() -> None:
    """Does not hold: the frozen network without centring is not the network, and a shift that
    LayerNorm removes changes the scores."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    model, frozen = Transformer(norm="layer").double(), Transformer(frozen=True, norm="layer").double()
    frozen.load_state_dict(model.state_dict())
    assert not torch.allclose(model(x), frozen(x), atol=1e-2)

    shifted = nn.Sequential(nn.Linear(3, 4, bias=False), nn.LayerNorm(4), nn.Linear(4, 2)).double()
    before, value = px.PX().score(shifted, [x]), shifted(x)
    shifted[0].weight.data += 3.0  # adds one constant to all four units
    torch.testing.assert_close(shifted(x), value)
    assert spread(px.PX().score(shifted, [x]), before) > 0.5


# ------------------------------------------------------------------------------------ conservation


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_every_layer_receives_all_of_r(name: str, paths: str) -> None:
    """R by its definition, from named paths."""
    model, x = make(name)
    by_path = explicit(model, x)
    data = by_path.activation.square().sum(0)  # Σ_n x² a, [K, P]
    if paths == "active":
        r = (data @ by_path.value.square()).sum()
    else:
        r = (data.sum(1) * (by_path.end @ by_path.value.square())).sum()
    for score in px.PX(paths=paths).score(model, [x], prune_head=True).values():
        assert float(score.sum()) == pytest.approx(float(r), rel=1e-10)


@pytest.mark.parametrize("paths", PATHS)
def test_cuts_of_a_residual_network_receive_all_of_r(paths: str) -> None:
    model, x = make("resnet")
    s = {n: float(v.sum()) for n, v in px.PX(paths=paths).score(model, [x], prune_head=True).items()}
    s = {n.removesuffix(".weight"): v for n, v in s.items()}
    r = s["fc"]
    assert s["stem"] == pytest.approx(r, rel=1e-12)
    assert s["shortcut"] + s["b2"] == pytest.approx(r, rel=1e-12)
    assert s["b1"] == pytest.approx(s["b2"], rel=1e-12)
    assert s["a1"] == pytest.approx(s["a2"], rel=1e-12)
    assert 0 < s["a1"] < r  # the rest passes the identity


@pytest.mark.parametrize("paths", PATHS)
def test_a_vit_conserves_flow_per_branch_and_per_head(paths: str) -> None:
    """Every matrix of a branch receives the branch's flow; each head's Q, K and V that of the head."""
    model = build("timm vit").double()
    scores = px.PX(paths=paths).score(model, [images(dtype=torch.float64)], prune_head=True)
    flow = {}
    for block in ("blocks.0.", "blocks.1."):
        q, k, v = scores[block + "attn.qkv.weight"].view(3, 2, 12, 24).sum((2, 3))
        o = scores[block + "attn.proj.weight"].sum(0).view(2, 12).sum(1)
        for part in (q, k, v):
            torch.testing.assert_close(part, o, rtol=1e-10, atol=0)
        flow[block] = float(o.sum())
        fc1, fc2 = (float(scores[f"{block}mlp.fc{i}.weight"].sum()) for i in (1, 2))
        assert fc1 == pytest.approx(fc2, rel=1e-10)
    r = float(scores["head.weight"].sum())
    assert all(0 < f < r for f in flow.values())


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize(
    ("construct", "shape", "everything", "gate"),
    [
        (Transformer, (3, 3), ("embed", "head"), ("q", "k", "v", "o")),
        (SqueezeExcite, (2, 5, 5), ("stem", "fc", "reduce", "expand"), ("reduce", "expand")),
    ],
    ids=["attention", "squeeze and excite"],
)
def test_weights_behind_a_gate_share_its_flow_and_no_other_weight_gains(
    construct: Callable[[], nn.Module],
    shape: tuple[int, ...],
    everything: tuple[str, ...],
    gate: tuple[str, ...],
    paths: str,
) -> None:
    """All paths cross the first layer as they cross the last: what feeds a gate is not counted twice."""
    torch.manual_seed(0)
    model = construct().double()
    scores = px.PX(paths=paths).score(model, [torch.randn(2, *shape, dtype=torch.float64)], prune_head=True)
    totals = {n.removesuffix(".weight"): float(s.sum()) for n, s in scores.items()}
    for group in (everything, gate):
        for name in group:
            assert totals[name] == pytest.approx(totals[group[0]], rel=1e-10), name


def test_frozen_queries_and_keys_have_no_part_in_the_trace() -> None:
    """Their scores are a policy (conservation), not part of Eq. 6."""
    model, x = make("transformer")
    frozen = Transformer(frozen=True).double()
    frozen.load_state_dict(model.state_dict())
    assert trace(frozen, x, ["q.weight", "k.weight"]) == 0
    scores = px.PX().score(model, [x])
    assert float(scores["q.weight"].sum()) == pytest.approx(float(scores["v.weight"].sum()), rel=1e-10)


# ------------------------------------------------------------------------------------ what data do


def synflow_l2(model: nn.Sequential, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """∂R/∂θ² ⊙ θ² for R = 1ᵀ |f|(1; θ²), with every activation the identity."""
    linear = nn.Sequential(*[copy.deepcopy(m) for m in model if not isinstance(m, nn.ReLU)])
    for p in linear.parameters():
        p.data.square_()
    linear(torch.ones(1, *shape, dtype=torch.float64)).sum().backward()
    squares = [p.grad * p.data for p in linear.parameters()]
    return {n: s for (n, _), s in zip(model.named_parameters(), squares, strict=True)}


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_dense_eq9_is_synflow_l2_and_masked_it_is_not(name: str) -> None:
    model, x = make(name)
    assert spread(px.PX().score(model, [x], prune_head=True), synflow_l2(model, tuple(x.shape[1:]))) < 1e-9
    masks = prune_some(model)
    masked = px.PX().score(model, [x], masks=masks, prune_head=True)
    direct = synflow_l2(zeroed(model, masks), tuple(x.shape[1:]))  # type: ignore[arg-type]
    assert spread(masked, direct) > 0.02


@pytest.mark.parametrize("name", ["mlp", "cnn", "hf resnet", "timm vit"])
def test_with_a_dense_head_data_cannot_change_the_ranking_of_eq9(name: str) -> None:
    """However the backbone is masked: a dense linear head makes h_k the same for every class."""
    model = build(name).double()
    batches = [
        [torch.randn(3, 3, sizes(name), sizes(name), generator=torch.Generator().manual_seed(s)).double()]
        for s in (1, 2)
    ]
    weights = list(px.PX().score(model, batches[0], prune_head=True))
    masks = {n: m for n, m in prune_some(model, 0.8).items() if n in weights[:-1]}
    one, two = (px.PX().score(model, b, masks=masks, prune_head=True) for b in batches)
    assert spread(one, two) < 1e-9
    one, two = (px.PX(paths="active").score(model, b, masks=masks, prune_head=True) for b in batches)
    assert spread(one, two) > 0.1


# -------------------------------------------------------------------- networks that are the same


@pytest.mark.parametrize("power", [1.0, 0.25])
@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_rescaling_relu_units(name: str, paths: str, power: float) -> None:
    """S is invariant at power 1; otherwise it scales as c^(2 (1 − power)) where the weight scales as c."""
    model, x = make(name)
    criterion = px.PX(paths=paths, power=power)
    expected = criterion.score(model, [x], prune_head=True)
    weights = list(model.parameters())
    c = torch.rand(weights[0].shape[0], dtype=torch.float64) * 3 + 0.5
    rows, columns = c.view(-1, *[1] * (weights[0].dim() - 1)), c.view(1, -1, *[1] * (weights[1].dim() - 2))
    weights[0].data *= rows
    weights[1].data /= columns
    names = [n for n, _ in model.named_parameters()]
    expected[names[0]] = expected[names[0]] * rows ** (2 * (1 - power))
    expected[names[1]] = expected[names[1]] / columns ** (2 * (1 - power))
    assert_same(criterion.score(model, [x], prune_head=True), expected)


def test_rescaling_gelu_units_changes_the_scores() -> None:
    """Does not hold: the gate of GELU is not homogeneous, nor is the function."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.GELU(), nn.Linear(5, 3, bias=False)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    before = px.PX(paths="active").score(model, [x], prune_head=True)
    model[0].weight.data *= 3
    model[2].weight.data /= 3
    assert spread(px.PX(paths="active").score(model, [x], prune_head=True), before) > 0.1


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_permuting_units(name: str, paths: str) -> None:
    model, x = make(name)
    expected = px.PX(paths=paths).score(model, [x], prune_head=True)
    weights, names = list(model.parameters()), [n for n, _ in model.named_parameters()]
    order = torch.randperm(weights[0].shape[0])
    weights[0].data = weights[0].data[order]
    weights[1].data = weights[1].data[:, order]
    expected[names[0]], expected[names[1]] = expected[names[0]][order], expected[names[1]][:, order]
    assert_same(px.PX(paths=paths).score(model, [x], prune_head=True), expected)


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_folding_the_gain_of_a_norm_into_the_next_matrix(kind: str, paths: str) -> None:
    torch.manual_seed(0)
    norm = nn.LayerNorm(4, bias=False) if kind == "layer" else nn.RMSNorm(4, eps=1e-6)
    nn.init.uniform_(norm.weight, 0.5, 2)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(3, 3, dtype=torch.float64)
    expected = px.PX(paths=paths).score(model, [x], prune_head=True)
    folded = copy.deepcopy(model)
    folded[2].weight.data *= folded[1].weight.data
    nn.init.ones_(folded[1].weight)
    assert_same(px.PX(paths=paths).score(folded, [x], prune_head=True), expected)


def test_folding_batchnorm_changes_tempered_scores() -> None:
    """Does not hold at power ≠ 1, where a weight's own size counts: folding changes it."""
    model, x = make("batchnorm, average pools")
    folded = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(model[0], model[1]), *model[2:])  # type: ignore[index]
    first = "0.weight"
    scores = [{p: px.PX(power=p).score(m, [x], prune_head=True)[first] for p in (1.0, 0.25)} for m in (model, folded)]
    torch.testing.assert_close(scores[0][1.0], scores[1][1.0], rtol=1e-9, atol=0)
    ratio = scores[0][0.25] / scores[1][0.25]
    assert float(ratio.max() / ratio.min()) > 1.2


@pytest.mark.parametrize("paths", PATHS)
def test_fused_qkv_equals_separate_projections(paths: str) -> None:
    """A timm ViT and a transformers ViT with the same weights."""
    fused = build("timm vit").double()
    config = ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, image_size=8, patch_size=4,
        num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    separate = ViTForImageClassification(config).double().eval()
    projections = ("q_proj", "k_proj", "v_proj")
    state = fused.state_dict()
    twin = {
        "vit.embeddings.cls_token": state["cls_token"],
        "vit.embeddings.position_embeddings": state["pos_embed"],
        "vit.layernorm.weight": state["norm.weight"],
        "vit.layernorm.bias": state["norm.bias"],
    }
    for kind in ("weight", "bias"):
        twin[f"vit.embeddings.patch_embeddings.projection.{kind}"] = state[f"patch_embed.proj.{kind}"]
        twin[f"classifier.{kind}"] = state[f"head.{kind}"]
        for layer in range(2):
            mine, theirs = f"vit.layers.{layer}.", f"blocks.{layer}."
            for projection, part in zip(projections, state[f"{theirs}attn.qkv.{kind}"].chunk(3), strict=True):
                twin[f"{mine}attention.{projection}.{kind}"] = part
            for one, two in PAIRS.items():
                twin[f"{mine}{one}.{kind}"] = state[f"{theirs}{two}.{kind}"]
    parameters = dict(separate.named_parameters())
    assert parameters.keys() == twin.keys()
    for name, value in twin.items():
        parameters[name].data.copy_(value)
    x = images(3, dtype=torch.float64)
    torch.testing.assert_close(separate(x).logits, fused(x))
    one, two = px.PX(paths=paths).score(separate, [x]), px.PX(paths=paths).score(fused, [x])
    for layer in range(2):
        mine, theirs = f"vit.layers.{layer}.", f"blocks.{layer}."
        stacked = torch.cat([one[f"{mine}attention.{p}.weight"] for p in projections])
        assert_same({"qkv": stacked}, {"qkv": two[f"{theirs}attn.qkv.weight"]})
        for a, b in PAIRS.items():
            if "norm" not in a:
                assert_same({a: one[f"{mine}{a}.weight"]}, {a: two[f"{theirs}{b}.weight"]})


PAIRS = {
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
"""Modules of a block: transformers' name, timm's name."""


@pytest.mark.parametrize("paths", PATHS)
def test_pointwise_convolution_equals_linear(paths: str) -> None:
    torch.manual_seed(0)
    conv = nn.Sequential(nn.Conv2d(3, 5, 1), nn.GELU(), nn.Conv2d(5, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    linear = nn.Sequential(nn.Linear(3, 5), nn.GELU(), nn.Linear(5, 4))
    for a, b in zip(linear.parameters(), conv.parameters(), strict=True):
        a.data = b.data.view(a.shape).clone()

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = linear

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.mlp(x.flatten(2).mT).mean(1)
            return out

    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    one = px.PX(paths=paths).score(conv.double(), [x], prune_head=True)
    two = px.PX(paths=paths).score(Tokens().double(), [x], prune_head=True)
    assert_same(one, {n.removeprefix("mlp."): s.view(one[n.removeprefix("mlp.")].shape) for n, s in two.items()})


@pytest.mark.parametrize("paths", PATHS)
def test_dropout_and_drop_path_do_not_count(paths: str) -> None:
    sizes = {"img_size": 8, "patch_size": 4, "depth": 2, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
    plain = build("timm vit")
    rates = {"drop_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5, "drop_path_rate": 0.5}
    dropping = timm.create_model("vit_tiny_patch16_224", **sizes, **rates).train()
    dropping.load_state_dict(plain.state_dict())
    one, two = (px.PX(paths=paths).score(m, [images()]) for m in (plain, dropping))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_batchnorm_of_the_batch_couples_its_examples() -> None:
    """Does not hold without running statistics: the score of a batch is not the sum over its examples."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5, track_running_stats=False)
    model = nn.Sequential(nn.Linear(4, 5), norm, nn.ReLU(), nn.Linear(5, 2)).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    criterion = px.PX(paths="active")
    together, parts = (total(criterion.score(model, b)) for b in ([x], [x[:3], x[3:]]))
    assert abs(together / parts - 1) > 1e-2


class Attention(nn.Module):
    """Attention that sees the first ``visible`` tokens, over the given number of tokens."""

    def __init__(self, visible: int) -> None:
        super().__init__()
        self.visible = visible
        self.q, self.k, self.v = (nn.Linear(4, 4, bias=False) for _ in range(3))
        self.o = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.arange(x.shape[1]) < self.visible
        mixed = F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), attn_mask=seen.expand(x.shape[1], -1))
        out: Tensor = self.o((x + mixed)[:, : self.visible].mean(1))
        return out


def test_queries_and_keys_gate_each_other_on_active_paths() -> None:
    """S(W_Q) and S(W_K) entry by entry: the flow through A_il, shared in proportion to the terms of Q_i² · K_l²."""
    torch.manual_seed(0)
    model = Attention(3).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    scores = px.PX(paths="active").score(model, [x], prune_head=True)
    q2, k2, v2, o2 = (p.detach().square().tolist() for p in model.parameters())
    found = {n: torch.zeros(4, 4, dtype=torch.float64) for n in ("q.weight", "k.weight")}
    steps = range(4)
    for one in x:
        query, key = model.q(one).detach(), model.k(one).detach()
        pattern = (query @ key.T / 2).softmax(1).tolist()
        square = one.square().tolist()
        for i, line in itertools.product(range(3), repeat=2):
            into = [sum(v2[d][c] * square[line][c] for c in steps) for d in steps]
            flow = sum(o2[k][d] * into[d] for k in range(3) for d in steps) * pattern[i][line] ** 2 / 9
            for name, weight, token, gate in (("q", q2, i, key[line]), ("k", k2, line, query[i])):
                terms = [[weight[d][c] * square[token][c] * float(gate[d]) ** 2 for c in steps] for d in steps]
                found[f"{name}.weight"] += flow * torch.tensor(terms, dtype=torch.float64) / sum(map(sum, terms))
    assert_same({n: scores[n] for n in found}, found)


def test_a_hidden_token_is_an_absent_one_on_active_paths_only() -> None:
    """Nothing flows through a pattern of 0; Eq. 9 counts the token in N, the number of keys."""
    torch.manual_seed(0)
    model = Attention(3).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), model(x[:, :3]))
    assert_same(*(px.PX(paths="active").score(model, [y], prune_head=True) for y in (x, x[:, :3])))
    hidden, absent = (px.PX().score(model, [y], prune_head=True) for y in (x, x[:, :3]))
    assert total(hidden) > 1.1 * total(absent)
    assert spread(hidden, absent) < 1e-9  # in g all tokens are alike, so the ranking is the same


@pytest.mark.parametrize(("padding", "same"), [(0, True), (1, False)])
def test_zero_padding_makes_the_kernel_factor_depend_on_the_image_size(padding: int, same: bool) -> None:
    """g(1, θ²) of a convolutional network with global average pooling: at borders it sums fewer weights."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=padding, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=padding, bias=False),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, bias=False),
    ).double()  # fmt: skip
    one, two = (
        px.PX().score(model, [torch.ones(1, 2, size, size, dtype=torch.float64)], prune_head=True) for size in (6, 12)
    )
    assert (spread(one, two) < 1e-9) is same


@pytest.mark.parametrize("paths", PATHS)
@pytest.mark.parametrize("name", NETWORKS)
def test_scores_are_not_negative(name: str, paths: str) -> None:
    model, x = make(name)
    for score in px.PX(paths=paths).score(model, [x], masks=prune_some(model), prune_head=True).values():
        assert bool((score >= 0).all())
        assert bool((score > 0).any())
