"""Which entries of a running network belong to one hidden unit, found by following ids through its operations.

Every output of a matrix or kernel starts with an id of its own. Each operation hands on the ids of the entries
that its results are made of:

=============================== ======================================================================================
operation                       ids
=============================== ======================================================================================
linear, convolution             the columns of the weight note what they read; every row starts a new id
depthwise convolution, BatchNorm pass; their parameters note which entry belongs to which id
activation, reshape, slice, cat pass, with the entries
pooling, mean, softmax, norms   those that are mixed become one
product, Q Kᵀ, A V              those that meet become one
sum of two branches             pinned: they are on a residual stream
anything else                   pinned
=============================== ======================================================================================

An id that is not pinned marks a slab of the network that can be taken out whole: some rows make it, some columns
read it, and it meets nothing else in between. What no rule knows is pinned, so a network with unknown operations
has fewer units to choose from, and none that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..model.wrappers import named_buffers, named_parameters
from ..ops import RULES
from ..ops.nested import tensors_of
from ..ops.registry import Rule
from ..ops.rules.pooling import INDEXED

Role = Literal["rows", "columns", "along"]


@dataclass(frozen=True)
class Site:
    """Where ids meet a parameter or buffer: entry i of its `axis` belongs to the unit `ids[i]`, 0 to none.

    "rows" of a weight make entries and its "columns" read them; a bias, a depthwise kernel or a tensor of
    BatchNorm goes "along" with them.
    """

    tensor: str
    axis: int
    ids: Tensor
    role: Role


class UnitTracer(TorchFunctionMode):
    """`with UnitTracer(model, rules, starts) as tracer: model(x)`; then `sites`, and `root(id)` of each id.

    `rules`: path rule of an operation -> what it makes of ids; `starts`: those that are asked without ids too.
    Ids are whole numbers from 1, in float64 tensors of the shapes of the activations; 0 marks an entry that
    belongs to none.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[Rule | None, Callable[..., Any]], starts: Collection[Rule | None]
    ) -> None:
        super().__init__()
        self._rules = rules
        self._starts = starts
        self.sites: list[Site] = []
        self._names = {id(t): name for name, t in {**named_parameters(model), **named_buffers(model)}.items()}
        self._parent = [0]
        self._maker = [0]
        self._pinned: set[int] = set()
        self._attending: set[int] = set()
        self._ids = WeakTensorKeyDictionary()

    def root(self, unit_id: int) -> int:
        """The id that stands for all that became one with this one."""
        while self._parent[unit_id] != unit_id:
            self._parent[unit_id] = unit_id = self._parent[self._parent[unit_id]]
        return unit_id

    @property
    def pinned(self) -> set[int]:
        """Roots of what cannot be taken out."""
        return {self.root(unit_id) for unit_id in self._pinned}

    @property
    def attending(self) -> set[int]:
        """Roots of what met in a product of activations, such as Q Kᵀ: heads."""
        return {self.root(unit_id) for unit_id in self._attending}

    def pin(self, *ids: Tensor | None) -> None:
        """Keep these ids."""
        self._pinned.update(unit_id for some in ids if some is not None for unit_id in distinct(some))

    def ids_of(self, value: Tensor) -> Tensor | None:
        """The ids of the entries of `value`, if they have any."""
        found: Tensor | None = self._ids.get(value)
        return found

    def __torch_function__(
        self, op: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(INDEXED.get(op, op))
        found = {id(t): self._ids[t] for t in tensors_of((args, kwargs)) if t in self._ids}
        out = op(*args, **kwargs)
        target = args[0] if op is torch.Tensor.__setitem__ else out
        results = [t for t in tensors_of(target) if t.is_floating_point()]
        if not results or not (found or rule in self._starts):
            return out
        ids: Any = None
        if rule in self._rules:
            try:
                ids = self._rules[rule](Step(self, op, out, found), *args, **kwargs)
            except (
                NotImplementedError,
                TypeError,
                RuntimeError,
            ):  # a form of the operation that the rule does not know
                ids = None
        if ids is None:
            self.pin(*found.values())
        for i, result in enumerate(results):
            given = ids[i] if isinstance(ids, (list, tuple)) and i < len(ids) else ids
            if isinstance(given, Tensor) and bool(given.any()):
                self._ids[result] = given
            else:
                self._ids.pop(result, None)
        return out

    # ------------------------------------------------------------------------- what rules may do

    def fresh(self, count: int) -> Tensor:
        """New ids [count], of one maker."""
        start = len(self._parent)
        self._parent += range(start, start + count)
        self._maker += [start] * count
        return torch.arange(start, start + count, dtype=torch.float64)

    def note(self, tensor: Any, axis: int, ids: Tensor, role: Role) -> bool:
        """Note a site. False, and its ids are pinned, if `tensor` is no parameter, or is used a second time."""
        name = self._names.get(id(tensor))
        reads = role == "columns"
        before = [site for site in self.sites if site.tensor == name and (site.role == "columns") == reads]
        if name is None or before:
            self.pin(ids, *(site.ids for site in self.sites if site.tensor == name))
            return False
        self.sites.append(Site(name, axis, ids.flatten().to(torch.int64), role))
        return True

    def unite(self, ids: list[int]) -> None:
        """Make one of some ids."""
        for unit_id in ids[1:]:
            self._parent[self.root(unit_id)] = self.root(ids[0])

    def join(self, ids: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Make one of all ids along `dims` (≥ 0); returns them, of size 1 there."""
        joined = core(ids)
        if dims:
            rows = joined.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
            for row in rows.reshape(-1, rows.shape[-1]):
                self.unite(distinct(row))
            joined = joined.amax(dims, keepdim=True)
        return self.roots(joined).expand([1 if d in dims else n for d, n in enumerate(ids.shape)])

    def meet(self, a: Tensor, b: Tensor, *, same_maker: bool = False) -> Tensor | None:
        """Make one of the ids of `a` and `b` that meet, entry by entry, broadcast against each other.

        None if one of two is 0 or, where `same_maker`, they are rows of different weights.
        """
        a, b = torch.broadcast_tensors(core(a), core(b))
        if bool(((a == 0) != (b == 0)).any()):
            return None
        pairs = torch.unique(torch.stack([a.flatten(), b.flatten()]), dim=1).T.to(torch.int64).tolist()
        if same_maker and any(self._maker[one] != self._maker[other] for one, other in pairs):
            return None
        for pair in pairs:
            self.unite(pair)
        return self.roots(a)

    def attend(self, ids: Tensor) -> None:
        """Remember that these ids met in a product of activations."""
        self._attending.update(distinct(ids))

    def roots(self, ids: Tensor) -> Tensor:
        """Each id's root."""
        values, where = torch.unique(ids, return_inverse=True)
        return torch.tensor([float(self.root(int(v))) for v in values.tolist()], dtype=torch.float64)[where]


@dataclass(frozen=True)
class Step:
    """One call of an operation, as its rule for ids sees it: `out` is what it returned."""

    tracer: UnitTracer
    op: Callable[..., Any]
    out: Any
    found: dict[int, Tensor]

    def ids(self, value: Any) -> Tensor | None:
        """The ids of an operand, None if it has none."""
        return self.found.get(id(value))


def core(ids: Tensor) -> Tensor:
    """The same ids, of size 1 along every dimension in which they do not change."""
    for dim, size in enumerate(ids.shape):
        if size > 1:
            first = ids.narrow(dim, 0, 1)
            if ids.stride(dim) == 0 or bool((ids == first).all()):
                ids = first
    return ids


def distinct(ids: Tensor) -> list[int]:
    """The ids that occur, without 0."""
    return [int(v) for v in torch.unique(ids).tolist() if v]
