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
So where `PX` sees that the last weights cannot be pruned, the rounds of one pruning after the first leave the
images aside: one forward and backward pass of a single image each.

Where this differs from the paper: what to do at ops other than convolution, ReLU and pooling is our
own, see `px_hf.ops`; the weights behind attention patterns and other gates share the flow through
them (`px_hf.ops.gates`). Where it differs from the published code (github.com/iurada/px-ntk-pruning,
ed6c40e): BatchNorm uses its running statistics and counts as part of the weights, no layer is
skipped by its name, and no absolute value is needed because every score is non-negative.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..distributed import processes
from ..errors import InvalidArgumentError, NonFiniteError
from ..model.inputs import Batches, Inputs, inputs_of, require_finite
from ..model.modes import evaluating
from ..ops import ACTIVE, G, H, Weight
from ..scoring.given import Given
from ..scoring.path_network import PathNetwork, PathScores
from ..scoring.sums import add_, add_up, exact_sum, sum_aligned_
from .base import Criterion
from .lamp import shares


@dataclass(frozen=True)
class PX(Criterion):
    """Path eXclusion: ``S(θ) = θ² · (∂R/∂θ²)^power``.

    Args:
        paths: ``"all"`` for Eq. 9 of the paper, ``"active"`` for the paths that are active at the data.
        power: how far the flow through a weight may outweigh the weight itself, in [0, ∞): 1 is the
            paper's criterion, 0 is magnitude.
        balance: divide each score by the sum of those of its layer that are not smaller, as `LAMP` does with
            θ²: layers are compared by what a weight adds to what is left of its layer, and none is emptied.

    Scores are float32 (float64 for a float64 model). They are those of the equation, unless these lie
    far outside the range of the dtype; then all are multiplied by one power of two. Balanced ones are in [0, 1].

    Raises:
        InvalidArgumentError: an unknown ``paths``, a negative or non-finite ``power``, a ``balance`` that is
            no bool.
    """

    paths: Literal["all", "active"] = "all"
    power: float = 1.0
    balance: bool = False
    _rounds: ClassVar[_Rounds | None] = None

    def __post_init__(self) -> None:
        if self.paths not in ("all", "active"):
            raise InvalidArgumentError(f"PX(paths={self.paths!r}): expected 'all' (Eq. 9) or 'active'.")
        if not (math.isfinite(self.power) and self.power >= 0):
            raise InvalidArgumentError(f"PX(power={self.power!r}): expected a finite number ≥ 0.")
        if not isinstance(self.balance, bool):
            raise InvalidArgumentError(f"PX(balance={self.balance!r}): expected True or False.")

    def begin(self) -> PX:
        """For the rounds of one pruning, which rank scores: a factor that all have in common is left out."""
        fresh = copy.copy(self)
        object.__setattr__(fresh, "_rounds", _Rounds())
        return fresh

    def formula(self, given: Given) -> dict[str, Tensor]:
        """``θ² · (∂R/∂θ²)^power`` for each weight; the batches need no labels.

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
        network = given.paths()
        with evaluating(given.model):
            scores = PathScores(network, self.power)
            if self.paths == "all":
                exponent = _all_paths(network, given.batches, scores.take, self._rounds)
            else:
                exponent = _active_paths(network, given.batches, scores.take)
        network.warn_of_left_out()
        found = scores.result(exponent)
        return {name: shares(s.double()).to(s.dtype) for name, s in found.items()} if self.balance else found


@dataclass
class _Rounds:
    """What the rounds of one pruning by Eq. 9 know of the network."""

    alike: bool | None = None
    """Whether h_k is the same for every class, see `_classes_alike`; None before the first round."""


def _all_paths(
    network: PathNetwork, batches: Batches, take: Callable[[str, Tensor], None], rounds: _Rounds | None
) -> int:
    """Hand ∂R/∂θ² of Eq. 9, divided by 2**exponent, to ``take``; returns the exponent.

    In ``rounds``, where only the order of scores counts, h_k = 1 if it is the same for every class: the first round
    goes through the images all the same, for what is wrong with them is to be said, and the others do without.
    """
    probe = next(inputs_of(batches, network.model)).probe()
    seen = None if rounds is not None and rounds.alike else _data_factors(network, batches)
    if rounds is not None and rounds.alike is None:
        rounds.alike = _classes_alike(network, probe)
    _, kernel, met = network.path_sums(probe, probe.images.to(network.dtype), G, network.squared())
    out = _per_class(kernel.data)
    if seen is None or (rounds is not None and rounds.alike):
        data, exponent = torch.ones_like(out), 0
    else:
        data, exponent = exact_sum(seen[0], out.numel(), seen[1], probe.images.device)
    if not bool(torch.isfinite(data).all()):
        raise NonFiniteError("the sum over paths h(x², 1, a) is not finite: check the images and the model for NaN.")
    network.each_gradient(take, out, data, met, probe)
    return exponent + int(kernel.exponent)


def _data_factors(network: PathNetwork, batches: Batches) -> tuple[list[tuple[Tensor, int]], int]:
    """Σ h_k of each batch of this process's, as (data [K], exponent), and the number of batches of all processes."""
    group = processes()
    weights = network.masks_only()
    terms: list[tuple[Tensor, int]] = []
    count = 0
    for count, inputs in enumerate(inputs_of(batches, network.model), start=1):
        if (count - 1) % group.world_size != group.rank:
            continue
        own = []
        for part in inputs.parts(NUMBERS_AT_A_TIME):
            logits, paths, _ = network.path_sums(part, part.images.to(network.dtype).square(), H, weights)
            require_finite(logits, count - 1)
            own.append((_per_class(paths.data.double()).cpu(), int(paths.exponent)))
        terms.append(add_up(own))
    return terms, count


