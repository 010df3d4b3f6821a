"""A masked model as path sums see it: what the path criteria (PX, SynFlow) share."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, TargetError, listed
from ..model.inputs import Inputs, run, run_with
from ..model.modes import full_precision
from ..model.outputs import Output
from ..model.wrappers import named_parameters
from ..ops import ForgottenError, Paths, Reading, Tracer, Weight
from .masking import masked


class PathNetwork:
    """A masked model and the readings of its weights."""

    def __init__(
        self,
        model: nn.Module,
        targets: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        order: int = 2,
        output: Output = None,
    ) -> None:
        self.model = model
        self.output = output
        self.order = order
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        self.masks = {p: masks[name].to(p.device) for name, p in named_parameters(model).items() if name in masks}
        self.targets = targets
        self.squares: dict[str, Tensor] = {}
        """θ² of the targets (|θ| where ``order`` is 1), once they have been read."""
        self.left_out: dict[str, None] = {}
        """Targets that no path can lead through."""
        self._forget = True

    def masks_only(self) -> dict[Tensor, Weight]:
        """Weights read as their masks, for h."""
        return {p: Weight(self.masks.get(p), self.masks.get(p)) for p in self._parameters()}

    def squared(self) -> dict[Tensor, Weight]:
        """Weights read as |θ|^order, for g and for active paths; those of the targets require gradients."""
        names = {p: name for name, p in self.targets.items()}
        weights: dict[Tensor, Weight] = {}
        for p in self._parameters():
            weight = masked(p, self.masks.get(p)).to(self.dtype)
            own = weight.data_ptr() != p.data_ptr()  # new memory, which can hold the square
            raised = weight if own else torch.empty_like(weight)
            square = torch.square(weight, out=raised) if self.order == 2 else torch.abs(weight, out=raised)
            if p in names:
                self.squares[names[p]] = square.requires_grad_(True)
            weights[p] = Weight(square, self.masks.get(p))
        return weights

    def path_sums(
        self, inputs: Inputs, start: Tensor, reading: Reading, weights: Mapping[Tensor, Weight]
    ) -> tuple[Tensor, Paths, list[Tensor]]:
        """The logits of the masked network, the path sums [N, K] that arrive there, and `Tracer.met`."""
        images = inputs.images.detach().view(inputs.images.shape)  # a tensor object of our own
        try:
            with torch.no_grad(), Tracer(self.model, reading, weights, self.dtype, self._forget) as tracer:
                tracer.start(images, start)
                logits = run(self.model, inputs.with_images(images), self.output)
        except ForgottenError:
            self._forget = False
            return self.path_sums(inputs, start, reading, weights)
        paths = tracer.paths(logits)
        if paths is None:
            raise TargetError(
                f"no path leads from the images to the output of {type(self.model).__name__}: the output does not "
                "depend on the images, or only through a frozen factor."
            )
        return logits, Paths(paths.data, paths.exponent), tracer.met  # without the history of all sums

    def each_gradient(
        self,
        take: Callable[[str, Tensor], None],
        output: Tensor,
        weight: Tensor,
        met: list[Tensor],
        inputs: Inputs,
    ) -> None:
        """Hand ∂(Σ output ⊙ weight)/∂θ² of each target to ``take`` as it is found: they are never held together.

        Nobody needs a target's θ² any more when its gradient is there, so ``take`` may write to either.
        """
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
                f"the output depends on {len(lost)} prunable weight(s) that no path leads through: {listed(lost)}. "
                "They act only through a factor that the op rules freeze. Keep them out of pruning, or use a "
                "criterion that needs no paths (Magnitude)."
            )
        self.left_out |= dict.fromkeys(names)
        if len(self.left_out) == len(self.squares):
            raise TargetError(f"no path leads through any of the prunable weights: {listed(names)}.")

    def _influential(self, names: list[str], inputs: Inputs) -> list[str]:
        """Those of the targets that the network's own output depends on."""
        leaves = {name: self.targets[name].detach().clone().requires_grad_(True) for name in names}
        with torch.enable_grad():
            logits = run_with(self.model, leaves, inputs, self.output)
            if not logits.requires_grad:
                return []
            found = torch.autograd.grad(logits.sum(), list(leaves.values()), allow_unused=True)
        return [name for name, gradient in zip(names, found, strict=True) if gradient is not None]

    def warn_of_left_out(self) -> None:
        if self.left_out:
            warnings.warn(
                f"{len(self.left_out)} prunable weight(s) get no score and stay dense, because no path leads through "
                f"them (their output is not used, or their input does not depend on the images): "
                f"{listed(self.left_out)}.",
                stacklevel=5,
            )

    def any_kept(self) -> bool:
        """Whether a target has a weight other than 0."""
        return any(bool(masked(p, self.masks.get(p)).any()) for p in self.targets.values())

    def _parameters(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.is_floating_point()]


class PathScores:
    """θ² · (∂R/∂θ²)^power of one target after another, each in the memory of its θ²."""

    def __init__(self, network: PathNetwork, power: float) -> None:
        self._network = network
        self._power = power
        self._scores: dict[str, Tensor] = {}

    @torch.no_grad()
    def take(self, name: str, gradient: Tensor) -> None:
        """``gradient`` is overwritten, as is θ²."""
        if self._power == 0.25:  # px-active's; five times faster than pow
            flow = gradient.sqrt_().sqrt_()
        else:
            flow = gradient if self._power == 1 else gradient.pow_(self._power)
        self._scores[name] = self._network.squares[name].detach().mul_(flow)

    def result(self, exponent: int) -> dict[str, Tensor]:
        """The scores, if 2**exponent times what was taken is ∂R/∂θ²: without that factor if it would leave the
        dtype's range.

        Raises:
            NonFiniteError: a score is NaN or infinite; names the weight.
        """
        scores = {name: self._scores.pop(name) for name in self._network.squares if name in self._scores}
        largest = 0.0
        for name, score in scores.items():
            top = float(score.max())  # NaN if there is one
            if not math.isfinite(top):
                raise NonFiniteError(
                    f"{int((~torch.isfinite(score)).sum())} score(s) of {name} are not finite; "
                    "check the weights and BatchNorm statistics of the model for NaN and infinity."
                )
            largest = max(largest, top)
        if largest == 0 and self._network.any_kept():
            warnings.warn(
                "every score is 0: no path from the images to the output survives. A classifier head initialised to "
                "zeros does this (initialise it, or fit it first), and so does a layer that has been pruned empty.",
                stacklevel=4,
            )
        factor = exponent * self._power
        limit = 500 if self._network.dtype == torch.float64 else 60
        if largest > 0 and factor and abs(factor + math.log2(largest)) < limit and abs(factor) < limit:
            for score in scores.values():
                score *= 2.0**factor
        return scores
