"""Models inside wrappers: DistributedDataParallel, DataParallel, peft, ``torch.compile``, also of a part of it.

Scores, masks and saved files call a parameter what the model inside calls it: the functions here say how.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable

from torch import Tensor, nn

from ..errors import TargetError
from .adapters import is_peft_model, is_tuner, plain_paths


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, ``torch.compile`` or a ``PeftModel``.

    Adapters of peft stay in its layers: `px_hf.model.adapters` says which weights are the model's own.
    """
    while (inner := _inside(model)) is not model:
        model = inner
    return model


def unwrap_to_peft(model: nn.Module) -> nn.Module:
    """The ``PeftModel`` inside the other wrappers, or the model inside them if there is none."""
    while not is_peft_model(model) and (inner := _inside(model)) is not model:
        model = inner
    return model


def _inside(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return model.module
    inner = model.base_model if is_peft_model(model) else model.model if is_tuner(model) else None
    if inner is None:
        inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def is_compiled(model: nn.Module) -> bool:
    """Whether ``torch.compile`` was called on a part of the model, or ``compile()`` was."""
    return any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())


def inner_name(name: str) -> str:
    """``name`` without the levels that compiled submodules put into it.

    Raises:
        TargetError: it has a level of peft, which a name alone cannot tell from others.
    """
    if "peft" in sys.modules and ".base_layer." in name:
        raise TargetError(
            f"{name} is inside a layer of peft, and what is saved is the plain model. Call "
            "model = px.merge_lora_(peft_model, masks), which merges adapters and keeps the zeros."
        )
    return name.replace("_orig_mod.", "")


def _namer(model: nn.Module) -> Callable[[str], str]:
    """Path of a tensor in ``model`` -> its name."""
    plain = plain_paths(model)
    if plain is None:
        return lambda path: path.replace("_orig_mod.", "")

    def name(path: str) -> str:
        owner, _, own = path.rpartition(".")
        return f"{plain[owner]}.{own}".lstrip(".")

    return name


def named_parameters(model: nn.Module, *, remove_duplicate: bool = True) -> dict[str, nn.Parameter]:
    """The parameters by the names that the model inside all wrappers gives them; all names, if duplicates stay."""
    model = unwrap(model)
    name = _namer(model)
    return {name(path): p for path, p in model.named_parameters(remove_duplicate=remove_duplicate)}


def named_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers by the names that the model inside all wrappers gives them."""
    model = unwrap(model)
    name = _namer(model)
    return {name(path): buffer for path, buffer in model.named_buffers()}


def paths_of_tensors(model: nn.Module) -> dict[str, str]:
    """Name of a parameter or buffer, as here -> where it is found from ``model``, with all compiled levels."""
    tensors = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    name = _namer(model)
    return {name(path): path for path, _ in tensors}