def _classes_alike(network: PathNetwork, probe: Inputs) -> bool:
    """Whether h_k is one number for every class, whatever the images and whatever weights are pruned.

    It is where the last product is with weights that cannot be pruned: all ones in h, they make one sum, and every
    class holds it in the same place of memory.
    """
    weights = network.masks_only()
    for p in network.targets.values():  # some mask: no longer one number in memory, see `is_constant`
        weights[p] = Weight(torch.ones(p.shape, dtype=torch.bool, device=p.device))
    _, paths, _ = network.path_sums(probe, probe.images.to(network.dtype), H, weights)
    return paths.data.shape[1] == 1 or paths.data.stride(1) == 0


def _per_class(sums: Tensor) -> Tensor:
    """[N, K, ...] -> [K]: added over the batch, and over positions where there are any."""
    return sums.transpose(0, 1).flatten(1).sum(1)


NUMBERS_AT_A_TIME = 5 * 2**18
"""A batch goes through in parts of at most so many numbers (8 images of 3 × 224 × 224): memory does not depend on
the batch size, and a CPU is faster on tensors that it need not ask the system for each time."""

_ACTIVE_ON_CPU = 15 * 2**15
"""The same of active paths on a CPU (3 such images), whose backward needs all that was computed: two take a twentieth
more time, and 300 MB less on a ViT-B/16. A GPU would idle."""


def _active_paths(network: PathNetwork, batches: Batches, take: Callable[[str, Tensor], None]) -> int:
    """Hand ∂R/∂θ² over active paths, divided by 2**exponent, to ``take``; returns the exponent."""
    group = processes()
    weights = network.squared()
    total: dict[str, Tensor] = {}
    on_cpu = next(iter(network.squares.values())).device.type == "cpu"
    numbers = min(NUMBERS_AT_A_TIME, _ACTIVE_ON_CPU) if on_cpu else NUMBERS_AT_A_TIME
    reference: int | None = None
    for index, inputs in enumerate(inputs_of(batches, network.model)):
        if index % group.world_size != group.rank:
            continue
        for part in inputs.parts(numbers):
            reference = _add_active_(total, reference, network, part, weights, index)
    if reference is None:  # this process has no batch of its own, but must leave out what the others leave out
        part = next(next(inputs_of(batches, network.model)).parts(numbers))
        _add_active_({}, None, network, part, weights, 0)
    for name, square in network.squares.items():  # all of them in one order, for all processes add the same
        if name not in total:
            total[name] = torch.zeros(square.shape, dtype=torch.float64, device=square.device)
        total[name] = total.pop(name)
    exponent = sum_aligned_(total, reference)
    for name in list(total):
        gradient = total.pop(name)
        if name not in network.left_out:
            take(name, gradient.to(network.dtype))
    return exponent


def _add_active_(
    total: dict[str, Tensor],
    reference: int | None,
    network: PathNetwork,
    inputs: Inputs,
    weights: Mapping[Tensor, Weight],
    index: int,
) -> int:
    """Add ∂R/∂θ² of some images, divided by 2**reference, to ``total``; returns the reference."""
    logits, paths, met = network.path_sums(inputs, inputs.images.to(network.dtype).square(), ACTIVE, weights)
    require_finite(logits, index)
    exponent = int(paths.exponent)
    reference = exponent if reference is None else reference
    factor = 2.0 ** (exponent - reference)

    def take(name: str, gradient: Tensor) -> None:
        if name in total:
            add_(total[name], gradient, factor)
        else:  # its first part; zeros to add to would be one more pass over memory
            first = gradient.to(torch.float64, memory_format=torch.contiguous_format)
            total[name] = first if factor == 1 else first.mul_(factor)

    network.each_gradient(take, paths.data, torch.ones_like(paths.data), met, inputs)
    return reference
