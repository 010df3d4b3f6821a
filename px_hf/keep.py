"""Train with masks: pruned weights stay exactly zero, in any training loop.

    handle = keep_masks(optimizer, model, masks)

Zeros come back in training for two reasons: a pruned weight has a gradient, and an optimizer moves weights
by more than their gradient (momentum from before, decay, noise). So two things are done. Gradients of
pruned weights are zeroed as they are accumulated: the optimizer's state of pruned weights stays zero and
clipping by norm counts the kept weights alone. And after each step the weights themselves are zeroed,
whatever the optimizer did.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InvalidArgumentError, TargetError
from .masks import Masks


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
    DistributedDataParallel or torch.compile; gradient accumulation; autocast; GradScaler. Weights that
    are frozen at the call are kept at zero too, but if they are unfrozen later their gradients are not
    masked. Costs one in-place pass over the masked weights per backward and one per step, and the memory
    of the masked weights once more.

    Raises:
        TargetError: the masks do not fit the model (see `Masks.match`), or the optimizer steps none of the masked
            weights that train.
        InvalidArgumentError: the optimizer is none of torch.
    """
    return MaskKeeper(optimizer, model, masks)


class MaskKeeper:
    """What `keep_masks` returns: `remove()` ends it, and so does leaving a `with`."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks) -> None:
        inner = unwrapped_optimizer(optimizer)
        parameters = masks.match(model)
        training = {parameter for parameter in parameters.values() if parameter.requires_grad}
        stepped = {parameter for group in inner.param_groups for parameter in group["params"]}
        if training and not training & stepped:
            raise TargetError(
                f"The optimizer ({type(inner).__name__}) steps none of the {len(training)} masked weights of "
                f"the model ({type(model).__name__}). Was it made for another copy of the model? Make it from "
                "the parameters of this one."
            )
        masks.apply_(model)
        self._model = model
        self._kept_bits: dict[Tensor, Tensor] = {
            parameter: _kept_bits(masks.tensors[name], parameter) for name, parameter in parameters.items()
        }
        self._hooks = [parameter.register_post_accumulate_grad_hook(self._mask_gradient) for parameter in training]
        self._hooks.append(inner.register_step_post_hook(self._mask_weights))

    @property
    def active(self) -> bool:
        """Whether zeros are being kept: from the start until `remove`."""
        return bool(self._hooks)

    @torch.no_grad()
    def replace(self, masks: Masks) -> None:
        """From now on keep these masks of the weights they name, which are zeroed at once, with their gradients."""
        parameters = masks.match(self._model)
        masks.apply_(self._model)
        for name, parameter in parameters.items():
            self._kept_bits[parameter] = _kept_bits(masks.tensors[name], parameter)
            self._mask_gradient(parameter)

    def remove(self) -> None:
        """Stop keeping the masks. What is zero stays so until something changes it."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> MaskKeeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()

    @torch.no_grad()
    def _mask_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._zero(parameter.grad, parameter)

    @torch.no_grad()
    def _mask_weights(self, *_: Any) -> None:
        for parameter in self._kept_bits:
            self._zero(parameter, parameter)

    def _zero(self, values: Tensor, parameter: Tensor) -> None:
        """`values & bits`: a kept value is left alone, a pruned one becomes +0.0 even if it was NaN.

        Some four times as fast on a CPU as `masked_fill_`.
        """
        bits = self._kept_bits[parameter]
        if bits.device != values.device:
            bits = self._kept_bits[parameter] = bits.to(values.device)
        values.view(bits.dtype).bitwise_and_(bits)


def _kept_bits(mask: Tensor, parameter: Tensor) -> Tensor:
    """Integers of the width and layout of `parameter`: all bits set (-1) where kept, none where pruned."""
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.dtype.itemsize]
    return torch.empty_like(parameter, dtype=integer, requires_grad=False).copy_(mask).neg_()


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
