"""Train with masks: pruned weights stay exactly zero, in any training loop.

    handle = keep_masks(optimizer, model, masks)

Zeros come back in training for two reasons: a pruned weight has a gradient, and an optimizer moves weights
by more than their gradient (momentum from before, decay, noise). So two things are done. Gradients of
pruned weights are zeroed as they are accumulated: the optimizer's state of pruned weights stays zero and
clipping by norm counts the kept weights alone. And after each step the weights themselves are zeroed,
whatever the optimizer did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .masked_steps import MaskedSteps, kept_bits
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

    For any optimizer of torch's class, also inside Accelerate's wrapper; models inside DistributedDataParallel,
    torch.compile or a PeftModel; models that FSDP2 has sharded (`fully_shard`, Accelerate's plugin), of which each
    process masks the rows that it holds; gradient accumulation; autocast; GradScaler. Weights that are frozen at the
    call are kept at zero too, and may be unfrozen later. What is loaded into the model is masked at once, and it
    may be moved, or converted to another dtype. Costs one in-place pass over the masked weights per backward and one
    per step, and the memory of the masked weights once more.

    Raises:
        TargetError: the masks do not fit the model (see `Masks.match`), or the optimizer steps none of the masked
            weights that train; also at a later step, if its weights have been replaced by others
            (`load_state_dict(assign=True)`) that the optimizer does not know.
        InvalidArgumentError: the optimizer is none of torch.
    """
    return MaskKeeper(optimizer, model, masks)


class MaskKeeper(MaskedSteps):
    """What `keep_masks` returns: `remove()` ends it, and so does leaving a `with`.

    `when_loaded`: also zero what is loaded into the model.
    """

    call = "keep_masks"

    def __init__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, masks: Masks, when_loaded: bool = True
    ) -> None:
        super().__init__(optimizer, model, masks)
        masks.apply_(model)
        if when_loaded:
            owners = {place.owner for place in self._places}
            self._hooks += [owner.register_load_state_dict_post_hook(_Loaded(self)) for owner in owners]

    @torch.no_grad()
    def replace(self, masks: Masks) -> None:
        """From now on keep these masks of the weights they name, which are zeroed at once, with their gradients."""
        parameters = masks.match(self._model)
        masks.apply_(self._model)
        for place in self._places:
            self._follow(place)
        for name, parameter in parameters.items():
            self._kept_bits[parameter] = kept_bits(masks.part(name, parameter), parameter)
            self._mask_gradient(parameter)

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        for parameter in self._kept_bits:
            self._zero(parameter, parameter)

    @torch.no_grad()
    def _mask_loaded(self, owner: nn.Module) -> None:
        for place in self._places:
            if place.owner is owner:
                self._follow(place)
                self._zero(place.parameter, place.parameter)


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
