"""Criteria the slow, obvious way, in float64: on a copy of the model whose weights are set one by one."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Mapping
from fractions import Fraction

import torch
import torch.nn.functional as F
from path_enumeration import enumerate_paths
from torch import Tensor, nn


def copied(model: nn.Module, masks: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A copy in float64 and eval mode, its pruned weights at zero."""
    model = copy.deepcopy(model).double().eval()
    for name, p in model.named_parameters():
        if masks and name in masks:
            p.data.mul_(masks[name])
    return model


def derivative(objective: Callable[[], float], weight: Tensor, index: int, step: float) -> float:
    """∂objective/∂weight[index] by central differences."""
    flat = weight.data.view(-1)
    before = float(flat[index])
    flat[index] = before + step
    above = objective()
    flat[index] = before - step
    below = objective()
    flat[index] = before
    return (above - below) / (2 * step)


def loss(model: nn.Module, images: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy, summed over examples one by one."""
    total = torch.zeros((), dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        logits = model(image[None])[0] / temperature
        total = total - logits[label] + torch.logsumexp(logits, 0)
    return total


def snip(model: nn.Module, images: Tensor, labels: Tensor, name: str, index: int) -> float:
    """|θ ∂L/∂θ|, the slope of the loss in the weight's mask."""
    weight = model.get_parameter(name)
    slope = derivative(lambda: float(loss(model, images, labels).detach()), weight, index, 1e-5)
    return abs(slope * float(weight.detach().view(-1)[index]))


def grasp(model: nn.Module, images: Tensor, labels: Tensor, names: list[str], name: str, index: int) -> float:
    """θ ∂/∂θ (‖g‖²/2) = θ (H g)."""
    weights = [model.get_parameter(n) for n in names]

    def half_norm() -> float:
        gradients = torch.autograd.grad(loss(model, images, labels, temperature=200.0), weights)
        return sum(float(g.square().sum()) for g in gradients) / 2

    weight = model.get_parameter(name)
    return derivative(half_norm, weight, index, 1e-4) * float(weight.detach().view(-1)[index])


def ntk_sap(
    model: nn.Module, images: Tensor, shifts: Mapping[str, Tensor], masks: Mapping[str, Tensor], name: str, index: int
) -> float:
    """|∂/∂m ‖f(θ ⊙ m) − f((θ + Δ) ⊙ m)‖²| at the given images and Δ."""
    original = {n: model.get_parameter(n).detach().clone() for n in shifts}
    m = {n: masks[n].double().clone() for n in shifts}

    def distance() -> float:
        outputs = []
        for factor in (0, 1):
            for n in shifts:
                model.get_parameter(n).data.copy_((original[n] + factor * shifts[n]) * m[n])
            with torch.no_grad():
                outputs.append(model(images))
        for n in shifts:
            model.get_parameter(n).data.copy_(original[n])
        return float((outputs[0] - outputs[1]).square().sum())

    return abs(derivative(distance, m[name], index, 1e-5))


def ntk_trace(model: nn.Module, images: Tensor, name: str) -> Tensor:
    """θ² Σ_n Σ_k (∂f_k/∂θ)², one backward pass for each n and k."""
    weight = model.get_parameter(name)
    total = torch.zeros_like(weight)
    for image in images:
        for k in range(model(image[None]).shape[1]):
            (gradient,) = torch.autograd.grad(model(image[None])[0, k], weight)
            total += gradient**2
    return (weight**2 * total).detach()


def path_sums(model: nn.Sequential, shape: tuple[int, ...], order: int) -> list[Tensor]:
    """For every weight, Σ over the paths through it of the product of |θ|^order on them."""
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    values = [(layer.weight.detach().abs() ** order).flatten().tolist() for layer in layers]
    found = [[0.0] * len(v) for v in values]
    for _, path in enumerate_paths(model, shape):
        product = math.prod(values[depth][w] for depth, w, _ in path)
        for depth, w, _ in path:
            found[depth][w] += product
    return [
        torch.tensor(f, dtype=torch.float64).view(layer.weight.shape) for f, layer in zip(found, layers, strict=True)
    ]


def wanda(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """|W_ij| ‖X_j‖ with the inputs that hooks saw; those of a convolution are the columns of unfold."""
    found: dict[str, Tensor] = {}

    def watch(name: str, module: nn.Module) -> None:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].double()
            weight = module.weight.detach().double()
            if isinstance(module, nn.Linear):
                columns = x.reshape(-1, x.shape[-1])
            else:
                unfolded = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
                columns = unfolded.transpose(1, 2).reshape(-1, unfolded.shape[1])
            norms = torch.stack([columns[:, j].norm() for j in range(columns.shape[1])])
            rows = weight.reshape(len(weight), -1)
            found[f"{name}.weight"] = torch.stack([row.abs() * norms for row in rows]).view(weight.shape)

        module.register_forward_pre_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            watch(name, module)
    with torch.no_grad():
        model(images)
    return found


def lamp(weight: Tensor) -> Tensor:
    """W[u]² over the sum of all W[v]² that are not smaller; no two weights may be equal."""
    return _shares([Fraction(w) ** 2 for w in weight.flatten().tolist()]).view(weight.shape)


def shares(amounts: Tensor) -> Tensor:
    """Each amount over the sum of all that are not smaller; no two may be equal, except 0."""
    return _shares([Fraction(a) for a in amounts.flatten().tolist()]).view(amounts.shape)


def _shares(amounts: list[Fraction]) -> Tensor:
    found = [float(u / sum(v for v in amounts if v >= u)) if u else 0.0 for u in amounts]
    return torch.tensor(found, dtype=torch.float64)


def erk_densities(shapes: Mapping[str, tuple[int, ...]], density: float) -> dict[str, float]:
    """Layers whose share would exceed 1 are made dense, and the rest shared out again, until none does."""
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    dense: set[str] = set()
    while True:
        budget = density * sum(sizes.values()) - sum(sizes[n] for n in dense)
        epsilon = budget / sum(raw[n] * sizes[n] for n in raw if n not in dense)
        over = {n for n in raw if n not in dense and epsilon * raw[n] > 1}
        if not over:
            return {n: 1.0 if n in dense else epsilon * raw[n] for n in raw}
        dense |= {max(over, key=lambda n: raw[n])}


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p: Tensor) -> Tensor:
        return (p > 0.5).to(p)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient


