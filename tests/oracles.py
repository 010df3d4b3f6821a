"""What each op rule must give, computed the slow and obvious way in float64.

A row is an operation, its input, its parameters, and two oracles: the coefficients that h and that g
multiply path sums by, as a function from path sums to path sums. Where one stream carries both
readings the oracle is `active`, by default g after h.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]
"""(path sums, value x, parameters) -> path sums"""


@dataclass
class Row:
    name: str
    rule: str
    op: Callable[[Tensor, dict[str, Tensor]], Tensor]
    shape: tuple[int, ...]
    h: Map
    g: Map
    active: Map | None = None
    parameters: dict[str, tuple[int, ...]] = field(default_factory=dict)
    positive: bool = False

    def expected(self, reading: str, s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        if reading == "H":
            return self.h(s, x, p)
        if reading == "G":
            return self.g(s, x, p)
        if self.active is not None:
            return self.active(s, x, p)
        return self.g(self.h(s, x, p), x, p)


def same(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return s


def pointwise(gate: Callable[[float], float]) -> Map:
    """Each path sum times the squared gate of its own value, one number at a time."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        gates = [gate(v) ** 2 for v in x.flatten().tolist()]
        return s * torch.tensor(gates, dtype=torch.float64).view(x.shape)

    return apply


def product(weight: Callable[[dict[str, Tensor]], Tensor]) -> Map:
    """s [.., i] -> Σ_i w[o, i] s[.., i], by loops."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        w = weight(p)
        rows = s.reshape(-1, s.shape[-1])
        out = torch.zeros(rows.shape[0], w.shape[0], dtype=torch.float64)
        for n, o, i in itertools.product(range(rows.shape[0]), range(w.shape[0]), range(w.shape[1])):
            out[n, o] += w[o, i] * rows[n, i]
        return out.view(*s.shape[:-1], w.shape[0])

    return apply


def convolution(
    weight: Callable[[dict[str, Tensor]], Tensor], stride: int = 1, padding: int = 0, groups: int = 1
) -> Map:
    """Two-dimensional convolution, one multiplication at a time."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        w = weight(p)
        n, c, height, width = s.shape
        o, ci, kh, kw = w.shape
        oh, ow = (height + 2 * padding - kh) // stride + 1, (width + 2 * padding - kw) // stride + 1
        out = torch.zeros(n, o, oh, ow, dtype=torch.float64)
        for b, k, y, z, i, dy, dx in itertools.product(*map(range, (n, o, oh, ow, ci, kh, kw))):
            row, col = y * stride + dy - padding, z * stride + dx - padding
            if 0 <= row < height and 0 <= col < width:
                channel = (k // (o // groups)) * (c // groups) + i
                out[b, k, y, z] += w[k, i, dy, dx] * s[b, channel, row, col]
        return out

    return apply


def transposed_convolution(weight: Callable[[dict[str, Tensor]], Tensor], stride: int) -> Map:
    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        w = weight(p)
        n, c, height, width = s.shape
        _, o, kh, kw = w.shape
        out = torch.zeros(n, o, (height - 1) * stride + kh, (width - 1) * stride + kw, dtype=torch.float64)
        for b, i, y, z, k, dy, dx in itertools.product(*map(range, (n, c, height, width, o, kh, kw))):
            out[b, k, y * stride + dy, z * stride + dx] += w[i, k, dy, dx] * s[b, i, y, z]
        return out

    return apply


def windows(kernel: int, stride: int, padding: int, how: str) -> Map:
    """Pooling of [N, C, H, W] over the real (not padded) entries of each window.

    ``how``: 'argmax' takes s where x is largest, 'mean' averages s, 'mean over all' divides by the
    full window, 'mean over all, squared' by its square, 'mean, squared' by the square of the real count.
    """

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, c, height, width = s.shape
        oh, ow = (height + 2 * padding - kernel) // stride + 1, (width + 2 * padding - kernel) // stride + 1
        out = torch.zeros(n, c, oh, ow, dtype=torch.float64)
        for b, k, y, z in itertools.product(*map(range, (n, c, oh, ow))):
            places = [
                (y * stride + dy - padding, z * stride + dx - padding)
                for dy in range(kernel)
                for dx in range(kernel)
                if 0 <= y * stride + dy - padding < height and 0 <= z * stride + dx - padding < width
            ]
            total = sum(float(s[b, k, i, j]) for i, j in places)
            if how == "argmax":
                i, j = max(places, key=lambda ij: float(x[b, k, ij[0], ij[1]]))
                out[b, k, y, z] = s[b, k, i, j]
            else:
                count = kernel * kernel if "over all" in how else len(places)
                out[b, k, y, z] = total / (count**2 if "squared" in how else count)
        return out

    return apply


def scaled(factor: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> Map:
    return lambda s, x, p: s * factor(x, p)


def attention(reading: str, heads: int, order: str = "qkv") -> Map:
    """softmax(QKᵀ/√d) V with q, k, v = x Wq, x Wk, x Wv; the pattern frozen. x is [N, T, C]."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, t, _ = x.shape
        d = p["q"].shape[0] // heads
        q, k = x @ p["q"].T, x @ p["k"].T
        value = (p["v"] != 0).double() if reading == "H" else p["v"] ** 2
        v = product(lambda _: value)(s, x, p)
        out = torch.zeros_like(v)
        for b, h in itertools.product(range(n), range(heads)):
            part = slice(h * d, (h + 1) * d)
            for i in range(t):
                logits = [float(q[b, i, part] @ k[b, j, part]) / math.sqrt(d) for j in range(t)]
                top = max(logits)
                weights = [math.exp(z - top) for z in logits]
                for j in range(t):
                    a = weights[j] / sum(weights)
                    coefficient = {"H": t * a * a, "G": 1 / t, "ACTIVE": a * a}[reading]
                    out[b, i, part] += coefficient * v[b, j, part]
        return out

    return apply


def statistic(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """1 / (σ² + ε), by its definition."""
    mean = x.mean(dims, keepdim=True)
    return 1 / (((x - mean) ** 2).mean(dims, keepdim=True) + eps)


def _heads(y: Tensor, heads: int) -> Tensor:
    return y.view(y.shape[0], y.shape[1], heads, -1).transpose(1, 2)


def _merge(y: Tensor) -> Tensor:
    return y.transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


def _eager(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    q, k, v = (_heads(F.linear(x, p[w]), 2) for w in "qkv")
    return _merge((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v)


def _sdpa(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    q, k, v = (_heads(F.linear(x, p[w]), 2) for w in "qkv")
    return _merge(F.scaled_dot_product_attention(q, k, v))


def _grouped(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Two heads of queries share one of keys and values."""
    q = _heads(F.linear(x, p["q"]), 2)
    k, v = (_heads(F.linear(x, p[w][:2]), 1) for w in "kv")
    return _merge(F.scaled_dot_product_attention(q, k, v, enable_gqa=True))


def grouped(reading: str) -> Map:
    """The same with keys and values repeated."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        repeated = {"q": p["q"], **{w: p[w][[0, 1, 0, 1]] for w in "kv"}}
        return attention(reading, 2)(s, x, repeated)

    return apply


def _einsum(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    q, k, v = (_heads(torch.einsum("btc,oc->bto", x, p[w]), 2) for w in "qkv")
    pattern = (torch.einsum("bhtc,bhsc->bhts", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return _merge(torch.einsum("bhts,bhsc->bhtc", pattern, v))


def _standardised(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    kernel = F.batch_norm(p["w"].reshape(1, 3, -1), None, None, training=True).reshape_as(p["w"])
    return F.conv2d(x, kernel)


def _standard(p: dict[str, Tensor]) -> Tensor:
    w = p["w"].flatten(1)
    return ((w - w.mean(1, keepdim=True)) / (w.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()).view(p["w"].shape)


def _keys_first(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The pattern on the right of the values: V (K Qᵀ)."""
    q, k, v = (_heads(F.linear(x, p[w]), 2) for w in "qkv")
    pattern = torch.matmul(k, q.mT).mul(q.shape[-1] ** -0.5).softmax(-2)
    return _merge(torch.matmul(v.mT, pattern).mT)


def _multi_head(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    layer = x.transpose(0, 1)
    out, _ = F.multi_head_attention_forward(
        layer, layer, layer, p["v"].shape[0], 2, None, None, None, None, False, 0.0, p["o"], None,
        training=False, use_separate_proj_weight=True,
        q_proj_weight=p["q"], k_proj_weight=p["k"], v_proj_weight=p["v"],
    )  # fmt: skip
    return out.transpose(0, 1)


def _then_o(mix: Map, reading: str) -> Map:
    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        o = (p["o"] != 0).double() if reading == "H" else p["o"] ** 2
        return product(lambda _: o)(mix(s, x, p), x, p)

    return apply


def _mask(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda p: (p[name] != 0).double()


def _square(name: str) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda p: p[name] ** 2


def _set(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    y = x * 1.0
    y[:, 1] = x[:, 0]
    return y


def _set_oracle(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    out = s.clone()
    out[:, 1] = s[:, 0]
    return out


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


IMAGE = (2, 4, 5, 5)
TOKENS = (2, 3, 4)
QKV = {"q": (4, 4), "k": (4, 4), "v": (4, 4)}
SQUEEZE = {"a": (4, 4)}


def _squeeze(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x * torch.sigmoid(F.linear(x.mean(1, keepdim=True), p["a"]))


def _linear_attention(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    q, k, v = F.linear(x, p["q"]).relu(), F.linear(x, p["k"]).relu(), F.linear(x, p["v"])
    return q @ (k.mT @ v)


def linear_attention(reading: str) -> Map:
    """φ(Q) (φ(K)ᵀ V): a value crosses two mixtures, of N tokens by φ(K) and of C channels by φ(Q)."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        q, k = (x @ p["q"].T).clamp(min=0), (x @ p["k"].T).clamp(min=0)
        n, t, c = q.shape
        value = (p["v"] != 0).double() if reading == "H" else p["v"] ** 2
        v = product(lambda _: value)(s, x, p)
        out = torch.zeros_like(v)
        for b, i, m, j in itertools.product(range(n), range(t), range(c), range(t)):
            gate = (q[b, i, m] * k[b, j, m]) ** 2
            out[b, i] += {"H": t * c * gate, "G": 1 / (t * c), "ACTIVE": gate}[reading] * v[b, j]
        return out

    return apply


def _talking_heads(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The logits of one head are a mixture of those of all."""
    q, k, v = (_heads(F.linear(x, p[w]), 2) for w in "qkv")
    logits = F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.eye(2, dtype=x.dtype)).permute(0, 3, 1, 2)
    return _merge((logits * q.shape[-1] ** -0.5).softmax(-1) @ v)


def _relative(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """A position term that is added to the logits, and the usual subtraction of the largest logit."""
    q, k, v = (_heads(F.linear(x, p[w]), 2) for w in "qkv")
    logits = (q @ k.mT) * q.shape[-1] ** -0.5 + 0 * (q @ torch.ones(2, 3, dtype=x.dtype))
    exponentials = (logits - logits.amax(-1, keepdim=True)).exp()
    return _merge(exponentials / exponentials.sum(-1, keepdim=True) @ v)


def _latents(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Queries that are learned, not computed from x."""
    k, v = F.linear(x, p["k"]), F.linear(x, p["v"])
    return (F.linear(p["l"] * 1.0, p["q"]) @ k.mT).softmax(-1) @ v


def _latent_sdpa(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    k, v = F.linear(x, p["k"]), F.linear(x, p["v"])
    return F.scaled_dot_product_attention(F.linear(p["l"] * 1.0, p["q"]).expand(2, -1, -1), k, v, scale=1)


def latents(reading: str) -> Map:
    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        q, k = p["l"] @ p["q"].T, x @ p["k"].T
        value = (p["v"] != 0).double() if reading == "H" else p["v"] ** 2
        v = product(lambda _: value)(s, x, p)
        t = x.shape[1]
        out = torch.zeros(x.shape[0], q.shape[0], v.shape[-1], dtype=torch.float64)
        for b, i in itertools.product(range(x.shape[0]), range(q.shape[0])):
            weights = [math.exp(float(q[i] @ k[b, j])) for j in range(t)]
            for j in range(t):
                a = weights[j] / sum(weights)
                out[b, i] += {"H": t * a * a, "G": 1 / t, "ACTIVE": a * a}[reading] * v[b, j]
        return out

    return apply


def _hand_written_norm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """RMSNorm in simple operations."""
    return p["w"] * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.1))


def _global_response_norm(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x * (norm / norm.mean(-1, keepdim=True))


def global_response(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    norm = (x**2).sum(1, keepdim=True).sqrt()
    return s * (norm / norm.mean(-1, keepdim=True)) ** 2


def _spread_and_mean(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
    return (x + mean) / variance


def extremum_of(how: str, largest: bool = True) -> Map:
    """Over the tokens of [N, T, C]."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        n, t, c = x.shape
        out = torch.zeros(n, c, dtype=torch.float64)
        for b, k in itertools.product(range(n), range(c)):
            values = [float(x[b, i, k]) if largest else -float(x[b, i, k]) for i in range(t)]
            out[b, k] = s[b, values.index(max(values)), k] if how == "taken" else s[b, :, k].mean()
        return out

    return apply


def larger(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """max(x, x with its tokens reversed)."""
    other = torch.tensor([2, 1, 0])
    return torch.where(x >= x[:, other], s, s[:, other])


def folded(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[N, 4 · 4, 9] blocks of 2 × 2 -> [N, 4, 4, 4]: each entry the sum of those laid on it."""
    out = torch.zeros(s.shape[0], 4, 4, 4, dtype=torch.float64)
    for b, c, dy, dx, y, z in itertools.product(*map(range, (s.shape[0], 4, 2, 2, 3, 3))):
        out[b, c, y + dy, z + dx] += s[b, (c * 2 + dy) * 2 + dx, y * 3 + z]
    return out


SCATTERED = torch.tensor([True, False, True, False, False, True])


def _scattered(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """Tokens 0, 2 and 5 of six are those of x."""
    return torch.zeros(2, 6, 4, dtype=x.dtype).masked_scatter(SCATTERED.view(1, 6, 1).expand(2, 6, 4), x)


def scattered(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
    nothing = torch.zeros(2, 4, dtype=s.dtype)
    return torch.stack([s[:, 0], nothing, s[:, 1], nothing, nothing, s[:, 2]], 1)


def resampled(kernel: Callable[[float], float], squared: bool) -> Map:
    """[N, C, 5, 5] -> [N, C, 10, 10]; out entry y looks at (y + 1/2)/2 - 1/2; the border is repeated."""

    def apply(s: Tensor, x: Tensor, p: dict[str, Tensor]) -> Tensor:
        matrix = torch.zeros(10, 5, dtype=torch.float64)
        for y in range(10):
            centre = (y + 0.5) / 2 - 0.5
            for i in range(-3, 9):
                matrix[y, min(max(i, 0), 4)] += kernel(abs(centre - i))
        matrix = matrix**2 if squared else matrix.abs()
        out = torch.zeros(*s.shape[:2], 10, 10, dtype=torch.float64)
        for y, z, i, j in itertools.product(range(10), range(10), range(5), range(5)):
            out[:, :, y, z] += matrix[y, i] * matrix[z, j] * s[:, :, i, j]
        return out

    return apply


def hat(d: float) -> float:
    return max(1 - d, 0.0)


def cubic(d: float, a: float = -0.75) -> float:
    """Keys (1981), with the constant that torch uses."""
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * (d**3 - 5 * d**2 + 8 * d - 4) if d < 2 else 0.0


def _copied(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return torch.ones_like(x).copy_(x)


ROWS = [
    Row("linear", "linear", lambda x, p: F.linear(x, p["w"], p["b"]), TOKENS,
        product(_mask("w")), product(_square("w")), product(_square("w")), {"w": (5, 4), "b": (5,)}),
    Row("matmul with a parameter", "matmul", lambda x, p: x @ p["w"].t(), TOKENS,
        product(_mask("w")), product(_square("w")), product(_square("w")), {"w": (5, 4)}),
    Row("conv2d", "conv", lambda x, p: F.conv2d(x, p["w"], p["b"], stride=2, padding=1), IMAGE,
        convolution(_mask("w"), 2, 1), convolution(_square("w"), 2, 1), convolution(_square("w"), 2, 1),
        {"w": (3, 4, 3, 3), "b": (3,)}),
    Row("grouped conv2d", "conv", lambda x, p: F.conv2d(x, p["w"], groups=2), IMAGE,
        convolution(_mask("w"), groups=2), convolution(_square("w"), groups=2),
        convolution(_square("w"), groups=2), {"w": (4, 2, 3, 3)}),
    Row("transposed conv2d", "conv", lambda x, p: F.conv_transpose2d(x, p["w"], stride=2), IMAGE,
        transposed_convolution(_mask("w"), 2), transposed_convolution(_square("w"), 2),
        transposed_convolution(_square("w"), 2), {"w": (4, 3, 2, 2)}),
    Row("relu", "relu", lambda x, p: F.relu(x), IMAGE, pointwise(lambda z: float(z > 0)), same),
    Row("relu method", "relu", lambda x, p: x.relu(), IMAGE, pointwise(lambda z: float(z > 0)), same),
    Row("relu6", "relu6", lambda x, p: F.relu6(4 * x / 4 * 1.0), IMAGE,
        pointwise(lambda z: min(max(z, 0), 6) / z), same),
    Row("leaky_relu", "leaky_relu", lambda x, p: F.leaky_relu(x, 0.2), IMAGE,
        pointwise(lambda z: 1.0 if z > 0 else 0.2), same),
    Row("gelu", "gelu", lambda x, p: F.gelu(x), IMAGE, pointwise(lambda z: (1 + math.erf(z / 2**0.5)) / 2), same),
    Row("gelu tanh", "gelu", lambda x, p: F.gelu(x, approximate="tanh"), IMAGE,
        pointwise(lambda z: (1 + math.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2), same),
    Row("silu", "silu", lambda x, p: F.silu(x), IMAGE, pointwise(sigmoid), same),
    Row("hardswish", "hardswish", lambda x, p: F.hardswish(x), IMAGE,
        pointwise(lambda z: min(max(z / 6 + 0.5, 0), 1)), same),
    Row("tanh", "bounded", lambda x, p: x.tanh(), IMAGE, pointwise(lambda z: math.tanh(z) / z), same),
    Row("sigmoid", "bounded", lambda x, p: torch.sigmoid(x), IMAGE,
        pointwise(lambda z: (sigmoid(z) - 0.5) / z), same),
    Row("elu", "unbounded", lambda x, p: F.elu(x), IMAGE,
        pointwise(lambda z: 1.0 if z > 0 else math.expm1(z) / z), same),
    Row("prelu", "prelu", lambda x, p: F.prelu(x, p["a"]), (2, 3),
        lambda s, x, p: s * torch.where(x > 0, 1.0, p["a"]) ** 2, same,
        lambda s, x, p: s * torch.where(x > 0, 1.0, p["a"]) ** 2, {"a": (3,)}),
    Row("batch_norm", "batch_norm", lambda x, p: F.batch_norm(x, p["m"], p["v"].abs(), p["w"], p["b"], eps=0.1), IMAGE,
        same, scaled(lambda x, p: (p["w"] ** 2 / (p["v"].abs() + 0.1)).view(1, -1, 1, 1)), None,
        {"m": (4,), "v": (4,), "w": (4,), "b": (4,)}),
    Row("batch_norm of the batch", "batch_norm", lambda x, p: F.batch_norm(x, None, None, p["w"],
        training=True), IMAGE,
        scaled(lambda x, p: statistic(x, (0, 2, 3), 1e-5)), scaled(lambda x, p: (p["w"] ** 2).view(1, -1, 1, 1)), None,
        {"w": (4,)}),
    Row("layer_norm", "layer_norm", lambda x, p: F.layer_norm(x, (4,), p["w"], p["b"], 0.1), TOKENS,
        scaled(lambda x, p: statistic(x, (-1,), 0.1)), scaled(lambda x, p: p["w"] ** 2), None, {"w": (4,), "b": (4,)}),
    Row("rms_norm", "rms_norm", lambda x, p: F.rms_norm(x, (4,), p["w"], 0.1), TOKENS,
        scaled(lambda x, p: 1 / ((x**2).mean(-1, keepdim=True) + 0.1)), scaled(lambda x, p: p["w"] ** 2), None,
        {"w": (4,)}),
    Row("group_norm", "group_norm", lambda x, p: F.group_norm(x, 2, p["w"], p["b"], 0.1), IMAGE,
        scaled(lambda x, p: torch.cat([statistic(half, (1, 2, 3), 0.1).expand_as(half) for half in x.chunk(2, 1)], 1)),
        scaled(lambda x, p: (p["w"] ** 2).view(1, -1, 1, 1)), None, {"w": (4,), "b": (4,)}),
    Row("normalize", "normalize", lambda x, p: F.normalize(x, dim=-1), TOKENS,
        scaled(lambda x, p: 1 / (x**2).sum(-1, keepdim=True)), same),
    Row("max_pool2d", "max_pool", lambda x, p: F.max_pool2d_with_indices(x, 3, 2, 1)[0], IMAGE,
        windows(3, 2, 1, "argmax"), windows(3, 2, 1, "mean"), windows(3, 2, 1, "argmax")),
    Row("max_pool2d, no indices", "indexed_max_pool", lambda x, p: F.max_pool2d(x, 3, 2, 1), IMAGE,
        windows(3, 2, 1, "argmax"), windows(3, 2, 1, "mean"), windows(3, 2, 1, "argmax")),
    Row("adaptive_max_pool2d", "adaptive_max_pool", lambda x, p: F.adaptive_max_pool2d(x, 1), IMAGE,
        windows(5, 5, 0, "argmax"), windows(5, 5, 0, "mean"), windows(5, 5, 0, "argmax")),
    Row("amax", "amax", lambda x, p: x.amax((2, 3), keepdim=True), IMAGE,
        windows(5, 5, 0, "argmax"), windows(5, 5, 0, "mean"), windows(5, 5, 0, "argmax")),
    Row("avg_pool2d", "average_pool", lambda x, p: F.avg_pool2d(x, 3, 2, 1), IMAGE,
        windows(3, 2, 1, "mean over all"), windows(3, 2, 1, "mean over all"),
        windows(3, 2, 1, "mean over all, squared")),
    Row("avg_pool2d, real entries", "average_pool",
        lambda x, p: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), IMAGE,
        windows(3, 2, 1, "mean"), windows(3, 2, 1, "mean"), windows(3, 2, 1, "mean, squared")),
    Row("adaptive_avg_pool2d", "adaptive_average_pool", lambda x, p: F.adaptive_avg_pool2d(x, 1), IMAGE,
        windows(5, 5, 0, "mean"), windows(5, 5, 0, "mean"), windows(5, 5, 0, "mean, squared")),
    Row("mean", "mean", lambda x, p: x.mean((2, 3), keepdim=True), IMAGE,
        windows(5, 5, 0, "mean"), windows(5, 5, 0, "mean"), windows(5, 5, 0, "mean, squared")),
    Row("sum", "sum_", lambda x, p: x.sum(1), TOKENS, lambda s, x, p: s.sum(1), lambda s, x, p: s.sum(1),
        lambda s, x, p: s.sum(1)),
    Row("residual sum", "add", lambda x, p: x + x.flip(1), TOKENS,
        *[lambda s, x, p: s + s[:, torch.arange(2, -1, -1)]] * 3),
    Row("sum with a constant", "add", lambda x, p: 1 - x + p["b"], TOKENS, same, same, None, {"b": (4,)}),
    Row("difference, alpha", "add", lambda x, p: torch.sub(x, x, alpha=3), TOKENS,
        lambda s, x, p: 4 * s, lambda s, x, p: 4 * s, lambda s, x, p: 10 * s),
    Row("negative", "neg", lambda x, p: -x, TOKENS, same, same),
    Row("layer scale", "mul", lambda x, p: p["w"] * x, TOKENS, same, scaled(lambda x, p: p["w"] ** 2), None,
        {"w": (4,)}),
    Row("fixed factor", "mul", lambda x, p: -3 * x, TOKENS, lambda s, x, p: 3 * s, lambda s, x, p: 3 * s),
    Row("fixed divisor", "div", lambda x, p: x / 4, TOKENS, lambda s, x, p: s / 4, lambda s, x, p: s / 4),
    Row("gated linear unit", "mul", lambda x, p: F.silu(x) * F.linear(x, p["w"]), TOKENS,
        lambda s, x, p: product(_mask("w"))(s, x, p) * (x * torch.sigmoid(x)) ** 2, product(_square("w")),
        lambda s, x, p: product(_square("w"))(s, x, p) * (x * torch.sigmoid(x)) ** 2, {"w": (4, 4)}),
    Row("squeeze and excite", "mul", _squeeze, TOKENS,
        lambda s, x, p: s * torch.sigmoid(x.mean(1, keepdim=True) @ p["a"].T) ** 2, same, None, SQUEEZE),
    Row("gate as divisor", "div", lambda x, p: x / (1 + F.linear(x, p["a"]).sigmoid()), TOKENS,
        lambda s, x, p: s / (1 + torch.sigmoid(x @ p["a"].T)) ** 2, same, None, SQUEEZE),
    Row("attention pooling", "softmax", lambda x, p: (F.linear(x, p["a"]).softmax(1) * x), TOKENS,
        lambda s, x, p: s * (x @ p["a"].T).softmax(1) ** 2, same, None, SQUEEZE),
    Row("eager attention", "matmul", _eager, TOKENS, attention("H", 2), attention("G", 2), attention("ACTIVE",
        2), QKV),
    Row("pattern on the right", "matmul", _keys_first, TOKENS,
        attention("H", 2), attention("G", 2), attention("ACTIVE", 2), QKV),
    Row("einsum attention", "einsum", _einsum, TOKENS,
        attention("H", 2), attention("G", 2), attention("ACTIVE", 2), QKV),
    Row("standardised kernel", "conv", _standardised, IMAGE, convolution(lambda p: torch.ones(3, 4, 2, 2).double()),
        convolution(lambda p: _standard(p) ** 2), convolution(lambda p: _standard(p) ** 2), {"w": (3, 4, 2, 2)}),
    Row("sdpa", "scaled_dot_product_attention", _sdpa, TOKENS,
        attention("H", 2), attention("G", 2), attention("ACTIVE", 2), QKV),
    Row("sdpa, grouped queries", "scaled_dot_product_attention", _grouped, TOKENS,
        grouped("H"), grouped("G"), grouped("ACTIVE"), QKV),
    Row("multi_head_attention_forward", "multi_head_attention_forward", _multi_head, TOKENS,
        _then_o(attention("H", 2), "H"), _then_o(attention("G", 2), "G"), _then_o(attention("ACTIVE", 2), "ACTIVE"),
        {**QKV, "o": (4, 4)}),
    Row("reshape, transpose", "move", lambda x, p: x.transpose(1, 2).reshape(2, -1), TOKENS,
        *[lambda s, x, p: torch.stack([s[:, t, c] for c in range(4) for t in range(3)], 1)] * 3),
    Row("slices", "take", lambda x, p: x[:, 0] + x.unbind(1)[1] + x.chunk(3, 1)[2][:, 0], TOKENS,
        *[lambda s, x, p: s[:, 0] + s[:, 1] + s[:, 2]] * 3),
    Row("dtype, dropout", "leave", lambda x, p: F.dropout(x.float(), 0.5, training=False).double(), TOKENS,
        same, same),
    Row("pad", "pad", lambda x, p: F.pad(x, (1, 0)), TOKENS,
        *[lambda s, x, p: torch.cat([torch.zeros(2, 3, 1).double(), s], -1)] * 3),
    Row("class token", "cat", lambda x, p: torch.cat([p["t"].expand(2, -1, -1), x], 1), TOKENS,
        *[lambda s, x, p: torch.cat([torch.zeros(2, 1, 4).double(), s], 1)] * 3, {"t": (1, 1, 4)}),
    Row("assignment", "setitem", _set, TOKENS, _set_oracle, _set_oracle, _set_oracle),
    Row("masked_fill", "masked_fill", lambda x, p: x.masked_fill(torch.tensor([True, False, False, False]),
        -9), TOKENS,
        *[lambda s, x, p: s * torch.tensor([0.0, 1, 1, 1]).double()] * 3),
    Row("interpolate", "interpolate", lambda x, p: F.interpolate(x, scale_factor=2), TOKENS,
        *[lambda s, x, p: s.repeat_interleave(2, -1)] * 3),
    Row("bias first", "addmm", lambda x, p: torch.addmm(p["b"], x.reshape(6, 4), p["w"].t()).view(2, 3, 5), TOKENS,
        product(_mask("w")), product(_square("w")), product(_square("w")), {"w": (5, 4), "b": (5,)}),
    Row("square", "power", lambda x, p: x**2, TOKENS, pointwise(lambda z: z), same),
    Row("root", "power", lambda x, p: (x * 1.0).abs().sqrt(), TOKENS, pointwise(lambda z: abs(z) ** -0.5), same),
    Row("exponential", "unbounded", lambda x, p: x.exp(), TOKENS, pointwise(lambda z: math.expm1(z) / z), same),
    Row("clamp", "unbounded", lambda x, p: x.clamp(-1, 2), TOKENS,
        pointwise(lambda z: min(max(z, -1), 2) / z), same),
    Row("RMSNorm by hand", "statistic", _hand_written_norm, TOKENS,
        scaled(lambda x, p: 1 / ((x**2).mean(-1, keepdim=True) + 0.1)), scaled(lambda x, p: p["w"] ** 2), None,
        {"w": (4,)}),
    Row("RMSNorm by hand, power", "power", lambda x, p: x * (x.square().mean(-1, keepdim=True) + 0.1).pow(-0.5),
        TOKENS, scaled(lambda x, p: 1 / ((x**2).mean(-1, keepdim=True) + 0.1)), same),
    Row("global response norm", "statistic", _global_response_norm, TOKENS, global_response, same),
    Row("var_mean", "spread_and_mean", _spread_and_mean, TOKENS,
        lambda s, x, p: (s + s.mean(-1, keepdim=True)) / x.var(-1, keepdim=True) ** 2,
        lambda s, x, p: s + s.mean(-1, keepdim=True),
        lambda s, x, p: (s + s.mean(-1, keepdim=True) / 4) / x.var(-1, keepdim=True) ** 2),
    Row("max over tokens", "extremum", lambda x, p: x.max(1).values, TOKENS,
        extremum_of("taken"), extremum_of("mean"), extremum_of("taken")),
    Row("min over tokens", "extremum", lambda x, p: x.min(dim=1, keepdim=True).values.squeeze(1), TOKENS,
        extremum_of("taken", False), extremum_of("mean"), extremum_of("taken", False)),
    Row("larger of two", "elementwise_extremum", lambda x, p: torch.maximum(x, x.flip(1)), TOKENS,
        larger, lambda s, x, p: (s + s[:, torch.tensor([2, 1, 0])]) / 2, larger),
    Row("fold", "fold", lambda x, p: F.fold(x, (4, 4), 2), (2, 16, 9), folded, folded, folded),
    Row("linear attention", "matmul", _linear_attention, TOKENS,
        linear_attention("H"), linear_attention("G"), linear_attention("ACTIVE"), QKV),
    Row("talking heads", "matmul", _talking_heads, TOKENS,
        attention("H", 2), attention("G", 2), attention("ACTIVE", 2), QKV),
    Row("relative positions, softmax by hand", "matmul", _relative, TOKENS,
        attention("H", 2), attention("G", 2), attention("ACTIVE", 2), QKV),
    Row("learned queries", "matmul", _latents, TOKENS,
        latents("H"), latents("G"), latents("ACTIVE"), {**QKV, "l": (2, 4)}),
    Row("learned queries, sdpa", "scaled_dot_product_attention", _latent_sdpa, TOKENS,
        latents("H"), latents("G"), latents("ACTIVE"), {**QKV, "l": (2, 4)}),
    Row("interpolate, bilinear", "interpolate", lambda x, p: F.interpolate(x, size=(10, 10), mode="bilinear"), IMAGE,
        resampled(hat, False), resampled(hat, False), resampled(hat, True)),
    Row("interpolate, bicubic", "interpolate", lambda x, p: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE,
        resampled(cubic, False), resampled(cubic, False), resampled(cubic, True)),
    Row("masked_scatter", "masked_scatter", _scattered, TOKENS, scattered, scattered, scattered),
    Row("addcmul", "addcmul", lambda x, p: torch.addcmul(p["b"], x, p["w"]), TOKENS, same,
        scaled(lambda x, p: p["w"] ** 2), None, {"b": (4,), "w": (4,)}),
    Row("constants of the same shape", "constant", lambda x, p: x + torch.zeros_like(x) + x.new_zeros(4), TOKENS,
        same, same),
    Row("copy", "copy", _copied, TOKENS, same, same),
    Row("where", "where", lambda x, p: torch.where(x.detach().new_ones(4) > 0, x, x.flip(1)), TOKENS, same, same),
]  # fmt: skip
