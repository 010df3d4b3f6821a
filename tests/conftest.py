"""One thread for every test and its subprocesses: small tensors gain nothing from more, and on a busy
machine OpenMP's spinning threads cost most of the time."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