def gem_miner(
    model: nn.Module, batches: list[tuple[Tensor, Tensor]], names: list[str], *, epochs: int, rate: float, decay: float
) -> dict[str, Tensor]:
    """Adam written out, on a model whose BatchNorm is in train mode."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
    p, mean, square, step = {}, {}, {}, 0
    for name in names:
        generator = torch.Generator().manual_seed(zlib.crc32(f"0:{name}".encode()))
        p[name] = torch.rand(model.get_parameter(name).shape, generator=generator).double()
        mean[name], square[name] = torch.zeros_like(p[name]), torch.zeros_like(p[name])
    weights = {name: model.get_parameter(name).detach().clone() for name in names}
    for _ in range(epochs):
        for images, labels in batches:
            leaves = {name: p[name].clone().requires_grad_() for name in names}
            replaced = {name: weights[name] * _Straight.apply(leaves[name]) for name in names}
            logits = torch.func.functional_call(model, replaced, (images,))
            step += 1
            fit = sum(torch.logsumexp(row, 0) - row[y] for row, y in zip(logits, labels, strict=True)) / len(labels)
            penalty = decay * sum((leaf**2).sum() for leaf in leaves.values())
            gradients = torch.autograd.grad(fit + penalty, list(leaves.values()))
            for name, gradient in zip(names, gradients, strict=True):
                mean[name] = 0.9 * mean[name] + 0.1 * gradient
                square[name] = 0.999 * square[name] + 0.001 * gradient**2
                size = (square[name] / (1 - 0.999**step)).sqrt() + 1e-8
                p[name] = (p[name] - rate * mean[name] / (1 - 0.9**step) / size).clamp(0, 1)
    return p
