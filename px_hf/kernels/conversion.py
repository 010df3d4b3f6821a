"""What a conversion did, and which layers it is about."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from ..errors import TargetError, listed


@dataclass(frozen=True)
class Conversion:
    """Names of the converted layers, and why each other linear layer or convolution was skipped."""

    converted: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.converted)} layers converted, {len(self.skipped)} skipped"]
        for reason, names in _by_reason(self.skipped).items():
            lines.append(f"  {len(names)} {reason}: {listed(names, 3)}")
        return "\n".join(lines)


def sort_out(
    model: nn.Module, unfit: Callable[[nn.Linear], str | None]
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """The linear layers that `unfit` gives no reason against, and the reasons for all other layers with weights."""
    fit, skipped = {}, {}
    for name, layer in _layers(model):
        if type(layer) is nn.Linear:
            reason = unfit(layer)
        elif isinstance(layer, nn.Linear):
            reason = f"a {type(layer).__name__}, whose weight others may use"
        else:
            reason = "not a linear layer"
        if reason is None and isinstance(layer, nn.Linear):
            fit[name] = layer
        else:
            skipped[name] = reason or ""
    return fit, skipped


def require_some(fit: dict[str, nn.Linear], skipped: dict[str, str], to_what: str, advice: str) -> None:
    """TargetError with all reasons if no layer is left: the model would be as slow as before."""
    if not fit:
        reasons = "; ".join(f"{len(names)} {why}: {listed(names, 3)}" for why, names in _by_reason(skipped).items())
        raise TargetError(f"No layer can be converted to {to_what} ({reasons or 'there is none'}). {advice}")


def require_cpu(model: nn.Module, function: str) -> None:
    """TargetError if a parameter is on another device."""
    device = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if device is not None:
        raise TargetError(f"{function} is for models on a CPU, and this one is on {device}. Use model.cpu().")


def replace_layers(model: nn.Module, fit: dict[str, nn.Linear], make: Callable[[nn.Linear], nn.Module]) -> None:
    """Each of the layers by what `make` makes of it, once, wherever it stands; nothing requires gradients any more.

    Raises:
        TargetError: the model is itself one of them.
    """
    if "" in fit:
        raise TargetError(
            "The model is itself a linear layer, which cannot be replaced in place. Wrap it in a module."
        )
    replacements = {id(layer): make(layer) for layer in fit.values()}
    for path, layer in list(model.named_modules(remove_duplicate=False)):
        if id(layer) in replacements:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacements[id(layer)])
    model.requires_grad_(False)


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return ((name, m) for name, m in model.named_modules() if isinstance(m, (nn.Linear, *convolutions)))


def _by_reason(skipped: dict[str, str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = defaultdict(list)
    for name, reason in skipped.items():
        found[reason].append(name or "the model")
    return found
