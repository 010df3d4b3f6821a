"""The layers that masks speak about, as modules that run, and where a constant can be added to what they return."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import InvalidArgumentError
from ..masks import Masks
from ..model.adapters import require_merged
from ..model.inputs import Inputs, call
from ..model.modes import evaluating
from ..model.wrappers import unwrap

KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Affine:
    """A linear layer or convolution: `name` of its weight [out, in, ...], and the module.

    `norm`: the BatchNorm that reads its output as it is.
    """

    name: str
    module: nn.Module
    norm: _BatchNorm | None

    @property
    def weight(self) -> Tensor:
        return self.module.get_parameter("weight")

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None

    @property
    def dim(self) -> int:
        """Along which the channels of input and output are."""
        return -1 if isinstance(self.module, nn.Linear) else 1

    @property
    def takes_constants(self) -> bool:
        """Whether `add_` has somewhere to add to."""
        return self.bias is not None or self.norm is not None

    def add_(self, constant: Tensor) -> None:
        """Add a constant [out] to the output: to the bias, or else take it off the mean of the BatchNorm behind.

        In eval mode the two are the same: BatchNorm subtracts its mean from what it reads.
        """
        if self.bias is not None:
            self.bias.copy_(self.bias.double() + constant)
        elif self.norm is not None and self.norm.running_mean is not None:
            self.norm.running_mean.copy_(self.norm.running_mean.double() - constant)


def affine_layers(model: nn.Module, masks: Masks, inputs: Inputs) -> tuple[list[Affine], dict[str, str]]:
    """Those of the masked layers that run once in a forward, in running order; and of the others, name -> why not."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    modules: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, parameter in masks.match(model).items():
        found = owners[id(parameter)]
        if len(found) > 1 or found[0] in modules.values():
            left[name] = "it is shared by several layers"
        elif not isinstance(found[0], KINDS):
            left[name] = f"it belongs to a {type(found[0]).__name__}; expected a linear layer or a convolution"
        else:
            modules[name] = found[0]
    runs = _Runs()
    runs.watch(model, inputs, [*modules.values()])
    layers = []
    for name, module in modules.items():
        if (count := runs.calls.count(module)) != 1:
            left[name] = f"its layer runs {count} times in a forward; expected once, as a module"
        else:
            layers.append(Affine(name, module, runs.norm_behind(module)))
    return sorted(layers, key=lambda layer: runs.calls.index(layer.module)), left


@dataclass
class _Runs:
    """What happens in one forward: which layers run, and which BatchNorm is given the very output of which."""

    calls: list[nn.Module] = field(default_factory=list)
    _outputs: list[tuple[nn.Module, Tensor, int]] = field(default_factory=list)
    _reads: list[tuple[_BatchNorm, nn.Module | None]] = field(default_factory=list)

    def watch(self, model: nn.Module, inputs: Inputs, layers: list[nn.Module]) -> None:
        handles = [layer.register_forward_hook(self._ran) for layer in layers]
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        handles += [norm.register_forward_pre_hook(self._read) for norm in norms if norm.running_mean is not None]
        try:
            with evaluating(model), torch.no_grad():
                call(model, inputs)
        finally:
            for handle in handles:
                handle.remove()

    def _ran(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.calls.append(module)
        self._outputs.append((module, output, output._version))  # alive, so that no other tensor is taken for it

    def _read(self, norm: Any, args: tuple[Any, ...]) -> None:
        makers = [m for m, output, version in self._outputs if output is args[0] and output._version == version]
        self._reads.append((norm, makers[0] if makers else None))

    def norm_behind(self, layer: nn.Module) -> _BatchNorm | None:
        """The BatchNorm that reads the layer, if it reads nothing else."""
        behind = [norm for norm, maker in self._reads if maker is layer]
        once = len(behind) == 1 and [norm for norm, _ in self._reads].count(behind[0]) == 1
        return behind[0] if once else None


def parent_of(model: nn.Module, masks: Masks, dense: nn.Module | None, what: str) -> nn.Module:
    """The dense network outside its wrappers: `dense`, or the model itself, if the masks were not applied yet.

    Raises:
        InvalidArgumentError: the masks were applied, and no dense network was given.
        TargetError: the masks do not fit the dense network, or one of the two holds adapters.
    """
    require_merged(model, what)
    if dense is None:
        if masks.kept < masks.total and not masks.revived(model):
            raise InvalidArgumentError(
                f"{what} needs the dense network too, and the pruned weights of the model are zero already. Pass "
                "dense=, the model as it was before masks.apply_, or call it before."
            )
        return unwrap(model)
    require_merged(dense, what)
    masks.match(dense)
    return unwrap(dense)
