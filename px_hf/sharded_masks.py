"""Masks of a model whose weights are sharded over processes, sharded as they are.

masks = px.prune(model, batches, px.PX(), sparsity=0.9)    # model: after fully_shard, on every process
masks.apply_(model)                                        # each process its rows
masks.save("masks.safetensors")                            # the first process writes all of them
masks = masks.whole()                                      # on every process all of them
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import on_main, processes
from .errors import TargetError
from .masks import Masks
from .model.shards import Shards, shards_of


class ShardedMasks(Masks):
    """Masks of which each process holds the rows of the weights that it holds.

    Made, read and compared on all processes at once: what asks about all rows is a collective. `kept`, `total`,
    `sparsity` and `density` are of the whole, and known. To look at single masks, or to use them where a whole model
    is, take `whole`.

    Args:
        parts: parameter name -> this process's rows of the mask, bool.
        shapes: parameter name -> shape of the whole mask.
        shards: how rows are spread over processes.
    """

    __slots__ = ("_shapes", "_shards")

    def __init__(self, parts: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], shards: Shards) -> None:
        own = {name: part.detach().to("cpu", copy=True).contiguous() for name, part in parts.items()}
        self._tensors, self._shards = own, shards
        self._shapes = {name: torch.Size(shapes[name]) for name in own}
        self._total = sum(shape.numel() for shape in self._shapes.values())
        kept = sum(int(part.count_nonzero()) for part in own.values())
        self._kept = int(shards.total(torch.tensor([kept], dtype=torch.int64)))

    @classmethod
    def of(cls, masks: Masks, shards: Shards) -> ShardedMasks:
        """This process's rows of masks that it holds whole."""
        tensors = masks.tensors
        return cls({name: shards.part(mask) for name, mask in tensors.items()},
                   {name: mask.shape for name, mask in tensors.items()}, shards)  # fmt: skip

    def whole(self) -> Masks:
        """All rows, on every process. A collective."""
        found = dict(self._each())
        return Masks({name: found[name] for name in self})

    def one(self, name: str) -> Tensor:
        """The whole mask of that name, on the CPU of every process. A collective."""
        return self._shards.whole(self._tensors[name], self._shapes[name]).cpu()

    def _each(self) -> Iterator[tuple[str, Tensor]]:
        for name in sorted(self._tensors):
            yield name, self.one(name)

    def part(self, name: str, parameter: Tensor) -> Tensor:
        """This process's rows of the mask. Only to read."""
        return self._tensors[name]

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """This process's rows of the masks, without a copy. Never write to them."""
        return dict(self._tensors)

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        raise TargetError(
            "these masks are sharded over the processes, and what was asked for needs all of them: take "
            "masks.whole() on every process, and a model that holds its weights whole."
        )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise KeyError(name)
        return self.tensors[name]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Masks):
            return NotImplemented
        same = sorted(self) == sorted(other) and all(
            self._shape(name) == other._shape(name)
            and torch.equal(
                mask,
                other._tensors[name] if isinstance(other, ShardedMasks) else self._shards.part(other._tensors[name]),
            )
            for name, mask in self._tensors.items()
        )
        return int(self._shards.total(torch.tensor([int(not same)]))) == 0

    __hash__ = None

    def _shape(self, name: str) -> torch.Size:
        return self._shapes[name]

    def match(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """As `Masks.match`, of a model that is sharded as the masks are."""
        found = super().match(model)
        shards = shards_of(model)
        if shards is None or (shards.rank, shards.size) != (self._shards.rank, self._shards.size):
            raise TargetError(
                f"The masks are sharded over {self._shards.size} processes, and {type(model).__name__} is "
                f"{'whole' if shards is None else f'sharded over {shards.size}'}, nothing was changed: use "
                "masks.whole(), called on every process that has them."
            )
        return found

    def densities(self) -> dict[str, float]:
        """As `Masks.densities`, on every process. A collective."""
        counts = [int(part.count_nonzero()) for part in self._tensors.values()]
        kept = self._shards.total(torch.tensor(counts, dtype=torch.int64)).tolist()
        return {name: count / self._shapes[name].numel() for name, count in zip(self, kept, strict=True)}

    def under(self, path: str) -> ShardedMasks:
        """As `Masks.under`."""
        return ShardedMasks(
            {f"{path}.{name}": part for name, part in self._tensors.items()},
            {f"{path}.{name}": shape for name, shape in self._shapes.items()},
            self._shards,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """As `Masks.save`; all processes call it, and the first one writes. A collective."""
        found = {name: mask for name, mask in self._each() if processes().is_main}
        on_main(lambda: Masks({name: found[name] for name in self}).save(path))

    def __reduce__(self) -> Any:
        raise TypeError("ShardedMasks belong to the processes that made them; pickle masks.whole().")
