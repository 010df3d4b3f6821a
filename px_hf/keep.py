"""Train with masks: pruned weights stay exactly zero, in any training loop.

    handle = keep_masks(optimizer, model, masks)

Zeros come back in training for two reasons: a pruned weight has a gradient, and an optimizer moves weights
by more than their gradient (momentum from before, decay, noise). So two things are done. Gradients of
pruned weights are zeroed as they are accumulated: the optimizer's state of pruned weights stays zero and
clipping by norm counts the kept weights alone. And after each step the weights themselves are zeroed,
whatever the optimizer did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InvalidArgumentError, TargetError
from .masks import Masks
from .model.targets import require_whole
from .model.wrappers import paths_of_tensors, unwrap


def keep_masks(optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks) -> MaskKeeper:
    """Zero the pruned weights of `model` now, and after every step of `optimizer` until removed.

    ```python
    handle = keep_masks(optimizer, model, masks)
    ...                                             # train as ever
    handle.remove()

    with keep_masks(optimizer, model, masks):       # the same for a block
        ...
    ```

    For any optimizer of torch's class, also inside Accelerate's wrapper; models inside
    DistributedDataParallel, torch.compile or a PeftModel; gradient accumulation; autocast; GradScaler. Weights
    that are frozen at the call are kept at zero too, and may be unfrozen later. What is loaded into the model is
    masked at once, and the model may be moved, or converted to another dtype. Costs one in-place pass over the
    masked weights per backward and one per step, and the memory of the masked weights once more.

    Raises:
        TargetError: the masks do not fit the model (see `Masks.match`), or the optimizer steps none of the masked
            weights that train; also at a later step, if its weights have been replaced by others
            (`load_state_dict(assign=True)`) that the optimizer does not know.
        InvalidArgumentError: the optimizer is none of torch.
    """
    return MaskKeeper(optimizer, model, masks)


class MaskKeeper:
    """What `keep_masks` returns: `remove()` ends it, and so does leaving a `with`.

    `when_loaded`: also zero what is loaded into the model.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks, when_loaded: bool = True
    ) -> None:
        self._optimizer = unwrapped_optimizer(optimizer)
        self._model = model
        parameters = masks.match(model)
        self._require_steps(parameters.values(), "Was it made for another copy of the model?")
        masks.apply_(model)
        self._places = _places(model, parameters)
        self._kept_bits: dict[Tensor, Tensor] = {
            parameter: _kept_bits(masks.tensors[name], parameter) for name, parameter in parameters.items()
        }
        self._replaced = False
        self._gradient_hooks: dict[Tensor, RemovableHandle] = {}
        for parameter in parameters.values():
            self._watch_gradient(parameter)
        self._hooks: list[RemovableHandle] = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._mask_weights),
        ]
        if when_loaded:
            owners = {place.owner for place in self._places}
            self._hooks += [owner.register_load_state_dict_post_hook(_Loaded(self)) for owner in owners]

    @property
    def active(self) -> bool:
        """Whether zeros are being kept: from the start until `remove`."""
        return bool(self._hooks)

    @torch.no_grad()
    def replace(self, masks: Masks) -> None:
        """From now on keep these masks of the weights they name, which are zeroed at once, with their gradients."""
        parameters = masks.match(self._model)
        masks.apply_(self._model)
        for place in self._places:
            self._follow(place)
        for name, parameter in parameters.items():
            self._kept_bits[parameter] = _kept_bits(masks.tensors[name], parameter)
            self._mask_gradient(parameter)

    def remove(self) -> None:
        """Stop keeping the masks. What is zero stays so until something changes it."""
        for hook in (*self._hooks, *self._gradient_hooks.values()):
            hook.remove()
        self._hooks.clear()
        self._gradient_hooks.clear()

    def __enter__(self) -> MaskKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    def _watch_gradient(self, parameter: Tensor) -> None:
        if parameter.requires_grad and parameter not in self._gradient_hooks:
            self._gradient_hooks[parameter] = parameter.register_post_accumulate_grad_hook(self._mask_gradient)

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._zero(parameter.grad, parameter)

    def _before_step(self, *_: Any) -> None:
        """Weights may be other objects by now, and may train that were frozen."""
        for place in self._places:
            self._follow(place)
        if self._replaced:
            self._require_steps(
                self._kept_bits,
                "They are other objects than when it was made: load_state_dict(assign=True) does that, and some "
                "conversions of the model.",
            )
            self._replaced = False
        for parameter in self._kept_bits:
            if parameter.requires_grad and parameter not in self._gradient_hooks:
                self._mask_gradient(parameter)
                self._watch_gradient(parameter)

    @torch.no_grad()
    def _mask_weights(self, *_: Any) -> None:
        for parameter in self._kept_bits:
            self._zero(parameter, parameter)

    @torch.no_grad()
    def _mask_loaded(self, owner: nn.Module) -> None:
        for place in self._places:
            if place.owner is owner:
                self._follow(place)
                self._zero(place.parameter, place.parameter)

    def _follow(self, place: _Place) -> None:
        """Take the parameter that stands in this place now."""
        parameter, before = place.owner._parameters.get(place.attribute), place.parameter
        if parameter is before:
            return
        require_whole(self._model)
        if parameter is None or parameter.shape != before.shape:
            raise TargetError(
                f"{place.name} is no longer the weight that was masked: it was replaced by "
                f"{'none' if parameter is None else f'one of shape {list(parameter.shape)}'}. Remove the handle of "
                "keep_masks before such changes, and call it again after them."
            )
        place.parameter = parameter
        self._kept_bits[parameter] = self._kept_bits[before]
        self._watch_gradient(parameter)
        if all(other.parameter is not before for other in self._places):  # it may have had several names
            del self._kept_bits[before]
            if before in self._gradient_hooks:
                self._gradient_hooks.pop(before).remove()
        self._replaced = True

    def _require_steps(self, parameters: Iterable[Tensor], why: str) -> None:
        training = {parameter for parameter in parameters if parameter.requires_grad}
        stepped = {parameter for group in self._optimizer.param_groups for parameter in group["params"]}
        if training and not training & stepped:
            raise TargetError(
                f"The optimizer ({type(self._optimizer).__name__}) steps none of the {len(training)} masked weights "
                f"of the model ({type(self._model).__name__}). {why} Make it from the parameters of this one, and "
                "call keep_masks then."
            )

    def _zero(self, values: Tensor, parameter: Tensor) -> None:
        """`values & bits`: a kept value is left alone, a pruned one becomes +0.0 even if it was NaN.

        Some four times as fast on a CPU as `masked_fill_`.
        """
        bits, integer = self._kept_bits[parameter], _INTEGERS[values.dtype.itemsize]
        if bits.device != values.device or bits.dtype != integer:  # the model has been moved, or converted
            bits = self._kept_bits[parameter] = bits.to(values.device, integer)
        values.view(integer).bitwise_and_(bits)


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _kept_bits(mask: Tensor, parameter: Tensor) -> Tensor:
    """Integers of the width and layout of `parameter`: all bits set (-1) where kept, none where pruned."""
    integer = _INTEGERS[parameter.dtype.itemsize]
    return torch.empty_like(parameter, dtype=integer, requires_grad=False).copy_(mask).neg_()


@dataclass
class _Place:
    """Where a masked weight stands in the model, and the object that stood there when last looked at."""

    name: str
    owner: nn.Module
    attribute: str
    parameter: Tensor


def _places(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> list[_Place]:
    model = unwrap(model)
    paths = paths_of_tensors(model)
    found = []
    for name, parameter in parameters.items():
        owner, _, attribute = paths[name].rpartition(".")
        found.append(_Place(name, model.get_submodule(owner), attribute, parameter))
    return found


class _Loaded:
    """What a layer calls when something has been loaded into it. In copies of the layer (EMA, pickles) it does
    nothing."""

    def __init__(self, keeper: MaskKeeper | None = None) -> None:
        self._keeper = keeper

    def __call__(self, layer: nn.Module, _: Any) -> None:
        if self._keeper is not None:
            self._keeper._mask_loaded(layer)

    def __reduce__(self) -> tuple[type[_Loaded], tuple[()]]:
        return _Loaded, ()


def unwrapped_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, which has the class but not the hooks of an optimizer."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            f"keep_masks needs a torch.optim.Optimizer, got {type(optimizer).__name__}. For another kind call "
            "masks.apply_(model) after each of its steps."
        )
    return optimizer
