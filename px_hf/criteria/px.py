"""PX, Path eXclusion (Iurada, Ciccone, Tommasi, CVPR 2024, arXiv 2406.01820).

A path p leads from an input to an output through one weight per layer. With its value
``v_p = Π θ_j`` and its activation ``a_p(x)``, the product of the gates on it, the network is
``f_k(x) = Σ_p x_{in(p)} a_p(x) v_p`` and its neural tangent kernel Θ factors through paths, so that

    Tr Θ ≤ ‖J_v^f‖_F² · ‖J_θ^v‖_F²                                                    (Eq. 6)

Both factors follow from forward passes that name no path:

    h_k(x², 1, a)   squared input, every kept weight 1, the gates of the network at x   (data)
    g_k(1, θ²)      input of ones, squared weights, all gates open                      (no data)
    R = Σ_n Σ_k h_k(x_n², 1, a_n) · g_k(1, θ²)                                          (Eq. 8)
    S(θ) = ∂R/∂θ² ⊙ θ²                                                                  (Eq. 9)

===================== ========== ======================
paper                 here       shape
===================== ========== ======================
x_n                   images     [N, C, H, W]
Σ_n h_k               data       [K]
g_k                   kernel     [1, K]
θ²                    squares    name -> as θ
===================== ========== ======================

``g`` does not depend on x, so the vector Σ_n h_k is all that the data contributes: a round costs one
pass over the images without gradients and one backward pass of a single all-ones input.

``PX(paths="active")`` puts the gates inside the squared network, ``R = Σ_n Σ_k h_k(x_n², θ², a_n)``,
so that only active paths count.

Mind that Eq. 9 sees the data only through h_k, one number per class, and that these are all equal as
long as the last layer is dense: whatever reaches it goes to every class. With the classifier head left
dense, the default of `px.prune`, Eq. 9 therefore ranks weights without regard to the data, as
SynFlow-L2 with these op rules does. With ``prune_head=True`` they differ, from the second round on.
Active paths use the data in any case. (docs/MATHEMATICS.md has the proof, tests/test_theorems.py the test.)

Where this differs from the paper: what to do at ops other than convolution, ReLU and pooling is our
own, see `px_hf.ops`; the weights behind attention patterns and other gates share the flow through
them (`px_hf.ops.gates`). Where it differs from the published code (github.com/iurada/px-ntk-pruning,
ed6c40e): BatchNorm uses its running statistics and counts as part of the weights, no layer is
skipped by its name, and no absolute value is needed because every score is non-negative.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..batches import Batches, Inputs, inputs_of, require_finite, run
from ..distributed import processes
from ..errors import InvalidArgumentError, NonFiniteError, TargetError
from ..modes import evaluating, full_precision
from ..ops import ACTIVE, G, H, Paths, Reading, Tracer, Weight
from ..sums import exact_sum, sum_aligned_
from ..targets import prunable, unwrap
from .base import Criterion, masked

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class PX(Criterion):
    """Path eXclusion: ``S(θ) = θ² · (∂R/∂θ²)^power``.

    Args:
        paths: ``"all"`` for Eq. 9 of the paper, ``"active"`` for the paths that are active at the data.
        power: how far the flow through a weight may outweigh the weight itself, in [0, ∞): 1 is the
            paper's criterion, 0 is magnitude.

    Scores are float32 (float64 for a float64 model). They are those of the equation, unless these lie
    far outside the range of the dtype; then all are multiplied by one power of two.

    Raises:
        InvalidArgumentError: an unknown ``paths`` or a negative or non-finite ``power``.
    """

    paths: Literal["all", "active"] = "all"
    power: float = 1.0

    def __post_init__(self) -> None:
        if self.paths not in ("all", "active"):
            raise InvalidArgumentError(f"PX(paths={self.paths!r}): expected 'all' (Eq. 9) or 'active'.")
        if not (math.isfinite(self.power) and self.power >= 0):
            raise InvalidArgumentError(f"PX(power={self.power!r}): expected a finite number ≥ 0.")

    def score(
        self,
        model: nn.Module,
        batches: Batches,
        *,
        masks: Mapping[str, Tensor] | None = None,
        prune_head: bool = False,
    ) -> dict[str, Tensor]:
        """See `Criterion.score`. ``batches`` need no labels.

        A weight that no path can lead through gets no score, so it stays dense, and a warning names it:
        one whose output the network does not use (an auxiliary head), or whose input does not depend on
        the images (the network behind Swin V2's position bias, the queries of learned latents). Like a
        bias or a position embedding, such a weight starts no path.

        Raises:
            UnsupportedOpError: an op without a rule; lists all of them.
            TargetError: no path leads from the images to the output, or the paths through a weight that
                the output depends on were lost; names all of them.
            NonFiniteError: the network's output or a score is not finite.
        """
        model = unwrap(model)
        network = _Network(model, prunable(model, prune_head), masks or {})
        with evaluating(model):
            gradients, exponent = (_all_paths if self.paths == "all" else _active_paths)(network, batches)
        network.warn_of_left_out()
        return _scores(network.squares, gradients, exponent, self.power)


class _Network:
    """A masked model and the readings of its weights."""

    def __init__(self, model: nn.Module, targets: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        self.model = model
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in model.parameters()) else torch.float32
        self.masks = {p: masks[name].to(p.device) for name, p in model.named_parameters() if name in masks}
        self.targets = targets
        self.squares: dict[str, Tensor] = {}
        self.left_out: dict[str, None] = {}
        """Targets that no path can lead through."""

    def masks_only(self) -> dict[Tensor, Weight]:
        """Weights read as their masks, for h."""
        return {p: Weight(self.masks.get(p), self.masks.get(p)) for p in self._parameters()}

    def squared(self) -> dict[Tensor, Weight]:
        """Weights read as θ², for g and for active paths; those of the targets require gradients."""
        names = {p: name for name, p in self.targets.items()}
        weights: dict[Tensor, Weight] = {}
        for p in self._parameters():
            square = masked(p, self.masks.get(p)).to(self.dtype).square()
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


def _all_paths(network: _Network, batches: Batches) -> tuple[Gradients, int]:
    """∂R/∂θ² of Eq. 9, divided by 2**exponent."""
    group = processes()
    weights = network.masks_only()
    terms: list[tuple[Tensor, int]] = []
    probe: Inputs | None = None
    count = 0
    for count, inputs in enumerate(inputs_of(batches, network.model), start=1):
        if probe is None:
            probe = inputs.probe()
        if (count - 1) % group.world_size != group.rank:
            continue
        logits, paths, _ = network.path_sums(inputs, inputs.images.to(network.dtype).square(), H, weights)
        require_finite(logits, count - 1)
        terms.append((_per_class(paths.data.double()).cpu(), int(paths.exponent)))
    assert probe is not None
    _, kernel, met = network.path_sums(probe, probe.images.to(network.dtype), G, network.squared())
    out = _per_class(kernel.data)
    data, exponent = exact_sum(terms, out.numel(), count, probe.images.device)
    if not bool(torch.isfinite(data).all()):
        raise NonFiniteError("the sum over paths h(x², 1, a) is not finite: check the images and the model for NaN.")
    return network.gradients(out, data, met, probe), exponent + int(kernel.exponent)


def _per_class(sums: Tensor) -> Tensor:
    """[N, K, ...] -> [K]: added over the batch, and over positions where there are any."""
    return sums.transpose(0, 1).flatten(1).sum(1)


_NUMBERS_AT_A_TIME = 2**20
"""Path sums over active paths need all activations for their gradient. So a batch goes through in parts
of at most so many numbers (6 images of 3 × 224 × 224): memory does not depend on the batch size."""


def _active_paths(network: _Network, batches: Batches) -> tuple[Gradients, int]:
    """∂R/∂θ² over active paths, divided by 2**exponent."""
    group = processes()
    weights = network.squared()
    total = {name: torch.zeros_like(square, dtype=torch.float64) for name, square in network.squares.items()}
    reference: int | None = None
    for index, inputs in enumerate(inputs_of(batches, network.model)):
        if index % group.world_size != group.rank:
            continue
        for part in inputs.parts(_NUMBERS_AT_A_TIME):
            gradients, paths = _active(network, part, weights, index)
            reference = int(paths.exponent) if reference is None else reference
            for name, gradient in gradients.items():
                total[name].add_(gradient, alpha=2.0 ** (int(paths.exponent) - reference))
    if reference is None:  # this process has no batch of its own, but must leave out what the others leave out
        _active(network, next(inputs_of(batches, network.model)), weights, 0)
    exponent = sum_aligned_(total, reference)
    return {name: g.to(network.dtype) for name, g in total.items() if name not in network.left_out}, exponent


def _active(
    network: _Network, inputs: Inputs, weights: Mapping[Tensor, Weight], index: int
) -> tuple[Gradients, Paths]:
    """∂R/∂θ² of one batch, divided by 2**exponent of the path sums."""
    logits, paths, met = network.path_sums(inputs, inputs.images.to(network.dtype).square(), ACTIVE, weights)
    require_finite(logits, index)
    return network.gradients(paths.data, torch.ones_like(paths.data), met, inputs), paths


def _scores(squares: Mapping[str, Tensor], gradients: Gradients, exponent: int, power: float) -> dict[str, Tensor]:
    """θ² · (2**exponent · ∂R/∂θ²)^power, leaving out 2**exponent if that would leave the dtype's range."""
    scores = {}
    for name, gradient in gradients.items():
        square = squares[name]
        scores[name] = square.detach() * (gradient if power == 1 else gradient**power)
        if not bool(torch.isfinite(scores[name]).all()):
            raise NonFiniteError(
                f"{int((~torch.isfinite(scores[name])).sum())} score(s) of {name} are not finite; "
                "check the weights and BatchNorm statistics of the model for NaN and infinity."
            )
    largest = max(float(s.max()) for s in scores.values())
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
            scores[name] = scores[name] * 2.0**factor
    return scores
