"""Quantized weights: what holds codes in place of numbers can neither be scored nor masked.

torchao's ``quantize_`` makes parameters of a class of its own, bitsandbytes too; ``torch.ao.quantization`` makes other
modules, whose weights are no parameters. A pruned weight is the code of an exact zero in all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import TargetError, listed

_LIBRARIES = ("torchao", "bitsandbytes")
_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized")


def is_quantized(weight: Tensor) -> bool:
    """Whether a parameter is one of torchao's or bitsandbytes' classes."""
    return type(weight).__module__.partition(".")[0] in _LIBRARIES


def quantized_layers(model: nn.Module) -> list[str]:
    """The names of what is quantized: parameters, or modules that replace others."""
    names = [name for name, p in model.named_parameters() if is_quantized(p)]
    return names + [name for name, m in model.named_modules() if type(m).__module__.startswith(_MODULES)]


def require_plain(model: nn.Module, what: str) -> None:
    """For what needs the numbers themselves.

    Raises:
        TargetError: some of them are quantized.
    """
    if found := quantized_layers(model):
        raise TargetError(
            f"{what} needs plain weights, and {len(found)} of {type(model).__name__} are quantized: "
            f"{listed(found, 3)}. Prune, train and save the plain model first, and quantize it last: "
            "model = px.from_pretrained(folder), then quantize_(model, ...). Zeros stay zero, and "
            "masks.revived(model) checks them (docs/SAVING.md)."
        )


def plain(weight: Tensor) -> Tensor:
    """The numbers that a parameter stands for."""
    return weight.detach().dequantize() if type(weight).__module__.startswith("torchao") else weight


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """Parameters of torchao in plain numbers for the time being: operations on them can then be counted."""
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if plain(parameter) is not parameter:
                swapped.append((module, name, parameter))
    try:
        for module, name, parameter in swapped:
            setattr(module, name, nn.Parameter(plain(parameter), requires_grad=False))
        yield
    finally:
        for module, name, parameter in swapped:
            setattr(module, name, parameter)
