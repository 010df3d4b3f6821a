"""What is pruned: sparsity, parameters and effective MACs, per layer and in total.

    print(report(model, masks))
    report(model, masks, example=torch.zeros(1, 3, 32, 32)).to_dict()

MACs (multiply-accumulates of one image) are those of `torch.utils.flop_counter`, halved, which counts
attention too. The effective MACs of a layer are its MACs times its density, as if a runtime skipped the pruned
weights. Dense kernels multiply by the zeros all the same and do not get faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .masks import Masks
from .model.adapters import adapters_off, added_modules
from .model.example import default_example
from .model.inputs import Inputs, call, inputs_of
from .model.modes import evaluating
from .model.quantized import plain_weights
from .model.shards import gathered, shards_of
from .model.wrappers import unwrap


@dataclass(frozen=True)
class Layer:
    """One masked weight: its name, shape, counts of weights, and MACs of one image (None: not counted)."""

    name: str
    shape: tuple[int, ...]
    kept: int
    weights: int
    macs: int | None

    @property
    def sparsity(self) -> float:
        """The pruned fraction, in [0, 1]; 0 for a tensor without elements."""
        return 1 - self.kept / self.weights if self.weights else 0.0

    @property
    def effective_macs(self) -> int | None:
        """MACs of the kept weights."""
        return None if self.macs is None else round(self.macs * self.kept / max(1, self.weights))


@dataclass(frozen=True)
class Report:
    """What `report` returns: `str()` is a table, `to_dict()` is for JSON.

    `parameters` counts all parameters of the model, masked or not, `macs` all MACs of one image or None;
    `note` says what was counted on, or why nothing was.
    """

    layers: tuple[Layer, ...]
    parameters: int
    macs: int | None
    note: str

    @property
    def weights(self) -> int:
        """The masked weights, kept and pruned."""
        return sum(layer.weights for layer in self.layers)

    @property
    def kept(self) -> int:
        """The masked weights that are kept."""
        return sum(layer.kept for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The pruned fraction of the masked weights."""
        return (self.weights - self.kept) / self.weights

    @property
    def parameters_kept(self) -> int:
        """All parameters that are not pruned."""
        return self.parameters - (self.weights - self.kept)

    @property
    def parameter_sparsity(self) -> float:
        """The pruned fraction of all parameters."""
        return (self.weights - self.kept) / self.parameters

    @property
    def effective_macs(self) -> int | None:
        """All MACs less those of pruned weights."""
        if self.macs is None:
            return None
        return self.macs - sum((layer.macs or 0) - (layer.effective_macs or 0) for layer in self.layers)

    @property
    def emptied(self) -> tuple[str, ...]:
        """Names of the layers that lost all their weights."""
        return tuple(layer.name for layer in self.layers if layer.weights and not layer.kept)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON can say it."""
        return {
            "sparsity": self.sparsity,
            "weights": self.weights,
            "weights_kept": self.kept,
            "parameters": self.parameters,
            "parameters_kept": self.parameters_kept,
            "parameter_sparsity": self.parameter_sparsity,
            "macs": self.macs,
            "effective_macs": self.effective_macs,
            "note": self.note,
            "emptied": list(self.emptied),
            "layers": [
                {
                    **asdict(layer),
                    "shape": list(layer.shape),
                    "sparsity": layer.sparsity,
                    "effective_macs": layer.effective_macs,
                }
                for layer in self.layers
            ],
        }

    def __str__(self) -> str:
        rows = [("layer", "shape", "sparsity", "kept", "weights", "MACs", "effective MACs")]
        rows += [
            (
                layer.name,
                "×".join(map(str, layer.shape)),
                f"{layer.sparsity:.4f}",
                f"{layer.kept:,}",
                f"{layer.weights:,}",
                _count(layer.macs),
                _count(layer.effective_macs),
            )
            for layer in self.layers
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        table = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in rows
        ]
        lines = [table[0], "-" * len(table[0]), *table[1:], ""]
        lines += [
            f"Masked weights   {self.kept:,} of {self.weights:,} kept, sparsity {self.sparsity:.4f}",
            f"All parameters   {self.parameters_kept:,} of {self.parameters:,} kept, "
            f"sparsity {self.parameter_sparsity:.4f}",
        ]
        if self.macs is not None:
            lines += [
                f"MACs per image   {self.macs:,} dense, {self.effective_macs:,} effective",
                "Effective: pruned weights skipped, as a sparse runtime could; dense kernels do not get faster.",
            ]
        lines.append(self.note)
        if self.emptied:
            lines.append(f"Warning: all weights are pruned in {', '.join(self.emptied)}. Prune less, or by layer.")
        return "\n".join(lines)


def report(model: nn.Module, masks: Masks, example: Any = None) -> Report:
    """Per-layer and total sparsity, parameters and effective MACs of `model` under `masks`.

    `example`: one batch of images as the model takes them (a tensor [N, C, H, W], a pair (images, labels), or
    a mapping with `pixel_values`) to count the MACs on; they are divided by N. By default one image of zeros
    of the size that the configuration names (transformers: `image_size`, `num_channels`; timm: `input_size`);
    where it names none, MACs are left out.

    The masks need not be applied. The model is run once, in eval mode, and left as it was. Adapters of peft are
    not counted. Of a model that is sharded (FSDP2) all processes call it, and hold it whole meanwhile.

    Raises:
        TargetError: the masks do not fit the model.
        DataError: the example is no batch of images.
    """
    model = unwrap(model)
    if shards_of(model) is not None:
        masks = masks.whole()
        with gathered(model):
            return report(model, masks, example)
    parameters = masks.match(model)
    guessed = example is None
    if guessed:
        example = default_example(model)
    flops: _Flops | None = None
    if example is None:
        note = "MACs were not counted: the model's configuration names no image size. Pass example=images."
    else:
        inputs = next(inputs_of([example], model))
        images = inputs.images
        note = f"MACs counted on {'zeros' if guessed else 'the example'} of shape {list(images.shape)}."
        try:
            flops = _count_flops(model, inputs)
        except Exception as error:
            if not guessed:
                raise
            note = f"MACs were not counted: on {list(images.shape)} the model fails ({error}). Pass example=images."
    first_names = {parameter: name for name, parameter in reversed(parameters.items())}  # tied weights count once
    macs: dict[nn.Parameter, int] = {}
    if flops is not None:
        per_weight = _flops_of_weights(model, flops, set(first_names))
        macs = {parameter: per_weight[parameter] // (2 * len(images)) for parameter in first_names}
    return Report(
        layers=tuple(
            Layer(
                name=name,
                shape=tuple(parameter.shape),
                kept=int(masks.tensors[name].count_nonzero()),
                weights=parameter.numel(),
                macs=macs.get(parameter),
            )
            for name, parameter in parameters.items()
            if first_names[parameter] == name
        ),
        parameters=sum(parameter.numel() for parameter in _own_parameters(model)),
        macs=None if flops is None else sum(flops["Global"].values()) // (2 * len(images)),
        note=note,
    )


_Flops = Mapping[str, Mapping[Any, int]]
"""FlopCounterMode's: class of the model and path of the module, "Global" for all -> op -> 2 × MACs."""


