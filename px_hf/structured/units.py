"""The units of a model that can be taken out whole: hidden units of MLPs, attention heads, channels inside a block."""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..model.inputs import Inputs, call
from ..model.modes import evaluating
from ..model.outputs import has_no_classifier, tensor_of
from ..model.wrappers import named_parameters, unwrap
from ..ops.nested import tensors_of
from .id_rules import ID_RULES, STARTS_IDS
from .unit_ids import Role, UnitTracer


@dataclass(frozen=True, eq=False)
class Part:
    """What a family has of one tensor: row u of `index` [units, k] lists the entries of `axis` that are of unit u.

    `matrix`: it is a weight, and no bias or tensor of BatchNorm.
    """

    tensor: str
    axis: int
    index: Tensor
    role: Role
    matrix: bool


@dataclass(frozen=True, eq=False)
class Family:
    """Units that are made by the same weights and read by the same weights: those of one layer.

    `heads`: they are attention heads. `counts`: integers of modules, (module, attribute, amount for each unit), that
    say how many units there are, `num_heads` for example.
    """

    parts: tuple[Part, ...]
    heads: bool
    counts: tuple[tuple[str, str, int], ...] = ()

    @property
    def size(self) -> int:
        """How many units it has."""
        return len(self.parts[0].index)

    @property
    def matrices(self) -> frozenset[str]:
        """The weights that make, read or carry the units; what else they have are vectors."""
        return frozenset(part.tensor for part in self.parts if part.matrix)

    def weights(self, among: Container[str]) -> frozenset[str]:
        """Those of its tensors that are among some names."""
        return frozenset(part.tensor for part in self.parts if part.tensor in among)

    @property
    def name(self) -> str:
        """The first weight that makes the units."""
        return next(part.tensor for part in self.parts if part.role == "rows")


@torch.no_grad()
def trace_units(model: nn.Module, inputs: Inputs, targets: Collection[str]) -> list[Family]:
    """The families of two units or more, all of whose weights are among `targets`, in the model's order.

    The model runs once on `inputs`, in eval mode, and is not changed. Heads come without `Family.counts`.
    """
    model = unwrap(model)
    with evaluating(model), UnitTracer(model, ID_RULES, STARTS_IDS) as tracer:
        returned = call(model, inputs)
        used = [tensor_of(returned, model)]
    used += tensors_of(returned) if has_no_classifier(model) else []  # whoever uses a backbone may use any of it
    tracer.pin(*map(tracer.ids_of, used))
    pinned, attending = tracer.pinned, tracer.attending
    matrices = {name for name, p in named_parameters(model).items() if p.dim() > 1}

    places: dict[int, dict[int, list[int]]] = {}  # root -> number of a site -> entries there
    for number, site in enumerate(tracer.sites):
        for entry, unit_id in enumerate(site.ids.tolist()):
            root = tracer.root(unit_id)
            if root and root not in pinned:
                places.setdefault(root, {}).setdefault(number, []).append(entry)
    alike: dict[tuple[tuple[int, int], ...], list[int]] = {}  # (site, entries of each unit there) -> roots
    for root, at in places.items():
        alike.setdefault(tuple((number, len(entries)) for number, entries in at.items()), []).append(root)

    families = []
    for shape, roots in alike.items():
        sites = [tracer.sites[number] for number, _ in shape]
        weights = {site.tensor for site in sites} & matrices
        if len(roots) < 2 or not {"rows", "columns"} <= {site.role for site in sites} or not weights <= {*targets}:
            continue
        parts = tuple(
            Part(
                site.tensor,
                site.axis,
                torch.tensor([places[root][number] for root in roots]),
                site.role,
                site.tensor in matrices,
            )
            for (number, _), site in zip(shape, sites, strict=True)
        )
        families.append(Family(parts, heads=roots[0] in attending))
    return families


def unread(family: Family, masks: Mapping[str, Tensor]) -> Tensor:
    """Which units of a family no kept weight reads, bool [units]; never all of them."""
    read = torch.zeros(family.size, dtype=torch.bool)
    for part in family.parts:
        if part.role == "columns":
            if part.tensor not in masks:
                return torch.zeros(family.size, dtype=torch.bool)
            read |= masks[part.tensor].movedim(part.axis, 0).flatten(1).any(1)[part.index].any(1)
    read[0] |= not bool(read.any())
    return ~read
