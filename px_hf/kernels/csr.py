"""Very sparse linear layers on a CPU: torch's CSR product, which is MKL's, on a few rows at a time.

A weight W [out, in] is stored row by row as its non-zero values and their columns (CSR, 32-bit indices, which MKL
takes as they are), and `Y = X Wᵀ + b` is computed as `(W X_iᵀ)ᵀ + b` for slices X_i of 64 rows. On more rows at once
the product no longer fits the cache and loses to the dense one. Time goes with the number of non-zeros: with one
thread of an AVX-512 machine, layers of ViT-B/16 take 0.6 times the dense time at 90 % sparsity, 0.4 at 95 %, 0.3 at
98 %, and as long as the dense ones at 80 % (docs/SPEED.md). Convolutions by im2col gain in late stages only and lose
in early ones, so they stay dense.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ..errors import InvalidArgumentError
from ..model.wrappers import unwrap
from .conversion import Conversion, replace_layers, require_cpu, require_some, sort_out

_ROWS = 64
_DTYPES = (torch.float32, torch.float64)


def accelerate_csr_(model: nn.Module, min_sparsity: float = 0.85, min_weights: int = 2**18) -> Conversion:
    """Replace the large linear layers of a model on a CPU that are mostly zeros, in place, for inference.

        print(px.accelerate_csr_(px.from_pretrained("out")))

    Logits stay the same up to rounding. No gradients flow through such a layer, and the model's parameters no longer
    require any. Its `weight` is a sparse CSR tensor: save the model before.

    `min_sparsity`: the least share of zeros, in [0, 1]; below about 0.8 the dense product is faster.
    `min_weights`: the least number of weights, zeros included; in smaller layers than 512 × 512 the work of starting
    the kernels eats the gain.

    Raises:
        InvalidArgumentError: `min_sparsity` is out of range.
        TargetError: the model is not on a CPU or has no such layer; it is left as it was.
    """
    if not 0 <= min_sparsity <= 1:
        raise InvalidArgumentError(f"min_sparsity={min_sparsity!r}: expected a fraction in [0, 1].")
    model = unwrap(model)
    require_cpu(model, "accelerate_csr_")

    def unfit(layer: nn.Linear) -> str | None:
        if layer.weight.dtype not in _DTYPES:
            return f"{layer.weight.dtype} and not float32 or float64"
        if layer.weight.numel() < min_weights:
            return f"smaller than {min_weights:,} weights"
        kept = int(layer.weight.count_nonzero()) / max(1, layer.weight.numel())
        return None if 1 - kept >= min_sparsity else f"less than {min_sparsity:.0%} sparse"

    fit, skipped = sort_out(model, unfit)
    require_some(fit, skipped, "CSR", "Prune more, apply the masks, or lower min_sparsity.")
    replace_layers(model, fit, CSRLinear)
    return Conversion(tuple(fit), skipped)


class CSRLinear(nn.Module):
    """`Y = X Wᵀ + b` of an `nn.Linear` whose weight is mostly zeros: X [..., in] -> Y [..., out]."""

    crow_indices: Tensor
    col_indices: Tensor
    values: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta", UserWarning)
            weight = layer.weight.detach().to_sparse_csr()
        self.register_buffer("crow_indices", weight.crow_indices().int())
        self.register_buffer("col_indices", weight.col_indices().int())
        self.register_buffer("values", weight.values())
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """W [out, in], sparse CSR."""
        size = (self.out_features, self.in_features)
        return torch.sparse_csr_tensor(self.crow_indices, self.col_indices, self.values, size, check_invariants=False)

    def forward(self, input: Tensor) -> Tensor:
        rows, weight = input.detach().reshape(-1, self.in_features), self.weight
        output = rows.new_empty(len(rows), self.out_features)
        for part, out in zip(rows.split(_ROWS), output.split(_ROWS), strict=True):
            product = (weight @ part.t()).t()
            if self.bias is None:
                out.copy_(product)
            else:
                torch.add(product, self.bias, out=out)
        return output.view(*input.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, kept={self.values.numel()}"
