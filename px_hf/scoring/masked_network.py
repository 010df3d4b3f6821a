"""A masked model as a function of its prunable weights, for criteria that differentiate it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..distributed import processes
from ..errors import NonFiniteError, TargetError, listed
from ..model.inputs import Batches, Inputs, inputs_of, require_finite, run_with
from ..model.modes import evaluating, full_precision
from ..model.outputs import Output
from ..model.wrappers import named_buffers, named_parameters
from .masking import masked
from .sums import sum_aligned_

Tensors = dict[str, Tensor]

_NUMBERS_AT_A_TIME = 2**20
"""Gradients need all activations. So a batch goes through in parts of at most so many numbers (6 images of
3 × 224 × 224): memory does not depend on the batch size."""


class MaskedNetwork:
    """The model in eval mode, pruned weights at zero, in float32 (float64 where the model is).

    Nothing is written to the model: weights, and whatever else is floating, are passed to its forward.

    Attributes:
        weights: name -> the prunable weights θ ⊙ m, detached.
        left_out: names of prunable weights that the output does not depend on.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        output: Output = None,
    ) -> None:
        self.model = model
        self.output = output
        self.masks = masks
        self.left_out: dict[str, None] = {}
        double = any(p.dtype == torch.float64 for p in self.model.parameters())
        self.dtype = torch.float64 if double else torch.float32
        self.device = next(iter(targets.values())).device
        values = {**named_buffers(model), **named_parameters(model)}
        with torch.inference_mode(False):
            floats = {
                name: masked(value, self.masks.get(name)).to(self.dtype)
                for name, value in values.items()
                if value.is_floating_point()
            }
        self.weights = {name: floats.pop(name) for name in targets}
        self._fixed = floats

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Eval mode, gradients on, no autocast; attention spelt out, since its fused kernels have no second
        derivative and no rule for vmap."""
        with (
            evaluating(self.model),
            torch.enable_grad(),
            full_precision(self.device),
            sdpa_kernel(SDPBackend.MATH),
        ):
            yield

    def leaves(self) -> Tensors:
        """The weights as variables to differentiate with respect to."""
        return {name: weight.clone().requires_grad_(True) for name, weight in self.weights.items()}

    def logits(self, inputs: Inputs, weights: Mapping[str, Tensor]) -> Tensor:
        """f(x; weights), [N, K], the logits or what ``output`` says; ``weights`` may also name buffers."""
        given = inputs.with_images(inputs.images.to(self.dtype))
        return run_with(self.model, {**self._fixed, **weights}, given, self.output)

    def gradients(self, output: Tensor, leaves: Tensors, create_graph: bool = False) -> Tensors:
        """∂output/∂leaf; a leaf that the output does not depend on is left out."""
        found = torch.autograd.grad(output, list(leaves.values()), create_graph=create_graph, allow_unused=True)
        missing = [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]
        self.left_out |= dict.fromkeys(missing)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def total(self, batches: Batches, term: Callable[[Inputs, int, int], Tensors]) -> Tensors:
        """Σ term(part, batch, part of the batch) over the batches of all processes, in float64.

        Batch i is the work of process i mod N. Its term is the same wherever it is computed, and sums of
        float32 numbers in float64 do not depend on their order: see `px_hf.scoring.sums`.
        """
        group = processes()
        total: Tensors = {}
        mine = False
        for index, inputs in enumerate(inputs_of(batches, self.model)):
            if index % group.world_size == group.rank:
                mine = True
                for number, part in enumerate(inputs.parts(_NUMBERS_AT_A_TIME)):
                    _add_(total, term(part, index, number))
        if not mine:  # no batch of its own, but it must know the names that the others add up
            first = next(next(inputs_of(batches, self.model)).parts(_NUMBERS_AT_A_TIME))
            total = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in term(first, 0, 0).items()}
        if not total:
            raise TargetError(
                f"the output of {type(self.model).__name__} does not depend on any of its prunable weights: "
                f"{listed(self.weights)}."
            )
        sum_aligned_(total, 0 if mine else None)
        return total

    def scores(self, values: Tensors) -> Tensors:
        """``values`` rounded to the dtype of the network.

        Values far outside the range of float32 are all multiplied by one power of two.

        Raises:
            NonFiniteError: a value is NaN or infinite; names the weight.
        """
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise NonFiniteError(
                    f"{int((~torch.isfinite(value)).sum())} score(s) of {name} are not finite; check the weights, the "
                    "BatchNorm statistics and the images for NaN and infinity."
                )
        left_out = [name for name in self.left_out if name not in values]
        if left_out and processes().is_main:
            warnings.warn(
                f"{len(left_out)} prunable weight(s) get no score and stay dense, because the output does not "
                f"depend on them: {listed(left_out)}.",
                stacklevel=4,
            )
        largest = max(float(value.abs().max()) for value in values.values())
        if largest == 0:
            warnings.warn(
                "every score is 0: nothing that a weight does reaches the output. A classifier head initialised to "
                "zeros does this (initialise it, or fit it first), and so does a layer that has been pruned empty.",
                stacklevel=4,
            )
        exponent = int(torch.frexp(torch.tensor(largest, dtype=torch.float64)).exponent)
        factor = 2.0**-exponent if abs(exponent) > 60 else 1.0
        return {name: (value * factor).to(self.dtype) for name, value in values.items()}


def finite_logits(network: MaskedNetwork, inputs: Inputs, weights: Mapping[str, Tensor], batch: int) -> Tensor:
    """f(x; weights).

    Raises:
        NonFiniteError: it is not finite; names the batch.
    """
    logits = network.logits(inputs, weights)
    require_finite(logits, batch)
    return logits


def _add_(total: Tensors, terms: Tensors) -> None:
    for name, term in terms.items():
        if name in total:
            total[name].add_(term)
        else:
            total[name] = term.detach().to(torch.float64, copy=True)
