"""The linear layers and convolutions that a network calls, seen where it calls them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..ops.registry import DECOMPOSITIONS

_CONVOLUTIONS = {F.conv1d, F.conv2d, F.conv3d}
_CHUNK = 2**24
"""Numbers of an unfolded input at a time."""


@dataclass(frozen=True)
class LayerCall:
    """One product ``op(input, weight) + bias``: a linear layer or a convolution of G groups (1 for linear).

    Attributes:
        name: of the weight.
        input: as the operation got it.
        bias: as the operation got it, or None.
        output: what it returned.
        geometry: padding, stride, dilation, groups of a convolution; None for a linear layer.
    """

    name: str
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    output: Tensor
    geometry: Geometry | None

    def rows(self) -> Iterator[tuple[Tensor, slice]]:
        """Inputs [G, n, d] such that output = rows · weightᵀ, a chunk of the first dimension of `input` at a time.

        With each chunk comes the slice of the first dimension of `input` that it is made of.
        """
        input = self.input
        if self.geometry is None:
            yield input.reshape(1, -1, input.shape[-1]), slice(None)
            return
        images = input if input.dim() == self.weight.dim() else input[None]
        each = self.output[0].numel() // self.weight.shape[0] * self.weight[0].numel() * self.geometry.groups
        step = max(1, _CHUNK // max(1, each))
        for start in range(0, len(images), step):
            part = slice(start, start + step)
            yield self.geometry.unfold(images[part], self.weight), part

    def outputs(self, values: Tensor, part: slice) -> Tensor:
        """Values of the shape of `output` as [G, n, outputs / G], for the slice that came with the rows."""
        if self.geometry is None:
            return values.reshape(1, -1, values.shape[-1])
        images = values if values.dim() == self.weight.dim() else values[None]
        images = images[part]
        groups = self.geometry.groups
        flat = images.reshape(len(images), groups, -1, images[0, 0].numel())
        return flat.permute(1, 0, 3, 2).reshape(groups, -1, flat.shape[2])


@dataclass(frozen=True)
class Geometry:
    """How a convolution cuts its input into patches."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Geometry:
        """From the arguments of ``F.conv2d`` and its like."""
        size = weight.dim() - 2

        def each(value: Any) -> tuple[int, ...]:
            numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            return numbers * size if len(numbers) == 1 else numbers

        steps, holes = each(stride), each(dilation)
        if padding == "same":
            extra = [hole * (k - 1) for hole, k in zip(holes, weight.shape[2:], strict=True)]
            pads = tuple((e // 2, e - e // 2) for e in extra)
        else:
            pads = tuple((p, p) for p in each(0 if padding == "valid" else padding))
        return cls(steps, pads, holes, groups)

    def unfold(self, images: Tensor, weight: Tensor) -> Tensor:
        """[N, C, ...] -> [G, N · positions, C / G · kernel], columns in the order of the weight's."""
        pads = [p for pair in reversed(self.padding) for p in pair]
        patches = F.pad(images, pads) if any(pads) else images
        kernel = weight.shape[2:]
        for dim, (k, step, hole) in enumerate(zip(kernel, self.stride, self.dilation, strict=True), start=2):
            patches = patches.unfold(dim, hole * (k - 1) + 1, step)[..., ::hole]
        n, c = patches.shape[:2]
        size = len(kernel)
        patches = patches.reshape(n, self.groups, c // self.groups, *patches.shape[2:])
        order = [1, 0, *range(3, 3 + size), 2, *range(3 + size, 3 + 2 * size)]
        return patches.permute(order).reshape(self.groups, -1, weight[0].numel())


class Enough(Exception):
    """All that was wanted has been seen: the rest of the forward is left out."""


class LayerCalls(TorchFunctionMode):
    """Hands each product with one of the ``weights`` (id of the tensor -> name) to ``take``."""

    def __init__(self, weights: Mapping[int, str], take: Callable[[LayerCall], None]) -> None:
        super().__init__()
        self._weights = weights
        self._take = take

    def __torch_function__(
        self, op: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if op in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[op](*args, **kwargs)
        output = op(*args, **kwargs)
        if op is F.linear:
            self._see(output, None, *args, **kwargs)
        elif op in _CONVOLUTIONS:
            self._see(output, Geometry.of, *args, **kwargs)
        return output

    def _see(
        self,
        output: Tensor,
        geometry: Callable[..., Geometry] | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        name = self._weights.get(id(weight))
        if name is not None:
            cut = None if geometry is None else geometry(weight, *args, **kwargs)
            with torch.no_grad():
                self._take(LayerCall(name, input, weight, bias, output, cut))
