"""What least squares needs to know of the images: sums of products, whose size does not depend on how many."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .calls import LayerCall


class Sums:
    """Σ over the rows of a layer, in float64: of X̂ᵀX̂, of RᵀX̂, of ‖R‖², of ‖Y‖², and how many rows.

    X̂ are the inputs in the sparse network, Y the outputs in the dense one, R the outputs that are missing: Y less
    those of the sparse network as it was. With a bias, X̂ has a last column of ones.

    The term of each chunk is computed in the dtype of the network (float32 at least) and is the same on whatever
    process; sums of float32 numbers in float64 are exact (`px_hf.scoring.sums`), so they do not depend on the order.
    """

    def __init__(self, weight: Tensor, groups: int, with_bias: bool) -> None:
        outputs = weight.shape[0] // groups
        inputs = weight[0].numel() + with_bias
        self.with_bias = with_bias
        self.double = weight.dtype == torch.float64

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=weight.device)

        self.gram, self.cross = zeros(groups, inputs, inputs), zeros(groups, outputs, inputs)
        self.missing, self.target, self.rows = zeros(), zeros(), zeros()

    def add(self, call: LayerCall, dense_output: Tensor, class_token: float = 1.0) -> None:
        """Add the rows of one call in the sparse network, and of the same call in the dense one.

        ``class_token``: the weight of the first row of each image, where a linear layer reads tokens [N, T, d].
        """
        kind = torch.float64 if call.weight.dtype == torch.float64 else torch.float32
        dense = dense_output.to(call.output.device, kind)
        gap = dense - call.output.to(kind)
        for rows, part in call.rows():
            inputs = rows.to(kind)
            if self.with_bias:
                inputs = torch.cat((inputs, inputs.new_ones(*inputs.shape[:2], 1)), dim=2)
            missing, wanted = call.outputs(gap, part), call.outputs(dense, part)
            if class_token != 1 and call.input.dim() == 3 and call.geometry is None:
                root = inputs.new_ones(call.input.shape[:2])
                root[:, 0] = math.sqrt(class_token)
                inputs, missing, wanted = (rows * root.reshape(1, -1, 1) for rows in (inputs, missing, wanted))
            self.gram += inputs.transpose(1, 2) @ inputs
            self.cross += missing.transpose(1, 2) @ inputs
            self.missing += missing.square().sum()
            self.target += wanted.square().sum()
            self.rows += inputs.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """The sums, to be added over the processes in place."""
        return {name: getattr(self, name) for name in ("gram", "cross", "missing", "target", "rows")}

    def finite(self) -> bool:
        """Whether inputs and outputs were finite, and their squares."""
        return bool(torch.isfinite(self.missing + self.target + self.gram.diagonal(dim1=-2, dim2=-1).sum()))

    def error(self, delta: Tensor | None = None) -> float:
        """‖R − X̂ δᵀ‖ / ‖Y‖, the relative error of the output after a change δ [G, o, d] of the weight."""
        missing = self.missing
        if delta is not None:
            delta = delta.double()
            missing = missing - 2 * (delta * self.cross).sum() + (delta * (delta @ self.gram)).sum()
        if float(self.target) == 0:
            return 0.0
        return float((missing.clamp(min=0) / self.target).sqrt())
