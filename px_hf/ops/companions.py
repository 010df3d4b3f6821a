"""What a tensor of the running network means to the paths that cross it.

While a network runs at an input x, every tensor in it may have a *companion*:

========== ==================================================================================
`Paths`    an activation: the path sum of each of its entries
`Gate`     a factor that is frozen at its value, such as an attention pattern softmax(QKᵀ):
           no path leads through it, but it knows whose product it is
`Weight`   a parameter, or a view of one: the reading of it that paths multiply
`UNKNOWN`  the result of an operation without a rule, or of anything after it
========== ==================================================================================

A tensor without a companion is a constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor

Exponent: TypeAlias = int | Tensor

Linear = Callable[..., Tensor]
"""A map that is linear in its positional tensor arguments: what an op does to path sums."""

_births = itertools.count()


@dataclass(eq=False)
class Paths:
    """The path sums of an activation: ``data * 2**exponent``, entry by entry, non-negative.

    ``data`` has the shape of the activation, in float32 (float64 in a float64 model). ``exponent`` is a
    whole number, so that sums over the paths of a deep network, which overflow even float64, stay in
    range; on an accelerator it is a 0-dimensional tensor, so that nobody has to wait for it.

    The other fields describe how the sums came about, so that a gate can be computed again with its
    inputs held constant (`px_hf.ops.gates`); they are empty where no gradient is wanted.
    """

    data: Tensor
    exponent: Exponent
    parents: tuple[Paths, ...] = ()
    replay: Linear | None = None
    weighted: bool = False
    sliced: bool = False
    gating: int = 0
    """How much the activation looks like a gate: 2 after a bounded function, 1 after another
    activation, 0 otherwise. In a product of two activations the higher one gates the other."""
    value: Tensor | None = None
    """The activation itself, on active paths: where the branch of a gate starts."""
    version: int = -1
    forgotten: bool = False
    born: int = field(default_factory=_births.__next__)
    """Parents are born before their children."""

    def forget(self) -> None:
        """Let go of the history. A branch may still start here, but not further up."""
        self.parents, self.replay, self.forgotten = (), None, True

    def start(self) -> Tensor:
        """What a branch that leaves here starts with, as a constant: the squared activation on active paths,
        the path sums where gates are not read (or where the activation has since been overwritten)."""
        if self.value is None or self.value._version != self.version:
            return self.data.detach()
        return self.value.to(self.data.dtype).square()


class Later(Paths):
    """Path sums that are computed when first asked for.

    The result of a product with a weight: nobody asks for those of queries and keys, whose product is a gate.

    Args:
        make: the path sums, which are those of ``flow`` on ``operands``.
        like: what is known of them beforehand: parents, replay and the flags.
    """

    def __init__(
        self, make: Callable[[], tuple[Tensor, Exponent]], flow: Flow, operands: list[Paths], **like: Any
    ) -> None:
        self._make: Callable[[], tuple[Tensor, Exponent]] | None = make
        self.flow = flow
        self.operands = operands
        self.born = next(_births)
        for name, value in like.items():
            setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in ("data", "exponent"):
            raise AttributeError(name)
        assert self._make is not None
        self.data, self.exponent = self._make()
        self._make = None  # and let go of what it was made from
        del self.flow, self.operands
        return self.__dict__[name]

    @property
    def made(self) -> bool:
        return self._make is None


@dataclass(frozen=True)
class Upstream:
    """Path sums u = ``fn(*inputs)`` that are computed when needed, which for a gate is in backward: those of a
    pattern have N² entries for each head. All that requires a gradient is in ``inputs``."""

    fn: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]

    def then(self, fn: Callable[..., Tensor], *others: Tensor) -> Upstream:
        """``fn(u, *others)``."""
        own = len(self.inputs)
        return Upstream(lambda *all_of: fn(self.fn(*all_of[:own]), *all_of[own:]), self.inputs + others)


Source = Callable[[Paths], Upstream]
"""Given the value paths that a gate multiplies: the path sums whose product the gate is."""


@dataclass(eq=False)
class Gate:
    """A factor that is frozen at its value. ``sources`` broadcast to the shape of the tensor.

    ``product``: it is a product of two activations, such as Q Kᵀ, so an activation that is added to it
    (a relative position term) is part of it, not the other way round.
    """

    sources: tuple[Source, ...] = ()
    product: bool = False


@dataclass(eq=False)
class Weight:
    """A parameter, or a reshaped parameter, as paths see it.

    ``path`` is what a path multiplies: θ² where weights are read, the boolean mask otherwise
    (``None`` stands for all ones). ``mask``, where there is one, has yet to be applied to the value.
    """

    path: Tensor | None
    mask: Tensor | None = None


@dataclass(eq=False)
class Derived:
    """Computed from parameters by ``name``, such as a standardised kernel. A constant to an elementwise
    product. As a kernel it stands for the parameter it was computed from, entry by entry, if it has
    that parameter's ``path`` (in its own shape); otherwise it is an unknown operation."""

    name: str
    path: Tensor | None = None


