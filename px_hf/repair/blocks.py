"""Block by block: the output of a whole residual block of the dense network is matched.

In running order, for block B with inputs x̂ in the network as it is pruned and repaired so far, and x in the dense one,
`px_hf.repair.adam` minimises over the kept weights, biases and norm parameters of the block

    ‖B̂(x̂) − B(x)‖² / ‖B(x)‖².

Where there is a class token, which the classifier reads, this is the mean of two such ratios, over all tokens and over
the class token alone.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..model.wrappers import named_parameters
from .images import Part
from .networks import Network
from .probe import Record, Visit
from .walk import Walk, tensors_in


class Block:
    """The module that the walk stands at, as an `Objective`."""

    def __init__(self, walk: Walk, path: str, class_token: bool) -> None:
        self.name = path
        self._walk = walk
        self._class_token = class_token
        sparse = walk.networks["sparse"]
        inside = set(walk.module("sparse").parameters())
        own = named_parameters(sparse.model)
        self.trained: Sequence[str] = [name for name in trainable(sparse) if own[name] in inside]
        for part in walk.parts:
            target = walk.networks["dense"].run(functools.partial(walk.forward, "dense", part))
            walk.states.put(f"target-{part.key}", tensors_in(target)[:1])

    def distance(self, part: Part, epoch: int | None = None) -> Tensor:
        """The loss of the images of a part, times their number."""
        walk = self._walk
        target = walk.states.get(f"target-{part.key}", walk.device)[0]
        output = walk.networks["sparse"].run(lambda: walk.forward("sparse", part))
        return part.images * relative_square(tensors_in(output)[0], target, self._class_token)


def relative_square(output: Tensor, target: Tensor, class_token: bool = False) -> Tensor:
    """‖output − target‖² / ‖target‖², in float32; with a ``class_token`` in [N, T, d] the mean of that and its own."""
    output, target = output.float(), target.float()
    gap = (output - target).square().mean()
    ratio = gap / target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
    if not class_token or target.dim() != 3:
        return ratio
    return (ratio + relative_square(output[:, :1], target[:, :1])) / 2


def trainable(sparse: Network) -> list[str]:
    """Parameters that were repaired already, and vectors (biases, norms, scales)."""
    return [
        name
        for name, parameter in named_parameters(sparse.model).items()
        if parameter.is_floating_point() and (name in sparse.tensors or parameter.dim() <= 1)
    ]


def blocks_of(record: Record) -> list[str]:
    """Children of a list or sequence of modules, of a class that comes twice or more, around two layers or more.

    Of two that lie in each other the inner one is meant, which is what `route` finds cheaper.
    """
    times = sorted(time for layer in record.layers.values() for time in layer.times)

    def layers(visit: Visit) -> int:
        return sum(visit.start < time < visit.end for time in times)

    found = [visit for visit in record.visits if visit.path.rpartition(".")[2].isdigit() and layers(visit) > 1]
    kinds = [visit.kind for visit in found]
    return [visit.path for visit in found if kinds.count(visit.kind) > 1]
