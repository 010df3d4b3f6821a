"""The dense and the sparse network side by side, one step of the route at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as trees

from ..model.inputs import call
from .calls import Enough
from .images import Images, Part
from .networks import Network
from .probe import Visit
from .route import Step
from .states import States


class Walk:
    """Where both networks stand, for every part of the images of this process."""

    def __init__(self, dense: Network, sparse: Network, images: Images, states: States, device: torch.device) -> None:
        self.networks = {"dense": dense, "sparse": sparse}
        self.parts = images.parts
        self.images = images.all_parts
        self.states = states
        self.device = device
        self._step: Step | None = None

    def enter(self, step: Step) -> None:
        """Go to the beginning of a step; the one before it has been left."""
        self._step = step
        if step.visit is None:
            return
        for which, network in self.networks.items():
            for part in self.parts:
                key = f"{which}-{part.key}"
                if step.follows is None:
                    self.states.put(key, self._tensors_at(network, step.visit, part))
                else:
                    self.states.put(key, [self.states.get(key, self.device)[step.follows]])

    def forward(self, which: str, part: Part) -> Any:
        """What the module of this step, or the whole network, returns in that network; to be called under `run`."""
        assert self._step is not None
        visit = self._step.visit
        model = self.networks[which].model
        if visit is None:
            return call(model, part.inputs(self.states, self.device))
        args, kwargs = self.arguments(which, part)
        return self.module(which)(*args, **kwargs)

    def arguments(self, which: str, part: Part) -> Any:
        """(args, kwargs) of the module of this step, as new tensors."""
        assert self._step is not None
        assert self._step.visit is not None
        return filled(self._step.visit, self.states.get(f"{which}-{part.key}", self.device))

    def module(self, which: str) -> nn.Module:
        """The module of this step in that network."""
        assert self._step is not None
        assert self._step.visit is not None
        return self.networks[which].model.get_submodule(self._step.visit.path)

    def leave(self) -> None:
        """Go to the end of the step: what its module hands on, in both networks."""
        for which, network in self.networks.items():
            for part in self.parts:
                output = network.run(lambda which=which, part=part: self.forward(which, part))
                self.states.put(f"{which}-{part.key}", tensors_in(output))

    def _tensors_at(self, network: Network, visit: Visit, part: Part) -> list[Tensor]:
        """The tensors that the module is called with."""
        found: list[Tensor] = []

        def entered(module: nn.Module, args: Any, kwargs: Any) -> None:
            found.extend(t.clone() for t in tensors_in((args, kwargs)))
            raise Enough

        hook = network.model.get_submodule(visit.path).register_forward_pre_hook(entered, with_kwargs=True)
        try:
            network.run(lambda: call(network.model, part.inputs(self.states, self.device)))
        finally:
            hook.remove()
        return found


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of nested containers, in order."""
    return [leaf for leaf in trees.tree_leaves(value) if isinstance(leaf, Tensor)]


def filled(visit: Visit, tensors: Sequence[Tensor]) -> Any:
    """The arguments of a visit, with these tensors."""
    given = iter(tensors)
    kinds = visit.is_tensor
    leaves = [next(given) if kind else constant for kind, constant in zip(kinds, visit.constants, strict=True)]
    return trees.tree_unflatten(leaves, visit.form)
