"""Decode in threads what will be asked for, a few tensors ahead of its use."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from torch import Tensor


class Ahead:
    """`with Ahead(decode, names) as ahead: ahead.get(name)`: what `decode(name)` returns or raises, called once.

    Threads work through `names` in their order, at most `depth` a thread beyond those that were got, so that little
    is decoded in vain if loading ends early. Names may be got in any order; the order given is the fastest.
    """

    depth = 4

    def __init__(self, decode: Callable[[str], Tensor], names: Iterable[str]) -> None:
        self._decode = decode
        self._to_come = dict.fromkeys(names)
        threads = min(8, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(threads)
        self._begun: dict[str, Future[Tensor]] = {}
        for name in list(self._to_come)[: self.depth * threads]:
            self._begin(name)

    def get(self, name: str) -> Tensor:
        """The tensor of that name; each name once."""
        if name not in self._begun:
            self._begin(name)
        future = self._begun.pop(name)
        if self._to_come:
            self._begin(next(iter(self._to_come)))
        return future.result()

    def close(self) -> None:
        """Decode no more, and wait for what is being decoded."""
        self._threads.shutdown(cancel_futures=True)

    def _begin(self, name: str) -> None:
        self._to_come.pop(name, None)
        self._begun[name] = self._threads.submit(self._decode, name)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