class _Unknown:
    pass


UNKNOWN: Final = _Unknown()

Companion = Paths | Gate | Weight | Derived | _Unknown


@dataclass(frozen=True)
class Reading:
    """Which factors of a path product are read.

    ======== ===== ======= ========================================================
    reading  gates weights path product
    ======== ===== ======= ========================================================
    `H`      yes   no      squared gates, weights replaced by their mask: h(x², 1, a)
    `G`      no    yes     squared weights, all gates open: g(1, θ²)
    `ACTIVE` yes   yes     both: h(x², θ², a)
    ======== ===== ======= ========================================================

    `ABSOLUTE` is `G` with |θ| for θ².
    """

    gates: bool
    weights: bool
    order: int = 2
    """A path multiplies |θ|^order at a weight; 1 in `ABSOLUTE`."""


H: Final = Reading(gates=True, weights=False)
G: Final = Reading(gates=False, weights=True)
ACTIVE: Final = Reading(gates=True, weights=True)
ABSOLUTE: Final = Reading(gates=False, weights=True, order=1)


@dataclass
class Flow:
    """What an op does to path sums: ``fn`` applied to those of ``operands``.

    With ``weight``, ``fn`` takes it as its last argument and is linear in that too, which lets the
    tracer keep the sums in range by scaling the weight rather than the activations.
    """

    fn: Callable[..., Tensor | Sequence[Tensor]]
    operands: tuple[Tensor, ...]
    weight: Tensor | None = None
    sliced: bool = False
    gating: int = 0
    channels: int | None = None
    """The axis of ``weight`` along which the channels of the result are counted, if there is one."""
    scale: Tensor | None = None
    """All that ``fn`` does is to multiply each channel by one of these: a product before it may do it too."""

    def scaled(self, scale: Tensor) -> Flow:
        """This product with each channel of its result multiplied by ``scale``."""
        assert self.weight is not None
        assert self.channels is not None
        shape = [1] * self.weight.dim()
        shape[self.channels] = -1
        return replace(self, weight=self.weight * scale.view(shape))


def is_constant(weight: Tensor) -> bool:
    """Whether all entries of ``weight`` are one number in memory, as those of an unmasked weight are in h."""
    return weight.numel() > 1 and not any(weight.stride())


def scaled(weight: Tensor, factor: Tensor | float) -> Tensor:
    """``weight * factor``; one number stays one number, see `is_constant`."""
    if is_constant(weight):
        return (weight[(0,) * weight.dim()] * factor).expand(weight.shape)
    return weight * factor


def power_of_two(exponent: Exponent, like: Tensor) -> Tensor | float:
    """2**exponent, exactly: a number, or a 0-dimensional tensor in the dtype of ``like``."""
    if isinstance(exponent, int):
        return math.ldexp(1.0, max(exponent, -1074))
    return torch.ldexp(torch.ones((), dtype=like.dtype, device=exponent.device), exponent)


_ROOM = 40
"""Path sums between 2**-40 and 2**40 are left alone: a product with a weight multiplies them by its
fan-in times a squared weight, and float32 reaches 2**±126."""


def excess(data: Tensor) -> Exponent:
    """The power of two to divide ``data`` by so that its largest entry is in [1/2, 1); 0 if it needs none."""
    top = torch.frexp(data.detach().amax()).exponent
    if data.device.type == "cpu":
        return e if abs(e := int(top)) > _ROOM else 0
    return torch.where(top.abs() > _ROOM, top, 0)


def largest(exponents: Sequence[Exponent]) -> Exponent:
    """The largest of some exponents."""
    device = next((e.device for e in exponents if isinstance(e, Tensor)), None)
    if device is None:
        return max(int(e) for e in exponents)
    return torch.stack([torch.as_tensor(e, dtype=torch.int32, device=device) for e in exponents]).amax()
