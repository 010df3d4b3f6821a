"""Layer by layer: least squares for what stays of each weight, and for its bias.

In running order, for a layer with inputs X̂ in the network as it is pruned and repaired so far, and outputs Y in the
dense network on its own inputs, the kept weights Ŵ and the bias b̂ minimise

    ‖X̂ Ŵᵀ + b̂ − Y‖² + Σ_j λ_j ‖Ŵ_j − W_j‖²,        λ_j = ridge · (X̂ᵀX̂)_jj,

from where they stand, W. The rows of X̂ and Y are those of all tokens, or positions; that of the class token, which the
classifier reads, counts `class_token` times. The ridge holds what the images do not say. A layer whose error on the
images held out grew stays as it was.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import processes, raise_together
from ..errors import NonFiniteError
from ..scoring.sums import sum_aligned_
from .calls import LayerCall
from .gram import Sums
from .images import Part
from .outcome import LayerRepair
from .probe import Layer
from .solver import solve
from .walk import Walk


@dataclass(frozen=True)
class LeastSquares:
    """Settings: ``ridge`` relative to the diagonal of the Gram matrix, the most ``iterations`` of the solver, and how
    often the ``class_token`` counts.
    """

    ridge: float
    iterations: int
    class_token: float = 1.0

    def repair_(self, walk: Walk, layers: tuple[Layer, ...], masks: Mapping[str, Tensor]) -> list[LayerRepair]:
        """Repair layers that have the same input, in the tensors of the sparse network.

        Raises:
            NonFiniteError: inputs or outputs of a layer are not finite.
        """
        fitted, held_out = self._sums(walk, layers)
        sparse = walk.networks["sparse"]
        found = []
        for layer in layers:
            sums, apart = fitted[layer.name], held_out[layer.name]
            weight = sparse.tensors[layer.name]
            mask = masks[layer.name].to(weight.device)
            delta = self._change(sums, mask)
            before, after = apart.error(), apart.error(delta)
            improved = after < before or float(apart.rows) == 0
            found.append(
                LayerRepair(
                    layer.name, rows=int(sums.rows), inputs=sums.gram.shape[-1] - sums.with_bias,
                    error_before=sums.error(), error_after=sums.error(delta) if improved else sums.error(),
                    held_out_before=before, held_out_after=after if improved else before, repaired=improved,
                )
            )  # fmt: skip
            if improved:
                _write(sparse.tensors, layer, delta, mask)
        return found

    def _change(self, sums: Sums, mask: Tensor) -> Tensor:
        """δ [G, o, d] in the order of the sums, the bias last."""
        kind = torch.float64 if sums.double else torch.float32
        groups, outputs, _ = sums.cross.shape
        support = mask.reshape(groups, outputs, -1)
        ridge = self.ridge * sums.gram.diagonal(dim1=-2, dim2=-1)
        if sums.with_bias:
            support = torch.cat((support, support.new_ones(groups, outputs, 1)), dim=2)
            ridge[:, -1] = 0
        delta = solve(sums.gram.to(kind), sums.cross.to(kind), support, ridge.to(kind), self.iterations)
        if processes().world_size > 1:  # the same bits on every machine
            dist.broadcast(delta, src=0)
        return delta

    def _sums(self, walk: Walk, layers: tuple[Layer, ...]) -> tuple[dict[str, Sums], dict[str, Sums]]:
        fitted, held_out = ({layer.name: _empty(walk, layer) for layer in layers} for _ in range(2))
        problem: NonFiniteError | None = None
        try:
            for part in walk.parts:
                _add(walk, part, layers, held_out if part.held_out else fitted, self.class_token)
            for layer in layers:
                if not (fitted[layer.name].finite() and held_out[layer.name].finite()):
                    raise NonFiniteError(
                        f"inputs or outputs of the layer of {layer.name} are not finite, or too large to be squared. "
                        "Check the images and the weights for NaN and infinity; nothing was changed."
                    )
        except NonFiniteError as error:
            problem = error
        raise_together(problem)
        for sums in (fitted, held_out):
            for each in sums.values():
                sum_aligned_(each.tensors(), 0)
        return fitted, held_out


def _empty(walk: Walk, layer: Layer) -> Sums:
    sparse = walk.networks["sparse"]
    return Sums(sparse.tensors[layer.name], layer.groups, layer.bias in sparse.tensors)


def _add(walk: Walk, part: Part, layers: tuple[Layer, ...], sums: Mapping[str, Sums], class_token: float) -> None:
    counts = {layer.name: len(layer.times) for layer in layers}
    outputs: dict[str, deque[Tensor]] = {name: deque() for name in counts}
    dense, sparse = walk.networks["dense"], walk.networks["sparse"]

    def keep(call: LayerCall) -> None:
        outputs[call.name].append(call.output.clone())  # an activation in place may follow

    def add(call: LayerCall) -> None:
        sums[call.name].add(call, outputs[call.name].popleft(), class_token)

    dense.watch(counts, keep, lambda: walk.forward("dense", part))
    sparse.watch(counts, add, lambda: walk.forward("sparse", part))


def _write(tensors: dict[str, Tensor], layer: Layer, delta: Tensor, mask: Tensor) -> None:
    """Add the change to the weight, pruned weights at zero, and to the bias."""
    weight = tensors[layer.name]
    inputs = weight[0].numel()
    changed = weight.double() + delta[..., :inputs].double().reshape(weight.shape)
    tensors[layer.name] = torch.where(mask, changed, 0.0).to(weight.dtype)
    if delta.shape[-1] > inputs:
        assert layer.bias is not None
        bias = tensors[layer.bias]
        tensors[layer.bias] = (bias.double() + delta[..., -1].double().flatten()).to(bias.dtype)