def _own_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All but those that peft has added."""
    added = {parameter for module in added_modules(model) for parameter in module.parameters(recurse=False)}
    return [parameter for parameter in model.parameters() if parameter not in added]


def _count_flops(model: nn.Module, inputs: Inputs) -> _Flops:
    fused_attention = torch.backends.mha.get_fastpath_enabled()
    counter = FlopCounterMode(display=False)
    with evaluating(model), adapters_off(model), plain_weights(model), _buffers_kept(model), torch.no_grad():
        try:
            # The fused inference kernel of nn.MultiheadAttention is one op that is not counted.
            torch.backends.mha.set_fastpath_enabled(False)
            # So is that of attention on a CPU, in some versions of torch; two matrix products are counted in all.
            with sdpa_kernel(SDPBackend.MATH), counter:
                call(model, inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused_attention)
    return {"Global": {}, **counter.get_flop_counts()}


def _flops_of_weights(model: nn.Module, flops: _Flops, weights: set[nn.Parameter]) -> dict[nn.Parameter, int]:
    """The operations of each of `weights`: those of the module that owns it, however often it is called.

    Operations of the modules inside belong to those. Weights of one module share its operations by size.
    """
    found = dict.fromkeys(weights, 0)
    root = type(model).__name__
    for name, module in model.named_modules(remove_duplicate=False):
        path = f"{root}.{name}" if name else root
        by_op = flops.get(path, {})
        own = sum(by_op.values()) - sum(
            sum(flops.get(f"{path}.{child}", {}).values()) for child, _ in module.named_children()
        )
        shared = [parameter for parameter in module.parameters(recurse=False) if parameter in weights]
        if isinstance(module, nn.MultiheadAttention):
            # It multiplies by its projections, the one in out_proj too, without calling a module.
            own = sum(count for op, count in by_op.items() if op in (torch.ops.aten.addmm, torch.ops.aten.mm))
            shared = [parameter for parameter in module.parameters() if parameter.dim() == 2]
        size = sum(parameter.numel() for parameter in shared)
        for parameter in shared:
            if parameter in weights:
                found[parameter] += own * parameter.numel() // max(1, size)
    return found


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
