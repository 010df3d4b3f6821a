"""A masked model as path sums see it: what the path criteria (PX, SynFlow) share."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..batches import Inputs, run
from ..errors import NonFiniteError, TargetError
from ..modes import full_precision
from ..ops import Paths, Reading, Tracer, Weight
from .base import masked

Gradients = dict[str, Tensor]


class PathNetwork:
    """A masked model and the readings of its weights."""

    def __init__(
        self, model: nn.Module, targets: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], order: int = 2
    ) -> None:
        self.model = model
        self.order = order
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        self.masks = {p: masks[name].to(p.device) for name, p in model.named_parameters() if name in masks}
        self.targets = targets
        self.squares: dict[str, Tensor] = {}
        """θ² of the targets (|θ| where ``order`` is 1), once they have been read."""
        self.left_out: dict[str, None] = {}
        """Targets that no path can lead through."""

    def masks_only(self) -> dict[Tensor, Weight]:
        """Weights read as their masks, for h."""
        return {p: Weight(self.masks.get(p), self.masks.get(p)) for p in self._parameters()}

    def squared(self) -> dict[Tensor, Weight]:
        """Weights read as |θ|^order, for g and for active paths; those of the targets require gradients."""
        names = {p: name for name, p in self.targets.items()}
        weights: dict[Tensor, Weight] = {}
        for p in self._parameters():
            weight = masked(p, self.masks.get(p)).to(self.dtype)
            square = weight.square() if self.order == 2 else weight.abs()
            if p in names:
                self.squares[names[p]] = square.requires_grad_(True)
            weights[p] = Weight(square, self.masks.get(p))
        return weights

    def path_sums(
        self, inputs: Inputs, start: Tensor, reading: Reading, weights: Mapping[Tensor, Weight]
    ) -> tuple[Tensor, Paths, list[Tensor]]:
        """The logits of the masked network, the path sums [N, K] that arrive there, and `Tracer.met`."""
        images = inputs.images.detach().view(inputs.images.shape)  # a tensor object of our own
        with torch.no_grad(), Tracer(self.model, reading, weights, self.dtype) as tracer:
            tracer.start(images, start)
            logits = run(self.model, Inputs(images, inputs.others))
        paths = tracer.paths(logits)
        if paths is None:
            raise TargetError(
                f"no path leads from the images to the output of {type(self.model).__name__}: the output does not "
                "depend on the images, or only through a frozen factor."
            )
        return logits, paths, tracer.met

    def gradients(self, output: Tensor, weight: Tensor, met: list[Tensor], inputs: Inputs) -> Gradients:
        """∂(Σ output ⊙ weight)/∂θ² of every target that is not left out."""
        leaves = list(self.squares.values())
        with full_precision(output.device):
            found = torch.autograd.grad(output, leaves, weight.to(output), allow_unused=True)
        missing = [name for name, gradient in zip(self.squares, found, strict=True) if gradient is None]
        if missing:
            self._leave_out(missing, met, inputs)
        return {name: g for name, g in zip(self.squares, found, strict=True) if g is not None}

    def each_gradient(
        self,
        take: Callable[[str, Tensor], None],
        output: Tensor,
        weight: Tensor,
        met: list[Tensor],
        inputs: Inputs,
    ) -> None:
        """Hand ∂(Σ output ⊙ weight)/∂θ² of each target to ``take`` as it is found: they are never held together."""
        missing = dict.fromkeys(self.squares)

        def found(name: str, leaf: Tensor) -> None:
            assert leaf.grad is not None
            take(name, leaf.grad)
            leaf.grad = None
            del missing[name]

        hooks = [
            leaf.register_post_accumulate_grad_hook(functools.partial(found, name))
            for name, leaf in self.squares.items()
        ]
        try:
            with full_precision(output.device):
                torch.autograd.backward(output, weight.to(output), inputs=list(self.squares.values()))
        finally:
            for hook in hooks:
                hook.remove()
        if missing:
            self._leave_out(list(missing), met, inputs)

    def _leave_out(self, names: list[str], met: list[Tensor], inputs: Inputs) -> None:
        """Note that no path can lead through the targets of those names.

        Raises:
            TargetError: one of them acts on activations and the output depends on it, so there is a path.
        """
        reached: Sequence[Tensor | None] = [None] * len(names)
        if met:
            leaves = [self.squares[name] for name in names]
            with torch.enable_grad():
                sums = [m.sum() for m in met if m.requires_grad]
            reached = torch.autograd.grad(sums, leaves, allow_unused=True)
        acting = [name for name, gradient in zip(names, reached, strict=True) if gradient is not None]
        lost = self._influential(acting, inputs) if acting else []
        if lost:
            raise TargetError(
                f"the output depends on {len(lost)} prunable weight(s) that no path leads through: {_shown(lost)}. "
                "They act only through a factor that the op rules freeze. Keep them out of pruning, or use a "
                "criterion that needs no paths (Magnitude)."
            )
        self.left_out |= dict.fromkeys(names)
        if len(self.left_out) == len(self.squares):
            raise TargetError(f"no path leads through any of the prunable weights: {_shown(names)}.")

    def _influential(self, names: list[str], inputs: Inputs) -> list[str]:
        """Those of the targets that the network's own output depends on."""
        leaves = {f"model.{name}": self.targets[name].detach().clone().requires_grad_(True) for name in names}
        with torch.enable_grad():
            logits = torch.func.functional_call(_Run(self.model), leaves, (inputs,))
            if not logits.requires_grad:
                return []
            found = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
        return [name for name, gradient in zip(names, found, strict=True) if gradient is not None]

    def warn_of_left_out(self) -> None:
        if self.left_out:
            warnings.warn(
                f"{len(self.left_out)} prunable weight(s) get no score and stay dense, because no path leads through "
                f"them (their output is not used, or their input does not depend on the images): "
                f"{_shown(list(self.left_out))}.",
                stacklevel=4,
            )

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.is_floating_point()]


class _Run(nn.Module):
    """`run` as a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Inputs) -> Tensor:
        return run(self.model, inputs)


def _shown(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def path_scores(squares: Mapping[str, Tensor], gradients: Gradients, exponent: int, power: float) -> dict[str, Tensor]:
    """θ² · (2**exponent · ∂R/∂θ²)^power, leaving out 2**exponent if that would leave the dtype's range."""
    scores = {}
    largest = 0.0
    for name, gradient in gradients.items():
        square = squares[name]
        flow = gradient if power == 1 else gradient**power
        scores[name] = square.detach() * flow
        top = float(scores[name].max())  # NaN if there is one
        if not math.isfinite(top):
            raise NonFiniteError(
                f"{int((~torch.isfinite(scores[name])).sum())} score(s) of {name} are not finite; "
                "check the weights and BatchNorm statistics of the model for NaN and infinity."
            )
        largest = max(largest, top)
    if largest == 0 and any(bool(square.detach().any()) for square in squares.values()):
        warnings.warn(
            "every score is 0: no path from the images to the output survives. A classifier head initialised to zeros "
            "does this (initialise it, or fit it first), and so does a layer that has been pruned empty.",
            stacklevel=2,
        )
    factor = exponent * power
    limit = 500 if next(iter(scores.values())).dtype == torch.float64 else 60
    if largest > 0 and abs(factor + math.log2(largest)) < limit and abs(factor) < limit:
        for name in scores:
            scores[name] *= 2.0**factor
    return scores
