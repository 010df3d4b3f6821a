"""Files and folders that are whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place next to ``path`` to write a file or a folder to; what is still there when the block ends is removed.

    Missing parent folders are made. The name of the place starts with a dot, ends as that of ``path`` does, and is
    that of this process, so that others can write the same file at the same time.
    """
    path = Path(path).absolute()
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(unfinished)
    try:
        yield unfinished
    finally:
        remove(unfinished)


@contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A place `beside` ``path`` to write a file or a folder to, which becomes ``path`` when the block ends.

    ```python
    with whole("masks.safetensors") as unfinished:
        unfinished.write_bytes(content)
    ```

    If the block raises, what it wrote is removed and ``path`` is as it was. A file that is there is replaced, a
    folder too.
    """
    path = Path(path).absolute()
    with beside(path) as unfinished:
        yield unfinished
        if unfinished.is_dir():
            remove(path)
        os.replace(unfinished, path)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
