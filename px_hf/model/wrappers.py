"""Models inside wrappers: DistributedDataParallel, DataParallel and ``torch.compile``, also of a part of a model.

Scores, masks and saved files call a parameter what the model inside calls it: the functions here say how.
"""

from __future__ import annotations

import itertools

from torch import Tensor, nn


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel or ``torch.compile``."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was called on a part of the model, or ``compile()`` was."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def inner_name(name: str) -> str:
    """``name`` without the levels that compiled submodules put into it."""
    return name.replace("_orig_mod.", "")


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """The parameters by the names that the model inside all wrappers gives them; all names, if duplicates stay."""
    found = unwrap(model).named_parameters(remove_duplicate=remove_duplicate)
    return {inner_name(name): parameter for name, parameter in found}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers by the names that the model inside all wrappers gives them."""
    return {inner_name(name): buffer for name, buffer in unwrap(model).named_buffers()}


def paths_of_tensors(model: nn.Module) -> dict[str, str]:
    """Name of a parameter or buffer, as here -> where it is found from ``model``, with all compiled levels."""
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    return {inner_name(path): path for path, _ in tensors}
