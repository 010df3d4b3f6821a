"""Reads all data once, so that what is wrong with it is known before any work."""

from __future__ import annotations

from collections.abc import Sequence

from tqdm.auto import tqdm

from ..distributed import processes, raise_together
from ..errors import PxError
from .segmentation import MapSplit
from .split import Split


def read_all(splits: Sequence[Split | MapSplit], *, batch_size: int = 64, progress: bool = True) -> None:
    """Decodes and transforms every example of `splits` once; processes take batches in turns.

    One process that met a bad image alone in the midst of training would leave the others waiting.

    Raises:
        DataError: an example of any process is bad; about the first one, on every process alike.
    """
    group, problem = processes(), None
    batches = [
        (split, range(start, min(start + batch_size, len(split))))
        for split in splits
        for start in range(0, len(split), batch_size)
    ]
    shown = tqdm(
        batches[group.rank :: group.world_size], desc="Reading", unit="batch", leave=False,
        disable=not (progress and group.is_main),
    )  # fmt: skip
    try:
        for split, positions in shown:
            if isinstance(split, Split):
                split.__getitems__(positions)
            else:
                for position in positions:
                    split[position]
    except PxError as error:
        problem = error
    raise_together(problem)
