"""Which entries of a running network belong to one hidden unit, found by following labels through its operations.

Every output of a matrix or kernel starts with a label of its own. Each operation hands on the labels of the entries
that its results are made of:

=============================== ======================================================================================
operation                       labels
=============================== ======================================================================================
linear, convolution             the columns of the weight note what they read; every row starts a new label
depthwise convolution, BatchNorm pass; their parameters note which entry belongs to which label
activation, reshape, slice, cat pass, with the entries
pooling, mean, softmax, norms   those that are mixed become one
product, Q Kᵀ, A V              those that meet become one
sum of two branches             pinned: they are on a residual stream
anything else                   pinned
=============================== ======================================================================================

A label that is not pinned marks a slab of the network that can be taken out whole: some rows make it, some columns
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

from ..ops import RULES
from ..ops.nested import tensors_of
from ..ops.pooling import INDEXED
from ..ops.registry import Rule

Role = Literal["rows", "columns", "along"]


@dataclass(frozen=True)
class Site:
    """Where labels meet a parameter or buffer: entry i of its `axis` belongs to label `labels[i]`, 0 to none.

    "rows" of a weight make entries and its "columns" read them; a bias, a depthwise kernel or a tensor of
    BatchNorm goes "along" with them.
    """

    tensor: str
    axis: int
    labels: Tensor
    role: Role


class SlabTracer(TorchFunctionMode):
    """`with SlabTracer(model, rules, starts) as tracer: model(x)`; then `sites`, and `root(label)` of each label.

    `rules`: path rule of an operation -> what it makes of labels; `starts`: those that are asked without labels too.
    Labels are whole numbers from 1, in float64 tensors of the shapes of the activations; 0 marks an entry that
    belongs to none.
    """

    def __init__(
        self, model: nn.Module, rules: Mapping[Rule | None, Callable[..., Any]], starts: Collection[Rule | None]
    ) -> None:
        super().__init__()
        self._rules = rules
        self._starts = starts
        self.sites: list[Site] = []
        self._names = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        self._parent = [0]
        self._maker = [0]
        self._pinned: set[int] = set()
        self._attending: set[int] = set()
        self._labels = WeakTensorKeyDictionary()

    def root(self, label: int) -> int:
        """The label that stands for all that became one with this one."""
        while self._parent[label] != label:
            self._parent[label] = label = self._parent[self._parent[label]]
        return label

    @property
    def pinned(self) -> set[int]:
        """Roots of what cannot be taken out."""
        return {self.root(label) for label in self._pinned}

    @property
    def attending(self) -> set[int]:
        """Roots of what met in a product of activations, such as Q Kᵀ: heads."""
        return {self.root(label) for label in self._attending}

    def pin(self, *labels: Tensor | None) -> None:
        """Keep these labels."""
        self._pinned.update(label for some in labels if some is not None for label in distinct(some))

    def labels_of(self, value: Tensor) -> Tensor | None:
        """The labels of the entries of `value`, if they have any."""
        found: Tensor | None = self._labels.get(value)
        return found

    def __torch_function__(
        self, op: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = RULES.get(INDEXED.get(op, op))
        found = {id(t): self._labels[t] for t in tensors_of((args, kwargs)) if t in self._labels}
        out = op(*args, **kwargs)
        target = args[0] if op is torch.Tensor.__setitem__ else out
        results = [t for t in tensors_of(target) if t.is_floating_point()]
        if not results or not (found or rule in self._starts):
            return out
        labels: Any = None
        if rule in self._rules:
            try:
                labels = self._rules[rule](Step(self, op, out, found), *args, **kwargs)
            except (
                NotImplementedError,
                TypeError,
                RuntimeError,
            ):  # a form of the operation that the rule does not know
                labels = None
        if labels is None:
            self.pin(*found.values())
        for i, result in enumerate(results):
            given = labels[i] if isinstance(labels, (list, tuple)) and i < len(labels) else labels
            if isinstance(given, Tensor) and bool(given.any()):
                self._labels[result] = given
            else:
                self._labels.pop(result, None)
        return out

    # ------------------------------------------------------------------------- what rules may do

    def fresh(self, count: int) -> Tensor:
        """New labels [count], of one maker."""
        start = len(self._parent)
        self._parent += range(start, start + count)
        self._maker += [start] * count
        return torch.arange(start, start + count, dtype=torch.float64)

    def note(self, tensor: Any, axis: int, labels: Tensor, role: Role) -> bool:
        """Note a site. False, and its labels are pinned, if `tensor` is no parameter, or is used a second time."""
        name = self._names.get(id(tensor))
        reads = role == "columns"
        before = [site for site in self.sites if site.tensor == name and (site.role == "columns") == reads]
        if name is None or before:
            self.pin(labels, *(site.labels for site in self.sites if site.tensor == name))
            return False
        self.sites.append(Site(name, axis, labels.flatten().to(torch.int64), role))
        return True

    def unite(self, labels: list[int]) -> None:
        """Make one of some labels."""
        for label in labels[1:]:
            self._parent[self.root(label)] = self.root(labels[0])

    def join(self, labels: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Make one of all labels along `dims` (≥ 0); returns them, of size 1 there."""
        joined = core(labels)
        if dims:
            rows = joined.movedim(dims, tuple(range(-len(dims), 0))).flatten(-len(dims))
            for row in rows.reshape(-1, rows.shape[-1]):
                self.unite(distinct(row))
            joined = joined.amax(dims, keepdim=True)
        return self.roots(joined).expand([1 if d in dims else n for d, n in enumerate(labels.shape)])

    def meet(self, a: Tensor, b: Tensor, *, same_maker: bool = False) -> Tensor | None:
        """Make one of the labels of `a` and `b` that meet, entry by entry, broadcast against each other.

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

    def attend(self, labels: Tensor) -> None:
        """Remember that these labels met in a product of activations."""
        self._attending.update(distinct(labels))

    def roots(self, labels: Tensor) -> Tensor:
        """Each label's root."""
        values, where = torch.unique(labels, return_inverse=True)
        return torch.tensor([float(self.root(int(v))) for v in values.tolist()], dtype=torch.float64)[where]


@dataclass(frozen=True)
class Step:
    """One call of an operation, as its rule for labels sees it: `out` is what it returned."""

    tracer: SlabTracer
    op: Callable[..., Any]
    out: Any
    found: dict[int, Tensor]

    def labels(self, value: Any) -> Tensor | None:
        """The labels of an operand, None if it has none."""
        return self.found.get(id(value))


def core(labels: Tensor) -> Tensor:
    """The same labels, of size 1 along every dimension in which they do not change."""
    for dim, size in enumerate(labels.shape):
        if size > 1:
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) == 0 or bool((labels == first).all()):
                labels = first
    return labels


def distinct(labels: Tensor) -> list[int]:
    """The labels that occur, without 0."""
    return [int(v) for v in torch.unique(labels).tolist() if v]
