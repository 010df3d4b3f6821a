"""The dense network and the sparse one that is being repaired, as functions; the user's model is only read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..model.wrappers import named_parameters, paths_of_tensors
from .calls import Enough, LayerCall, LayerCalls


class Network:
    """A model with some of its parameters replaced for as long as it runs.

    Attributes:
        tensors: parameter name -> what stands in its place.
    """

    def __init__(self, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        self.model = model
        self.tensors = dict(tensors)
        self._paths = paths_of_tensors(model)
        self._own = named_parameters(model, remove_duplicate=False)

    def parameter(self, name: str) -> Tensor:
        """The tensor of that name that the network computes with."""
        return self.tensors.get(name, self._own[name])

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters that the network computes with."""
        return ((name, self.parameter(name)) for name in self._own)

    def run(self, function: Callable[[], Any]) -> Any:
        """What ``function`` returns, the replaced parameters in their places; None if it was stopped by `Enough`."""
        try:
            if not self.tensors:
                return function()
            replaced = {f"model.{self._paths[name]}": tensor for name, tensor in self.tensors.items()}
            return torch.func.functional_call(_Under(self.model), replaced, (function,))
        except Enough:
            return None

    def watch(self, names: Mapping[str, int], take: Callable[[LayerCall], None], function: Callable[[], Any]) -> None:
        """Hand the products with the weights of those names to ``take``; stop after so many of each."""
        left = sum(names.values())

        def seen(call: LayerCall) -> None:
            nonlocal left
            take(call)
            left -= 1
            if left == 0:
                raise Enough

        def watched() -> None:
            with LayerCalls({id(self.parameter(name)): name for name in names}, seen):
                function()

        self.run(watched)


class _Under(nn.Module):
    """Runs a function with the parameters of the model inside replaced."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()
