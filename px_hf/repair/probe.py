"""One image through a network: which layers run in which order, and which modules hand their result to which."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as trees

from .calls import LayerCall, LayerCalls
from .networks import Network

Version = tuple[int, int]
"""A tensor object and how often it had been written to in place."""


@dataclass
class Layer:
    """A weight and how it is called: when, with which input, with which bias (name), in how many groups."""

    name: str
    times: list[int] = field(default_factory=list)
    inputs: list[Version] = field(default_factory=list)
    biases: set[str | None] = field(default_factory=set)
    groups: int = 1

    @property
    def bias(self) -> str | None:
        """The name of the bias, if every call adds the same parameter."""
        return next(iter(self.biases)) if len(self.biases) == 1 else None


@dataclass
class Visit:
    """One call of a module: its arguments with `None` for tensors, and the tensors that went in and came out."""

    path: str
    kind: type[nn.Module]
    start: int
    form: Any
    constants: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    inputs: tuple[Version, ...]
    end: int = -1
    outputs: tuple[Version, ...] = ()


@dataclass
class Record:
    """What one forward showed: layers by name in running order, visits of modules that were called once."""

    layers: dict[str, Layer]
    visits: list[Visit]


class _Probe:
    def __init__(self, network: Network, names: Collection[str]) -> None:
        self.weights = {id(network.parameter(name)): name for name in names}
        self.names = {id(p): name for name, p in network.named()}
        self.layers: dict[str, Layer] = {}
        self.visits: dict[str, list[Visit]] = {}
        self._clock = 0
        self._held: list[Tensor] = []
        """Tensors stay alive, so that no two have one id."""

    def _tick(self) -> int:
        self._clock += 1
        return self._clock

    def _version(self, tensor: Tensor) -> Version:
        self._held.append(tensor)
        return id(tensor), tensor._version

    def saw(self, call: LayerCall) -> None:
        layer = self.layers.setdefault(call.name, Layer(call.name))
        layer.times.append(self._tick())
        layer.inputs.append(self._version(call.input))
        layer.biases.add(None if call.bias is None else self.names.get(id(call.bias), ""))
        layer.groups = 1 if call.geometry is None else call.geometry.groups

    def enter(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            leaves, form = trees.tree_flatten((args, kwargs))
            constants = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
            inputs = tuple(self._version(leaf) for leaf in leaves if isinstance(leaf, Tensor))
            kinds = tuple(isinstance(leaf, Tensor) for leaf in leaves)
            self.visits.setdefault(path, []).append(
                Visit(path, type(module), self._tick(), form, constants, kinds, inputs)
            )

        return hook

    def leave(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            visit = self.visits[path][-1]
            visit.end = self._tick()
            visit.outputs = tuple(
                self._version(leaf) for leaf in trees.tree_leaves(output) if isinstance(leaf, Tensor)
            )

        return hook


def probe(network: Network, names: Collection[str], forward: Callable[[], object]) -> Record:
    """Run ``forward`` on the network and note what happens to the weights of those names."""
    found = _Probe(network, names)
    with ExitStack() as hooks:
        for path, module in network.model.named_modules():
            if path:
                hooks.callback(module.register_forward_pre_hook(found.enter(path), with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(found.leave(path)).remove)

        def watched() -> None:
            with LayerCalls(found.weights, found.saw):
                forward()

        network.run(watched)
    once = [visits[0] for visits in found.visits.values() if len(visits) == 1 and visits[0].end > 0]
    return Record(found.layers, sorted(once, key=lambda visit: visit.start))


def same_but_for_size(one: Record, two: Record) -> Record:
    """The first record, without the modules that were called differently in the second."""
    others: Mapping[str, Visit] = {visit.path: visit for visit in two.visits}
    return Record(
        one.layers,
        [
            visit
            for visit in one.visits
            if visit.path in others
            and others[visit.path].form == visit.form
            and _equal(others[visit.path].constants, visit.constants)
        ],
    )


def _equal(one: tuple[Any, ...], two: tuple[Any, ...]) -> bool:
    return all(a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)
               for a, b in zip(one, two, strict=True))  # fmt: skip
