"""One mask as bytes, in whichever of three codings is smallest: docs/COMPACT_FORMAT.md, section 3.

    coding, payload = encode(mask)
    for positions in kept_positions(coding, payload, mask.size, mask.sum()): ...  # ascending, in parts for a cache

| coding          | payload                                                                                |
|-----------------|----------------------------------------------------------------------------------------|
| `bits`          | one bit a weight, 1 = kept, least significant bit first                                |
| `deflated-bits` | the same bytes as a zlib stream                                                        |
| `deflated-gaps` | how many pruned weights come before each kept one: a byte each, where 255 says 255 and |
|                 | go on; as a zlib stream                                                                |

In a mask drawn at random with density p the gaps are geometric, and a Huffman code of them (DEFLATE without
its search for repetitions) takes 1.01 times the entropy H(p) a weight, from 50 to 99 % sparsity. Masks with a
pattern (N:M, empty rows) repeat bytes, which DEFLATE finds in the bits.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

BITS = "bits"
DEFLATED_BITS = "deflated-bits"
DEFLATED_GAPS = "deflated-gaps"
CODINGS = (BITS, DEFLATED_BITS, DEFLATED_GAPS)

_LONG = 255  # the gap byte that does not end its gap
PART = 1 << 16
"""Weights or gaps that are decoded at a time: their positions take 512 KB."""


def encode(mask: NDArray[np.bool_]) -> tuple[str, bytes]:
    """The name of the smallest coding of a flat mask, True = kept, and its payload."""
    bits = np.packbits(mask, bitorder="little").tobytes()
    candidates = [
        (BITS, bits),
        (DEFLATED_BITS, _deflate(bits, zlib.Z_HUFFMAN_ONLY)),
        (DEFLATED_BITS, _deflate(bits, zlib.Z_DEFAULT_STRATEGY)),
        (DEFLATED_GAPS, _deflate(_gaps(mask), zlib.Z_HUFFMAN_ONLY)),
    ]
    return min(candidates, key=lambda candidate: len(candidate[1]))  # the first of equals, which decodes fastest


def kept_positions(coding: str, payload: NDArray[np.uint8], count: int, kept: int) -> Iterator[NDArray[np.int64]]:
    """The indices of the `kept` ones among `count` weights, ascending, in parts.

    Takes some `count / 8` or `kept + count / 255` bytes at most.

    Raises:
        ValueError: `payload` is not exactly that of as many weights.
    """
    packed = -(-count // 8)
    if coding == BITS:
        parts = _bit_positions(payload, packed)
    elif coding == DEFLATED_BITS:
        parts = _bit_positions(_inflate(payload, packed), packed)
    elif coding == DEFLATED_GAPS:
        parts = _gap_positions(_inflate(payload, kept + count // _LONG))
    else:
        raise ValueError(f"its coding {coding!r} is none of {', '.join(CODINGS)}")
    found = 0
    for positions in parts:
        if len(positions) and positions[-1] >= count:
            raise ValueError(f"its mask goes on beyond its {count} weights")
        found += len(positions)
        if found > kept:
            break
        yield positions
    if found != kept:
        raise ValueError(f"its mask and its {kept} values do not agree on how many weights are kept")


def _bit_positions(bits: NDArray[np.uint8], expected: int) -> Iterator[NDArray[np.int64]]:
    if len(bits) != expected:
        raise ValueError(f"its mask has {len(bits)} bytes of bits, expected {expected}")
    for start in range(0, len(bits), PART // 8):
        part = np.unpackbits(bits[start : start + PART // 8], bitorder="little")
        positions = np.flatnonzero(part.view(np.bool_))
        positions += 8 * start
        yield positions


def _gaps(mask: NDArray[np.bool_]) -> bytes:
    parts = []
    last = -1
    for start in range(0, len(mask), PART):
        positions = np.flatnonzero(mask[start : start + PART]) + start
        if len(positions):
            long, short = np.divmod(np.diff(positions, prepend=last) - 1, _LONG)
            gaps = np.full(len(positions) + int(long.sum()), _LONG, np.uint8)
            gaps[np.cumsum(long + 1) - 1] = short
            parts.append(gaps.tobytes())
            last = positions[-1]
    return b"".join(parts)


def _gap_positions(gaps: NDArray[np.uint8]) -> Iterator[NDArray[np.int64]]:
    if len(gaps) and gaps[-1] == _LONG:
        raise ValueError("its mask ends within a gap")
    last = -1
    for start in range(0, len(gaps), PART):
        part = gaps[start : start + PART]
        ends = part != _LONG
        steps = part + ends  # past the pruned ones, and one on if that is a kept weight; 255 at most
        positions = np.cumsum(steps, dtype=np.int64)
        positions += last
        last = int(positions[-1])
        yield positions if ends.all() else positions[ends]


def _deflate(content: bytes, strategy: int) -> bytes:
    level = 1 if strategy == zlib.Z_DEFAULT_STRATEGY else 9  # a pattern is found by the fastest search too
    stream = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
    return stream.compress(content) + stream.flush()


def _inflate(payload: NDArray[np.uint8], limit: int) -> NDArray[np.uint8]:
    """The content of a zlib stream of at most `limit` bytes; no more than those are ever held."""
    stream = zlib.decompressobj()
    try:
        content = stream.decompress(payload.data, limit + 1)
    except zlib.error as error:
        raise ValueError(f"its mask is not a zlib stream ({error})") from None
    if len(content) > limit or not stream.eof or stream.unused_data:
        raise ValueError("its mask is a zlib stream of another length")
    return np.frombuffer(content, np.uint8)
