"""The arguments of LoRA, and where in a network the adapters are put."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn
from transformers import set_seed

import px_hf as px

from ..errors import listed
from ..model.targets import head_modules, prunable

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
"""Layers that are trained whole, as the head is: few parameters, and BatchNorm learns its statistics anyway."""


@dataclass
class LoraArguments:
    """Low-rank adapters instead of all weights."""

    topic: ClassVar[str] = "lora"

    lora: bool = field(
        default=False,
        metadata={
            "help": "Fine-tune by LoRA: adapters under the masks of the sparse network, head and normalisation layers "
            "whole; the adapters are merged in the end, with the zeros kept. Needs pip install px-hf[peft]."
        },
    )
    lora_rank: int = field(default=8, metadata={"help": "Rank of the adapters, 1 or more."})
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are scaled by alpha / rank. Default: twice the rank."}
    )
    lora_targets: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get adapters, by the ends of their names, as in q_proj v_proj. Default: all."},
    )

    def check_lora(self) -> None:
        """Find out before any work what cannot be.

        Raises:
            InvalidArgumentError: a setting outside its range, or without `--lora`.
            DependencyError: peft is not installed.
        """
        if not self.lora:
            if (self.lora_rank, self.lora_alpha, self.lora_targets) != (8, None, None):
                raise px.InvalidArgumentError("--lora_rank, --lora_alpha and --lora_targets need --lora.")
            return
        if self.lora_rank < 1:
            raise px.InvalidArgumentError(f"--lora_rank {self.lora_rank}: expected 1 or more.")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            raise px.InvalidArgumentError(f"--lora_alpha {self.lora_alpha}: expected a positive number.")
        if importlib.util.find_spec("peft") is None:
            raise px.DependencyError('--lora needs peft: pip install "px-hf[peft]".')

    def describe_lora(self) -> dict[str, Any]:
        """The settings, as JSON can say them; empty without `--lora`."""
        if not self.lora:
            return {}
        settings = {"rank": self.lora_rank, "alpha": self.lora_alpha or 2.0 * self.lora_rank}
        return {"lora": {**settings, "targets": self.lora_targets or "all"}}

    def adapted(self, network: nn.Module, seed: int) -> Any:
        """`network` as a PeftModel: adapters that compute nothing yet, the same ones for the same seed.

        Raises:
            InvalidArgumentError: `lora_targets` names no layer that can have an adapter.
        """
        import peft

        told = self.describe_lora()["lora"]
        set_seed(seed)
        config = peft.LoraConfig(
            r=told["rank"],
            lora_alpha=told["alpha"],
            target_modules=_targets(network, self.lora_targets),
            modules_to_save=_trained_whole(network),
        )
        return peft.get_peft_model(network, config)


def _targets(network: nn.Module, names: Sequence[str] | None) -> list[str]:
    """The paths of the layers that get an adapter: plain linear layers and convolutions that can be pruned."""
    modules = dict(network.named_modules())
    inside = {
        each for module in modules.values() if isinstance(module, nn.MultiheadAttention) for each in module.modules()
    }
    able = [
        path
        for path in (name.removesuffix(".weight") for name in prunable(network))
        if type(module := modules.get(path)) in (nn.Linear, nn.Conv1d, nn.Conv2d)
        and getattr(module, "groups", 1) == 1
        and module not in inside
    ]
    if names is None:
        chosen = able
    else:
        unknown = [name for name in names if not any(_is_called(path, name) for path in able)]
        if unknown:
            ends = dict.fromkeys(path.rpartition(".")[2] for path in able)
            raise px.InvalidArgumentError(
                f"--lora_targets: no layer that can have an adapter is called {listed(unknown)}. There are "
                f"{listed(ends, 16)}."
            )
        chosen = [path for path in able if any(_is_called(path, name) for name in names)]
    if not chosen:
        raise px.InvalidArgumentError(
            f"--lora: {type(network).__name__} has no plain linear layer or convolution that could have an adapter."
        )
    return chosen


def _is_called(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _trained_whole(network: nn.Module) -> list[str]:
    """The paths of the head, and of the normalisation layers outside of it."""
    head = head_modules(network)
    found: list[str] = []
    for path, module in network.named_modules():
        if next(module.parameters(), None) is None or any(path.startswith(f"{above}.") for above in found):
            continue
        if module in head or (isinstance(module, NORMS) and path):
            found.append(path)
    return found
