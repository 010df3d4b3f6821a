"""The memory of this process, as Linux tells it."""

from __future__ import annotations

import os
from pathlib import Path

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_told() -> bool:
    """Whether this system tells it, and lets peaks start anew."""
    return STATUS.is_file() and os.access(RESET, os.W_OK)


def now() -> int:
    """What is held, in bytes."""
    return _entry("VmRSS")


def peak() -> int:
    """The most that was held since `restart_peak`, in bytes."""
    return _entry("VmHWM")


def available() -> int:
    """What the system could still give, in bytes."""
    return _entry("MemAvailable", Path("/proc/meminfo"))


def restart_peak() -> None:
    """The peak starts anew, from what is held now."""
    RESET.write_text("5")


def _entry(name: str, file: Path = STATUS) -> int:
    return next(1024 * int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(name))
