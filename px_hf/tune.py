"""Tune a part of the weights: all others stay as they are, to the bit, in any training loop.

    handle = tune_only(optimizer, model, masks)

`masks` say which weights move (True); `px_hf.select_trainable` finds some. What no mask names is frozen, except the
groups in `also`: by default the classifier head, which is new in transfer learning.

Gradients of frozen weights are dropped as they are accumulated, so that the optimizer's state of them stays zero. A
step moves weights by more than their gradient (decay, momentum from before, noise): what is frozen in a masked weight
is copied before each step and put back after it. Weights that are frozen as a whole have no gradient at all, and the
optimizers of torch leave those alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .distributed import processes
from .errors import InvalidArgumentError
from .masked_steps import MaskedSteps
from .masks import Masks
from .model.adapters import require_merged
from .model.targets import head_modules, require_whole
from .model.wrappers import named_parameters, unwrap

TICKET_FILE = "ticket.safetensors"
"""The masks of what is tuned, in the checkpoints of transformers' Trainer."""

GROUPS = ("head", "norms", "biases")
"""What `also` may name."""

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _BatchNorm)


def tune_only(
    optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks, *, also: Collection[str] = ("head",)
) -> Tuner:
    """From now on steps of `optimizer` move only the weights of `model` that `masks` keep, until removed.

    ```python
    ticket = px.select_trainable(model, batches, px.PX(), fraction=0.1)
    with px.tune_only(optimizer, model, ticket):
        ...                                             # train as ever
    ```

    Args:
        optimizer: any of torch's class, also inside Accelerate's wrapper. Its weight decay and momentum do not reach
            frozen weights.
        model: also inside DistributedDataParallel or torch.compile. It is not changed now, and may be loaded, moved or
            converted later: what a step does not move are the weights as they are before that step.
        masks: parameter name -> bool tensor, True = tuned. A pruned model stays pruned if its masks of zeros are
            not among them (``select_trainable(within=masks)``).
        also: groups that train as a whole where no mask names them: ``"head"``, the classifier; ``"norms"``;
            ``"biases"``.

    Buffers, such as the statistics of BatchNorm in train mode, are not weights and move as ever. In one process
    ``requires_grad`` of what is frozen as a whole is False until `remove`, which makes backward cheaper; in several it
    stays, since DistributedDataParallel counts on its gradients.

    Raises:
        TargetError: the masks do not fit the model (see `Masks.match`), adapters of peft are in it, or the optimizer
            steps none of the masked weights that train.
        InvalidArgumentError: the optimizer is none of torch, or `also` names an unknown group.
    """
    return Tuner(optimizer, model, masks, also)


class Tuner(MaskedSteps):
    """What `tune_only` returns: `remove()` ends it, and so does leaving a `with`."""

    call = "tune_only"

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks, also: Collection[str] = ("head",)
    ) -> None:
        require_merged(model, "px.tune_only")
        require_whole(model)
        self._frozen = frozen_parameters(model, masks, also)
        super().__init__(optimizer, model, _some(masks))
        self._rest: dict[Tensor, Tensor] = {}
        self._alone = processes().world_size == 1
        self._trained = [parameter for parameter in self._frozen.values() if parameter.requires_grad]
        if self._alone:
            for parameter in self._trained:
                parameter.requires_grad_(False)

    def remove(self) -> None:
        """Stop it: all that trained before trains again."""
        super().remove()
        if self._alone:
            for parameter in self._trained:
                parameter.requires_grad_(True)
        self._trained = []

    @torch.no_grad()
    def _before_step(self, *_: Any) -> None:
        super()._before_step()
        present = named_parameters(self._model)
        for name in self._frozen:
            present[name].grad = None
        for parameter in self._kept_bits:
            bits = self._bits_for(parameter, parameter)
            self._rest[parameter] = parameter.view(bits.dtype) & ~bits

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for parameter, rest in self._rest.items():
            self._zero(parameter, parameter)
            parameter.view(rest.dtype).bitwise_or_(rest)
        self._rest.clear()


def frozen_parameters(model: nn.Module, masks: Masks, also: Collection[str] = ("head",)) -> dict[str, nn.Parameter]:
    """Those of which `tune_only` moves nothing, by name.

    Raises:
        TargetError: the masks do not fit the model.
        InvalidArgumentError: `also` names an unknown group.
    """
    if isinstance(also, str) or not set(also) <= set(GROUPS):
        raise InvalidArgumentError(
            f"also={also!r}: expected a collection of {', '.join(map(repr, GROUPS))}, such as also=('head',)."
        )
    masks.match(model)
    tuned = {*_some(masks).match(model).values(), *_members(unwrap(model), also)}
    return {name: parameter for name, parameter in named_parameters(model).items() if parameter not in tuned}


def _some(masks: Masks) -> Masks:
    """Without those that keep nothing, as long as there are others."""
    some = {name: mask for name, mask in masks.tensors.items() if bool(mask.any())}
    return Masks(some) if some else masks


def _members(model: nn.Module, groups: Collection[str]) -> set[nn.Parameter]:
    """The parameters of the groups."""
    head = head_modules(model) if "head" in groups else set()
    found: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            norm = "norms" in groups and isinstance(module, _NORMS)
            if module in head or norm or ("biases" in groups and name == "bias"):
                found.add(parameter)
    return found


@torch.no_grad()
def frozen_fingerprint(model: nn.Module, masks: Masks, also: Collection[str] = ("head",)) -> str:
    """SHA-256, in hexadecimal, of all weights that `tune_only` does not move: equal before and after training."""
    frozen = frozen_parameters(model, masks, also)
    values = {name: parameter.detach() for name, parameter in frozen.items()}
    for name, parameter in _some(masks).match(model).items():
        values[name] = parameter.detach().cpu()[~masks.tensors[name]]
    digest = hashlib.sha256()
    for name, value in sorted(values.items()):
        digest.update(f"{name}:{value.dtype}:{list(value.shape)}".encode())
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
