"""Linear layers pruned by blocks (`scope="block:32"`) on a CPU: a dense product for each row of blocks.

For the b outputs of a row of blocks only the inputs of its kept blocks count, so `Y_i = W_i X[c_i]`, with W_i the kept
blocks side by side and c_i their inputs: ordinary matrix products of what is left, without sparse arithmetic. With one
thread of an AVX-512 machine and blocks of 32, layers of ViT-B/16 take as long as dense ones at 50 % sparsity, half of
that at 80 % and 0.3 at 90 %; torch's own product for block-sparse matrices (BSR, by MKL) takes 1.0 and 0.5 there
(docs/SPEED.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..model.wrappers import unwrap
from .conversion import Conversion, replace_layers, require_cpu, require_some, sort_out


def accelerate_blocks_(model: nn.Module, size: int = 32, min_sparsity: float = 0.6) -> Conversion:
    """Replace the linear layers of a model on a CPU whose blocks are mostly zeros, in place, for inference.

        print(px.accelerate_blocks_(px.from_pretrained("out"), size=32))

    Logits stay the same up to rounding. No gradients flow through such a layer, and the model's parameters no longer
    require any. Save the model before.

    `size`: of the blocks that the model was pruned by.
    `min_sparsity`: the least share of blocks that are zeros, in [0, 1]; below a half the dense product is faster.

    Raises:
        InvalidArgumentError: `size` or `min_sparsity` is out of range.
        TargetError: the model is not on a CPU or has no such layer; it is left as it was.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidArgumentError(f"size={size!r}: expected a whole number of at least 1.")
    if not 0 <= min_sparsity <= 1:
        raise InvalidArgumentError(f"min_sparsity={min_sparsity!r}: expected a fraction in [0, 1].")
    model = unwrap(model)
    require_cpu(model, "accelerate_blocks_")

    def unfit(layer: nn.Linear) -> str | None:
        if layer.out_features % size or layer.in_features % size:
            return f"without whole blocks of {size} × {size}"
        kept = blocks_kept(layer.weight, size)
        return None if 1 - float(kept.double().mean()) >= min_sparsity else f"less than {min_sparsity:.0%} zero blocks"

    fit, skipped = sort_out(model, unfit)
    require_some(fit, skipped, "blocks", f"Prune with scope='block:{size}', apply the masks, or lower min_sparsity.")
    replace_layers(model, fit, lambda layer: BlockLinear(layer, size))
    return Conversion(tuple(fit), skipped)


def blocks_kept(weight: Tensor, size: int) -> Tensor:
    """[out / b, in / b]: whether a block of [out, in] has a weight that is not zero."""
    return (weight.detach() != 0).unflatten(1, (-1, size)).unflatten(0, (-1, size)).any(3).any(1)


class BlockLinear(nn.Module):
    """`Y = X Wᵀ + b` of an `nn.Linear` of which blocks of `size` × `size` are zeros: X [..., in] -> Y [..., out]."""

    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, size: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.size = layer.in_features, layer.out_features, size
        weight = layer.weight.detach()
        kept = blocks_kept(weight, size)
        parts = [
            rows.unflatten(1, (-1, size))[:, mine].flatten()
            for rows, mine in zip(weight.split(size), kept, strict=True)
        ]
        self.register_buffer("values", torch.cat(parts))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self._columns = [mine.nonzero()[:, 0] for mine in kept]
        self.train(layer.training)

    def forward(self, input: Tensor) -> Tensor:
        x = input.detach().reshape(-1, self.in_features).t().contiguous()
        blocks = x.unflatten(0, (-1, self.size))
        output = x.new_empty(self.out_features, x.shape[1])
        sizes = [self.size * self.size * len(columns) for columns in self._columns]
        parts = zip(output.split(self.size), self.values.split(sizes), self._columns, strict=True)
        for rows, values, columns in parts:
            if len(columns):
                torch.mm(values.view(self.size, -1), blocks.index_select(0, columns).flatten(0, 1), out=rows)
            else:
                rows.zero_()
        result = output.t()
        result = result.contiguous() if self.bias is None else result + self.bias
        return result.reshape(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, size={self.size}, "
            f"kept={self.values.numel()}"
        )
