"""Follow path sums through a running network, op by op.

`Tracer` is a ``torch.overrides.TorchFunctionMode``: every function and method of torch that the
network calls on a tensor passes through it, including attention, residual additions and
concatenation that module hooks never see. Each call first runs as it is, on the network's own
values; then its rule says what it does to the path sums that accompany them. The model is not
changed, not even for the time of the call.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import UnsupportedOpError, listed
from ..model.modes import full_precision
from .bystanders import name_of, of_gates, of_parameters, reshaped
from .call import Call
from .companions import (
    UNKNOWN,
    Companion,
    Derived,
    Exponent,
    Flow,
    Gate,
    Later,
    Linear,
    Paths,
    Reading,
    Weight,
    excess,
    largest,
    power_of_two,
    scaled,
)
from .nested import tensors_of, with_tensors
from .registry import DECOMPOSITIONS, READS_INPUT, RULES, SHAPE_OPS, Op

_REMEMBERED = 2
"""Sums of activations, such as the ends of residual blocks, whose history is kept: a branch to come starts below."""


class Tracer(TorchFunctionMode):
    """``with Tracer(...) as tracer: model(x)`` computes path sums beside the values.

    Args:
        model: names the modules in error messages.
        reading: which factors of a path product are read.
        weights: parameter -> `Weight`. Masks in it are applied to the values as they are used.
        dtype: of the path sums.
        forget: let go of the history of path sums that gates within blocks do not ask for.

    Attributes:
        met: readings of the weights that met an activation or a gate; empty where weights are not read.

    Raises:
        UnsupportedOpError: on leaving, if there were operations without a rule; lists all of them.
        ForgottenError: a gate asks for history that was let go of.
    """

    def __init__(
        self,
        model: nn.Module,
        reading: Reading,
        weights: Mapping[Tensor, Weight],
        dtype: torch.dtype,
        forget: bool = True,
    ) -> None:
        super().__init__()
        self.reading = reading
        self.dtype = dtype
        self.met: list[Tensor] = []
        self._companions = WeakTensorKeyDictionary()
        for parameter, weight in weights.items():
            self._keep(parameter, weight)
        self._sums: deque[Paths] = deque()
        self._remembered = _REMEMBERED if forget else math.inf
        self._unknown: dict[str, dict[str, None]] = {}
        self._modules: list[str] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._hooks: list[Any] = []
        self._depth = 0

    def __enter__(self) -> Tracer:
        def push(module: nn.Module, _: Any) -> None:
            self._modules.append(self._names.get(id(module), type(module).__name__))

        def pop(module: nn.Module, _: Any, __: Any) -> None:
            if self._modules:
                self._modules.pop()

        if self._depth == 0:  # decompositions enter it again
            self._hooks = [register_module_forward_pre_hook(push), register_module_forward_hook(pop)]
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._depth -= 1
        if self._depth:
            return
        for hook in self._hooks:
            hook.remove()
        if kind is None and self._unknown:
            raise UnsupportedOpError(self._message())

    def start(self, value: Tensor, data: Tensor) -> None:
        """Paths start at ``value``, with path sums ``data``."""
        self._attach(value, Paths(data, 0))

    def paths(self, value: Tensor) -> Paths | None:
        """The path sums that arrived at ``value``."""
        companion = self._companion(value)
        if not isinstance(companion, Paths):
            return None
        with torch.set_grad_enabled(self.reading.weights), full_precision(value.device):
            companion.data  # noqa: B018  (no longer later than now)
        return companion

    def _keep(self, value: Tensor, companion: Companion) -> None:
        self._companions[value] = companion, value._version

    def _companion(self, value: Tensor) -> Companion | None:
        found = self._companions.get(value)
        if found is None:
            return None
        companion: Companion
        companion, version = found
        if version != value._version:  # all views of one memory share a version
            return self._record("an in-place operation on a tensor of which another view is used afterwards")
        return companion

    # ---------------------------------------------------------------------------------- one call

    def __torch_function__(
        self,
        op: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found: dict[int, Companion] = {}
        for tensor in tensors_of((args, kwargs)):
            companion = self._companion(tensor)
            if companion is not None:
                found[id(tensor)] = companion
        if not found:
            return op(*args, **kwargs)
        alive = any(isinstance(c, Paths) for c in found.values())
        if alive and op in DECOMPOSITIONS:
            with self:
                return DECOMPOSITIONS[op](*args, **kwargs)

        args, kwargs = self._with_masks(args, kwargs, found)
        rule_args = args
        if alive and op in READS_INPUT and _in_place(op, args, kwargs):
            rule_args = (args[0].clone(), *args[1:])
            found[id(rule_args[0])] = found.get(id(args[0]), UNKNOWN)
        out = op(*args, **kwargs)
        target = args[0] if op is torch.Tensor.__setitem__ else out
        if not any(map(_has_values, tensors_of(target))):
            return out
        with torch.set_grad_enabled(self.reading.weights), full_precision(next(tensors_of(target)).device):
            result = self._result(op, target, found, rule_args, kwargs)
        if args and target is args[0] and target._base is not None:
            # Written through a view of a tensor that has no path sums of its own: see _companion.
            self._companions.setdefault(target._base, (UNKNOWN, -1))
        self._attach(target, result)
        return out

    def _result(
        self,
        op: Callable[..., Any],
        out: Any,
        found: dict[int, Companion],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Companion | list[Companion] | None:
        """The companion of what ``op`` returned."""
        kinds = {type(c) for c in found.values()}
        alive = any(isinstance(c, Paths) for c in found.values())
        rule = RULES.get(op)
        unknown = type(UNKNOWN) in kinds
        if rule is None and (alive or unknown):
            return self._record(name_of(op))
        if unknown:
            return UNKNOWN
        if self.reading.weights and (alive or Gate in kinds):
            self.met += [c.path for c in found.values() if isinstance(c, (Weight, Derived)) and c.path is not None]
        call = Call(op, out, self.reading, self.dtype, found)
        if alive:
            assert rule is not None
            try:
                result = rule(call, *args, **kwargs)
            except NotImplementedError as error:
                return self._record(f"{name_of(op)} with {error}")
            except TypeError as error:  # an argument that the rule does not know
                return self._record(f"{name_of(op)}: {error}")
            return self._run(op, out, result, found) if isinstance(result, Flow) else result
        if op in SHAPE_OPS:
            assert rule is not None
            flow = rule(call, *args, **kwargs)
            assert isinstance(flow, Flow)
            return reshaped(call, flow)
        if Gate in kinds:
            try:
                return of_gates(call, args, kwargs)
            except NotImplementedError as error:
                return self._record(f"{name_of(op)} with {error}")
        return of_parameters(call, (args, kwargs))

    def _run(self, op: Op, out: Any, flow: Flow, found: Mapping[int, Companion]) -> Companion | list[Companion]:
        """Apply a rule's linear map to the path sums of its operands, or note that it is to be applied."""
        parents: list[Paths] = []
        for operand in flow.operands:
            companion = found[id(operand)]
            assert isinstance(companion, Paths)
            parents.append(companion)
        flow = replace(flow, operands=())  # what remembers how it was computed need not remember the values
        first = parents[0]
        if flow.scale is not None and isinstance(first, Later) and not first.made and first.flow.channels is not None:
            assert first.flow.weight is not None
            if first.flow.weight.numel() <= out.numel():  # costs less than to scale its result
                return self._later(first.flow.scaled(flow.scale), first.operands)
        waiting = op in SHAPE_OPS and any(isinstance(p, Later) and not p.made for p in parents)
        if flow.weight is None and not waiting:
            exponent, step = _in_range(flow, parents)
            data: Any = step(*(p.data for p in parents))
            if isinstance(data, Tensor):
                paths = Paths(data, exponent, **self._history(flow, parents, step))
                if len(parents) > 1:
                    self._sums.append(paths)
                if len(self._sums) > self._remembered:
                    self._sums.popleft().forget()
                return paths
            pieces = [lambda *s, i=i: step(*s)[i] for i, _ in enumerate(data)]
            return [
                Paths(d, exponent, **self._history(flow, parents, piece))
                for d, piece in zip(data, pieces, strict=True)
            ]
        if isinstance(out, Tensor):
            return self._later(flow, parents)
        return [self._later(replace(flow, fn=lambda *s, i=i: flow.fn(*s)[i]), parents) for i, _ in enumerate(out)]

    def _later(self, flow: Flow, parents: list[Paths]) -> Paths:
        in_range = functools.cache(lambda: _in_range(flow, parents))

        def make() -> tuple[Tensor, Exponent]:
            exponent, step = in_range()
            return step(*(p.data for p in parents)), exponent

        return Later(make, flow, parents, **self._history(flow, parents, lambda *data: in_range()[1](*data)))

    def _history(self, flow: Flow, parents: list[Paths], step: Linear) -> dict[str, Any]:
        """Where path sums come from, as far as anybody will ask."""
        known: dict[str, Any] = {"weighted": flow.weight is not None, "sliced": flow.sliced, "gating": flow.gating}
        return known | {"parents": tuple(parents), "replay": step} if self.reading.weights else known

    # ------------------------------------------------------------------------------- bookkeeping

    def _with_masks(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], found: dict[int, Companion]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, with pruned weights at zero."""
        masked: dict[int, Tensor] = {}
        for tensor in tensors_of((args, kwargs)):
            weight = found.get(id(tensor))
            if isinstance(weight, Weight) and weight.mask is not None and id(tensor) not in masked:
                path = weight.mask.to(tensor.dtype) if weight.path is weight.mask else weight.path
                masked[id(tensor)] = zeroed(tensor.detach(), weight.mask, path)
                found[id(masked[id(tensor)])] = Weight(path)
        if not masked:
            return args, kwargs

        return (
            tuple(with_tensors(a, masked) for a in args),
            {k: with_tensors(v, masked) for k, v in kwargs.items()},
        )

    def _attach(self, out: Any, result: Companion | Sequence[Companion] | None) -> None:
        tensors = list(filter(_has_values, tensors_of(out)))
        results = list(result) if isinstance(result, Sequence) else [result] * len(tensors)
        for tensor, companion in zip(tensors, results, strict=True):
            later = isinstance(companion, Later) and not companion.made
            if isinstance(companion, Paths) and not later and companion.data.shape != tensor.shape:
                raise AssertionError(
                    f"path sums of shape {tuple(companion.data.shape)} for a value of shape {tuple(tensor.shape)} "
                    f"in {self._where()}: the rule of this operation is wrong"
                )
            if isinstance(companion, Paths) and self.reading.gates and self.reading.weights:
                companion.value, companion.version = tensor.detach(), tensor._version
            if companion is None:
                self._companions.pop(tensor, None)
            else:
                self._keep(tensor, companion)

    def _record(self, name: str) -> Companion:
        self._unknown.setdefault(name, {})[self._where()] = None
        return UNKNOWN

    def _where(self) -> str:
        return (self._modules[-1] if self._modules else "") or "the model itself"

    def _message(self) -> str:
        lines = []
        for name, modules in self._unknown.items():
            lines.append(f"  {name}  in {listed(modules, 5)}")
        return (
            f"{len(self._unknown)} operation(s) of this model have no path rule, so PX cannot score it:\n"
            + "\n".join(lines)
            + "\nA rule says what an operation does to path sums; see CONTRIBUTING.md, 'A new op rule'. "
            "Criteria that need no path sums (Magnitude, Random) work on this model."
        )


def _in_range(flow: Flow, parents: Sequence[Paths]) -> tuple[Exponent, Linear]:
    """The linear map of a rule, with all operands brought to one power of two and the result kept in range."""
    exponent = parents[0].exponent
    factors: list[Tensor | float] = [1.0] * len(parents)
    if any(p.exponent is not exponent for p in parents):
        exponent = largest([p.exponent for p in parents])
        factors = [power_of_two(p.exponent - exponent, p.data) for p in parents]
    weight = flow.weight
    if weight is not None:  # a product with a weight is where sums grow or vanish
        shift = excess(parents[0].data)
        if isinstance(shift, Tensor) or shift != 0:
            weight = scaled(weight, power_of_two(-shift, weight))
            exponent = exponent + shift

    def step(*data: Tensor) -> Any:
        same = [d if isinstance(f, float) and f == 1 else d * f for d, f in zip(data, factors, strict=True)]
        return flow.fn(*same) if weight is None else flow.fn(*same, weight)

    return exponent, step


def zeroed(value: Tensor, mask: Tensor, path: Tensor | None) -> Tensor:
    """``value * mask``. Where |θ|^order is 0, so may θ be: one pass over memory, half the time."""
    if path is not None and path.dtype == value.dtype:
        result: Tensor = torch.ops.aten.threshold_backward(value, path.detach(), 0)
        return result
    return value * mask


def _has_values(value: Tensor) -> bool:
    """Whether paths may lead to ``value``; not to a mask, or to the indices of a maximum."""
    return value.is_floating_point() or value.is_complex()


def _in_place(op: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    name = getattr(op, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
        return True
    if kwargs.get("inplace"):
        return True
    if len(args) < 2:
        return False
    try:
        bound = inspect.signature(op).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return bool(bound.arguments.get("inplace"))
