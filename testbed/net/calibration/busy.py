"""Processor load of the kind that a link has to bear: a busy process of ordinary priority for each core."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def busy_cores(wanted: bool = True) -> Iterator[None]:
    """Keeps every core busy while the block runs, where *wanted*."""
    spin = [sys.executable, "-I", "-S", "-c", "while True: pass"]
    processes = [subprocess.Popen(spin) for _ in range(os.cpu_count() or 1)] if wanted else []
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
