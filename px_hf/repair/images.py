"""The calibration images, read once, in parts, one in five kept apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..distributed import processes
from ..model.inputs import Batches, Inputs, inputs_of
from .states import States

HELD_OUT = 5
"""Of so many images one is not fitted to, but measured on."""

_NUMBERS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class Part:
    """Some images that go through the network together; the images themselves are in `States`.

    Attributes:
        key: among the states.
        held_out: whether they are kept apart.
        images: how many.
    """

    key: str
    held_out: bool
    images: int
    others: tuple[str, ...]

    def inputs(self, states: States, device: torch.device) -> Inputs:
        """The images, and what else the model takes."""
        images, *others = states.get(f"images-{self.key}", device)
        return Inputs(images, dict(zip(self.others, others, strict=True)))


@dataclass(frozen=True)
class Images:
    """The parts of this process, and of all processes together the parts, how many images, and of which shapes.

    ``example`` is the first image of all, which every process has.
    """

    parts: tuple[Part, ...]
    all_parts: tuple[Part, ...]
    fitted: int
    held_out: int
    shapes: frozenset[tuple[int, ...]]
    example: Inputs


def read(batches: Batches, model: nn.Module, states: States) -> Images:
    """Put this process's share of the images, which is every N-th part, into ``states``.

    Every fifth image is held out, beginning with the second.

    Raises:
        DataError: ``batches`` is empty or malformed.
    """
    group = processes()
    parts: list[Part] = []
    example: Inputs | None = None
    counts = {False: 0, True: 0}
    shapes: set[tuple[int, ...]] = set()
    first = 0
    for index, inputs in enumerate(inputs_of(batches, model)):
        number = torch.arange(first, first + len(inputs.images))
        first += len(inputs.images)
        shapes.add(tuple(inputs.images.shape[1:]))
        example = example or _take(inputs, torch.zeros(1, dtype=torch.long, device=inputs.images.device))
        apart = number % HELD_OUT == 1
        for held_out in (False, True):
            chosen = torch.nonzero(apart == held_out).flatten().to(inputs.images.device)
            counts[held_out] += len(chosen)
            if len(chosen):
                for i, part in enumerate(_take(inputs, chosen).parts(_NUMBERS_AT_A_TIME)):
                    key = f"{index}-{int(held_out)}-{i}"
                    if len(parts) % group.world_size == group.rank:
                        states.put(f"images-{key}", [part.images, *part.others.values()])
                    parts.append(Part(key, held_out, len(part.images), tuple(part.others)))
    assert example is not None  # or inputs_of has said so
    own = tuple(parts[group.rank :: group.world_size])
    return Images(own, tuple(parts), counts[False], counts[True], frozenset(shapes), example)


def _take(inputs: Inputs, chosen: Tensor) -> Inputs:
    others: Mapping[str, Tensor] = {name: other[chosen] for name, other in inputs.others.items()}
    return Inputs(inputs.images[chosen], others)
