"""The one place the version is written, and the commit that is running."""

from __future__ import annotations

import functools
import json
import subprocess
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

__version__ = "0.1.0"


@functools.cache
def commit() -> str | None:
    """The commit of px_hf: of the checkout it runs from, with `-dirty` if files differ, or that pip installed.

    None if neither is known, as for a released version.
    """
    checkout = Path(__file__).resolve().parents[1]
    if (checkout / ".git").exists():
        command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None
    try:
        origin = json.loads(distribution("px-hf").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    return origin.get("vcs_info", {}).get("commit_id")
