"""When memory runs out: one line with the remedy in place of what an allocator says, and what failed is let go of, so that the
side lives on and smaller requests find room.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from testbed.errors import OutOfMemory

_AMOUNT = re.compile(r"(?:tried to|unable to) allocate ([\d.]+ ?\w+)", re.IGNORECASE)
#: Of a RuntimeError: torch on the processor; C++; cuBLAS, for a workspace of its own.
_SAID = ("can't allocate memory", "std::bad_alloc", "CUBLAS_STATUS_ALLOC_FAILED")
_NO_STACK = "can't start new thread"  #: for want of memory, or of as many threads as one may have
_REMEDY = "take fewer context_tokens, dtype: bfloat16, a smaller model, or a device with more room"

T = TypeVar("T")


def ran_out(error: BaseException) -> str:
    """A line where an exception says that memory ran out, the host's or a GPU's; else empty."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    said = str(error)
    by_host = isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in said for words in _SAID)
    )
    if isinstance(error, RuntimeError) and said == _NO_STACK:
        return f"out of memory, or of threads: {_REMEDY}"
    if not (on_gpu or by_host):
        return ""
    found = _AMOUNT.search(said)
    amount = f" ({found[1]} more were asked for)" if found else ""
    return f"out of {'GPU memory' if on_gpu else 'memory'}{amount}: {_REMEDY}"


def within_memory(work: Callable[[], T]) -> T:
    """What `work` returns. Raises OutOfMemory where memory ran out, once what it had allocated is free again."""
    try:
        return work()
    except Exception as error:
        line = ran_out(error)
        if not line:
            raise
    # Only here are the error and, with it, the frames that hold tensors gone; those in a circle, of threads' failures, go now.
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    # What is free goes back to the kernel, for the other side and for threads' stacks: by the GNU C library, which has this call.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    raise OutOfMemory(line)
