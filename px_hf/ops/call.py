"""One call of an operation, as its rule sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .companions import Companion, Derived, Flow, Gate, Paths, Reading, Weight
from .gates import unit_gain


class Call:
    """What a rule may ask about the operation that it describes.

    Attributes:
        op: the operation.
        out: what it returned.
        reading: which factors of a path product are read.
        dtype: dtype of the path sums.
    """

    def __init__(
        self,
        op: Callable[..., Any],
        out: Any,
        reading: Reading,
        dtype: torch.dtype,
        found: Mapping[int, Companion],
    ) -> None:
        self.op = op
        self.out = out
        self.reading = reading
        self.dtype = dtype
        self._found = found

    def companion(self, value: Any) -> Companion | None:
        return self._found.get(id(value))

    def has_paths(self, value: Any) -> bool:
        """Whether ``value`` is an activation that paths lead to."""
        return isinstance(self.companion(value), Paths)

    def is_gate(self, value: Any) -> bool:
        """Whether ``value`` is frozen, such as an attention pattern."""
        return isinstance(self.companion(value), Gate)

    def gating(self, value: Any) -> int:
        """How much an activation looks like a gate, see `Paths.gating`."""
        companion = self.companion(value)
        return companion.gating if isinstance(companion, Paths) else 0

    def flow(
        self,
        fn: Callable[..., Any],
        *operands: Tensor,
        weight: Tensor | None = None,
        sliced: bool = False,
        gating: int = 0,
        channels: int | None = None,
        scale: Tensor | None = None,
    ) -> Flow:
        """The result's path sums are ``fn`` of the path sums of ``operands`` (and of ``weight``), see `Flow`."""
        return Flow(fn, operands, weight, sliced, gating, channels, scale)

    def weight(self, value: Tensor) -> Tensor:
        """What a path multiplies at a matrix or kernel: θ², or its mask where weights are not read (for want of
        one, a 1 that is expanded: see `is_constant`).

        A matrix that is no parameter (a fixed blur kernel, say) is fixed: see `fixed`.
        """
        companion = self.companion(value)
        if isinstance(companion, Weight):
            if companion.path is not None:
                return companion.path.to(self.dtype)
            return torch.ones((), dtype=self.dtype, device=value.device).expand(value.shape)
        if isinstance(companion, Derived):
            return self._derived(value, companion)
        return self.fixed(value)

    def _derived(self, value: Tensor, derived: Derived) -> Tensor:
        """A kernel w(θ), entry by entry from θ: w², whose gradient in log θ² is that in log w².

        A pruned θ whose w is not 0 (standardisation subtracts a mean) still carries paths, uncredited.
        """
        if derived.path is None:
            raise NotImplementedError(f"a weight computed by {derived.name}")
        if not self.reading.weights:
            return (value != 0).to(self.dtype)
        square = value.detach().to(self.dtype).abs() ** self.reading.order
        held = derived.path.detach()
        return square * torch.where(held > 0, derived.path / held.where(held > 0, 1.0), 1.0)

    def fixed(self, coefficient: Any) -> Any:
        """A coefficient c that is neither data nor a weight, such as the 1/n of an average.

        |c| in h and in g, so that R = h·g holds c²; c² where one stream carries both.
        """
        if isinstance(coefficient, Tensor):
            coefficient = coefficient.detach().to(self.dtype)
        both = self.reading.gates and self.reading.weights
        return coefficient * coefficient if both else abs(coefficient)

    def scale(self, value: Any) -> Tensor | None:
        """What a path multiplies at an elementwise parameter γ: γ², or nothing (None) where weights
        are not read. A factor that is no parameter is fixed."""
        companion = self.companion(value)
        if isinstance(companion, Weight):
            return companion.path if self.reading.weights else None
        return self.fixed(value)

    def gate(self, value: Tensor) -> Tensor | None:
        """What a path multiplies at a frozen factor of the given value: its square, or nothing
        (None) where gates are not read. 0-dim to full shape, in the dtype of the path sums."""
        return value.detach().to(self.dtype).square() if self.reading.gates else None

    def credit(self, gate: Tensor, value: Tensor, factor: Tensor | None) -> Tensor | None:
        """``factor``, which hands the flow through ``value`` on to the weights that made ``gate``.

        See `px_hf.ops.gates`. As it is where weights are not read; 1 where it is None and there is flow to hand on.
        Broadcasts to the shape of ``gate``.
        """
        if not self.reading.weights:
            return factor
        trunk = self.companion(value)
        assert isinstance(trunk, Paths)
        return unit_gain(self.companion(gate), trunk, factor)


def times(stream: Tensor, *factors: Tensor | None) -> Tensor:
    """The product of a stream and those factors that are read."""
    for factor in factors:
        if factor is not None:
            stream = stream * factor
    return stream
