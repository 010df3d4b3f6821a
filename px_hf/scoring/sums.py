"""Sums over batches and processes that do not depend on their order.

Floating-point addition is not associative, so a sum split over N processes differs from the
one-process sum in its last bits, and a score at the threshold may then fall on the other side. Here
each batch's contribution, which is the same number wherever it is computed, is rounded to a common
grid and added in integers: exact in any order and for any number of processes.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

_BITS = 62
"""Of int64: without the sign, and one to spare."""


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def exact_sum(terms: list[tuple[Tensor, int]], size: int, count: int, device: torch.device) -> tuple[Tensor, int]:
    """Σ data · 2**exponent over the terms of all processes.

    Args:
        terms: this process's contributions: float64 tensors [size], finite and non-negative, and exponents.
        size: length of each.
        count: number of terms over all processes (bounds the sum).
        device: where a collective of the process group can work.

    Returns:
        (total, exponent), the total [size] in float64 on the CPU with its largest entry in [1/2, count).
        Resolution: 2**-(61 - log2(count)) of the largest term. ``size + 1`` numbers cross the wire.
    """
    tops = [exponent + int(torch.frexp(data.max()).exponent) for data, exponent in terms if bool(data.max() > 0)]
    top = torch.tensor([max(tops, default=-(2**40))], dtype=torch.int64, device=device)
    if _together():
        dist.all_reduce(top, op=dist.ReduceOp.MAX)
    grid = _BITS - count.bit_length()
    total = torch.zeros(size, dtype=torch.int64)
    for data, exponent in terms:
        shift = exponent - int(top) + grid
        # float64 spans 2**±1023: a term too small for the grid rounds to nothing, not to an error
        total += torch.ldexp(data.cpu().double(), torch.tensor(max(shift, -2000))).round().to(torch.int64)
    if _together():
        moved = total.to(device)
        dist.all_reduce(moved)
        total = moved.cpu()
    return torch.ldexp(total.double(), torch.tensor(-grid)), int(top)


def add_up(terms: list[tuple[Tensor, int]]) -> tuple[Tensor, int]:
    """Σ data · 2**exponent in the order given, as (data, exponent): the parts of one batch, in float64."""
    top = max((exponent for data, exponent in terms if bool(data.any())), default=terms[0][1])
    return sum(torch.ldexp(data, torch.tensor(max(e - top, -2000))) for data, e in terms), top  # type: ignore[return-value]


_CHUNK = 2**17
"""Numbers at a time for each thread, so that what torch converts on a CPU stays in its cache. Fewer torch does not
share among threads."""


def add_(total: Tensor, term: Tensor, factor: float) -> None:
    """``total += factor * term`` for a contiguous float64 total and a term of any float type."""
    if total.device.type != "cpu":
        total.add_(term, alpha=factor)
        return
    chunk = _CHUNK * torch.get_num_threads()
    for into, numbers in zip(total.view(-1).split(chunk), term.reshape(-1).split(chunk), strict=True):
        into.add_(numbers, alpha=factor)


def sum_aligned_(totals: dict[str, Tensor], exponent: int | None) -> int:
    """Add ``totals · 2**exponent`` over the processes, in place, and return the common exponent.

    ``totals`` are float64 sums of float32 numbers (None: this process has none). They have 29 bits to
    spare, so such sums are exact, in any order, unless one batch's contribution to a weight is more
    than about 2**29 / batches times another's; then the last bit of the float64 sum may depend on the
    number of processes, far below what is left when it is rounded to float32.
    """
    if not _together():
        return exponent or 0
    device = next(iter(totals.values())).device
    common = torch.tensor([-(2**40) if exponent is None else exponent], dtype=torch.int64, device=device)
    dist.all_reduce(common, op=dist.ReduceOp.MAX)
    for total in totals.values():
        if exponent is not None:
            torch.ldexp(total, torch.tensor(exponent - int(common), device=device), out=total)
        dist.all_reduce(total)
    return int(common)
