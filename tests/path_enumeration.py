"""PX by naming every path: the definition, for networks small enough.

A layer is a list of edges between numbered units, each with the flat index of the weight on it. Paths
are followed one by one, in plain Python floats.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

Edges = list[tuple[int, int, int]]
"""(unit below, unit above, flat index of the weight)"""


def edges_of(layer: nn.Module, shape: tuple[int, ...]) -> tuple[Edges, tuple[int, ...]]:
    """The edges of a layer on inputs of ``shape``, and the shape of its outputs."""
    if isinstance(layer, nn.Linear):
        size = layer.in_features
        return [(i, o, o * size + i) for o in range(layer.out_features) for i in range(size)], (layer.out_features,)
    assert isinstance(layer, nn.Conv2d)
    c, height, width = shape
    (kh, kw), (sh, sw), (ph, pw) = layer.kernel_size, layer.stride, layer.padding  # type: ignore[misc]
    oh, ow = (height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1
    edges: Edges = []
    for o, y, x, i, dy, dx in itertools.product(*map(range, (layer.out_channels, oh, ow, c, kh, kw))):
        row, col = y * sh + dy - ph, x * sw + dx - pw
        if 0 <= row < height and 0 <= col < width:
            weight = ((o * c + i) * kh + dy) * kw + dx
            edges.append(((i * height + row) * width + col, (o * oh + y) * ow + x, weight))
    return edges, (layer.out_channels, oh, ow)


def enumerate_paths(model: nn.Sequential, shape: tuple[int, ...]) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Every path of a bias-free ReLU network: (input unit, [(layer, weight, unit above), ...])."""
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    tables = []
    for layer in layers:
        edges, shape = edges_of(layer, shape)
        below: dict[int, list[tuple[int, int]]] = {}
        for i, o, w in edges:
            below.setdefault(i, []).append((o, w))
        tables.append(below)

    def follow(unit: int, depth: int) -> Iterator[list[tuple[int, int, int]]]:
        if depth == len(tables):
            yield []
            return
        for above, weight in tables[depth].get(unit, []):
            for rest in follow(above, depth + 1):
                yield [(depth, weight, above), *rest]

    for start in tables[0]:
        for path in follow(start, 0):
            yield start, path


def scores(model: nn.Sequential, images: Tensor, active: bool) -> list[Tensor]:
    """S(θ) of Eq. 9 (or over active paths) for every layer, summed over explicit paths."""
    layers = [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))]
    weights = [layer.weight.detach().flatten().tolist() for layer in layers]
    gates: list[list[list[bool]]] = []  # image, layer, unit: the output layer has no gate
    with torch.no_grad():
        for image in images:
            x, per_layer = image[None], []
            for module in model:
                x = module(x)
                if isinstance(module, nn.ReLU):
                    per_layer.append((x > 0).flatten().tolist())
            gates.append(per_layer)
    classes = layers[-1].out_features
    pixels = images.flatten(1).tolist()
    every_path = list(enumerate_paths(model, tuple(images.shape[1:])))

    def data(start: int, path: list[tuple[int, int, int]]) -> float:
        kept = all(weights[depth][w] != 0 for depth, w, _ in path)
        return sum(
            x[start] ** 2
            for x, gate in zip(pixels, gates, strict=True)
            if kept and all(gate[depth][unit] for depth, _, unit in path[:-1])
        )

    def value(path: list[tuple[int, int, int]]) -> float:
        product = 1.0
        for depth, w, _ in path:
            product *= weights[depth][w] ** 2
        return product

    h = [0.0] * classes
    for start, path in every_path:
        h[path[-1][2]] += data(start, path)
    found = [[0.0] * len(w) for w in weights]
    for start, path in every_path:
        share = value(path) * (data(start, path) if active else h[path[-1][2]])
        for depth, w, _ in path:
            found[depth][w] += share
    return [
        torch.tensor(row, dtype=torch.float64).view(layer.weight.shape)
        for row, layer in zip(found, layers, strict=True)
    ]
