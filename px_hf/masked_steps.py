"""Steps of an optimizer that act on a part of the weights: what `px_hf.keep` and `px_hf.tune` have in common.

Gradients of the weights that are masked out are zeroed as they are accumulated: the optimizer's state of these weights
stays zero and clipping by norm counts the others alone. What becomes of the weights themselves at a step, which moves
them by more than their gradient (momentum from before, decay, noise), is for the subclass to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .errors import InvalidArgumentError, TargetError
from .masks import Masks
from .model.quantized import require_plain
from .model.shards import is_sharded, local
from .model.targets import require_whole
from .model.wrappers import paths_of_tensors, unwrap

Self = TypeVar("Self", bound="MaskedSteps")


class MaskedSteps:
    """Hooks at the steps of an optimizer, and the bits of the masks; `remove()` ends it, and so does leaving a `with`.

    Weights that are moved, converted to another dtype or replaced by others are followed.

    Attributes:
        call: the public function that makes it, for messages.
    """

    call: ClassVar[str]

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks) -> None:
        self._optimizer = unwrapped_optimizer(optimizer, self.call)
        require_plain(model, f"px.{self.call}")
        self._model = model
        parameters = masks.match(model)
        self._require_steps(parameters.values(), "Was it made for another copy of the model?")
        self._places = _places(model, parameters)
        self._kept_bits: dict[Tensor, Tensor] = {
            parameter: kept_bits(masks.part(name, parameter), parameter) for name, parameter in parameters.items()
        }
        self._replaced = False
        self._gradient_hooks: dict[Tensor, RemovableHandle] = {}
        for parameter in parameters.values():
            self._watch_gradient(parameter)
        self._hooks: list[RemovableHandle] = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def active(self) -> bool:
        """Whether steps are being watched: from the start until `remove`."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Stop it. The weights stay as they are until something changes them."""
        for hook in (*self._hooks, *self._gradient_hooks.values()):
            hook.remove()
        self._hooks.clear()
        self._gradient_hooks.clear()

    def __enter__(self: Self) -> Self:
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

    def _after_step(self, *_: Any) -> None:
        """What becomes of the weights that the optimizer has just stepped."""
        raise NotImplementedError

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

    def _follow(self, place: _Place) -> None:
        """Take the parameter that stands in this place now."""
        parameter, before = place.owner._parameters.get(place.attribute), place.parameter
        if parameter is before:
            return
        if not is_sharded(before):
            require_whole(self._model)
        if parameter is None or parameter.shape != before.shape or is_sharded(parameter) != is_sharded(before):
            raise TargetError(
                f"{place.name} is no longer the weight that was masked: it was replaced by "
                f"{'none' if parameter is None else f'one of shape {list(parameter.shape)}'}. Remove the handle of "
                f"{self.call} before such changes, and call it again after them."
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
                f"call {self.call} then."
            )

    def _zero(self, values: Tensor, parameter: Tensor) -> None:
        """`values & bits`: a kept value is left alone, another becomes +0.0 even if it was NaN.

        Some four times as fast on a CPU as `masked_fill_`.
        """
        values = local(values)
        bits = self._bits_for(values, parameter)
        values.view(bits.dtype).bitwise_and_(bits)

    def _bits_for(self, values: Tensor, parameter: Tensor) -> Tensor:
        """The bits of a parameter on the device of ``values``, as integers of their width."""
        bits, integer = self._kept_bits[parameter], INTEGERS[values.dtype.itemsize]
        if bits.device != values.device or bits.dtype != integer:  # the model has been moved, or converted
            bits = self._kept_bits[parameter] = bits.to(values.device, integer)
        return bits


INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_bits(mask: Tensor, parameter: Tensor) -> Tensor:
    """Integers of the width and layout of what this process holds of `parameter`, which `mask` is about: all bits set
    (-1) where kept, none where pruned."""
    integer = INTEGERS[parameter.dtype.itemsize]
    return torch.empty_like(local(parameter.detach()), dtype=integer).copy_(mask).neg_()


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


def unwrapped_optimizer(optimizer: torch.optim.Optimizer, call: str) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper, which has the class but not the hooks of an optimizer.

    Raises:
        InvalidArgumentError: it is none of torch.
    """
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentError(
            f"{call} needs a torch.optim.Optimizer, got {type(optimizer).__name__}: it hooks into its steps."
        )
    return optimizer
