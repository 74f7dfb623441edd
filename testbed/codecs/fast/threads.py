"""Parts of a cache on several cores: one thread a part, each on one core, and memory that is not faulted in anew each time.

A part's tensors fit the caches close to a core; an operation that is itself spread over all cores hands each part from
core to core, and waits for the slowest at every step.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3), which also has the variable
_RUNS = 4  # stretches a thread: so many that the slowest thread leaves the others little to wait for
_LINE = 64  # bytes of a cache line
_KEPT_BYTES, _LARGEST_MMAP_THRESHOLD = 256 << 20, 32 << 20


def threads() -> int:
    """How many threads work on parts: as many as torch is told to use (`torch.set_num_threads`, OMP_NUM_THREADS)."""
    import torch

    return torch.get_num_threads()


def each(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, on several threads: results in order; the first exception in order is raised."""
    keep_freed_memory()
    if threads() == 1:
        return map(work, items)
    return _pool(threads()).map(work, items)


def runs(
    work: Callable[[range], Result], count: int, device: torch.device, *, even: bool = False
) -> list[Result]:
    """`work` on stretches of `count` things, several a thread; all at once where a GPU computes, which has its own queue.

    even: the things take equally long, so that a stretch a thread is enough, and handing out stretches takes less time.
    Results in order; the first exception in order is raised.
    """
    if device.type != "cpu":
        return [work(range(count))]
    stretches = max(1, min(count, threads() * (1 if even or threads() == 1 else _RUNS)))
    ends = [count * i // stretches for i in range(stretches + 1)]
    return list(each(work, [range(start, stop) for start, stop in itertools.pairwise(ends)]))


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    """A pool whose threads use one core each. Raises nothing; lives as long as the process."""
    import torch

    started = threading.Barrier(size)

    def one_core() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(size, "codec", one_core)
    for future in [pool.submit(int) for _ in range(size)]:
        future.result()
    torch.set_num_threads(size)  # the call above set what threads that come later start with, too
    return pool


def bytes_for(size: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Memory for `size` bytes, unset, from a cache line's start on.

    numpy asks the kernel for large pages, which cost a fifth of what small ones do.
    """
    room = np.empty(size + _LINE, dtype=np.uint8)
    start = -room.ctypes.data % _LINE
    return room[start : start + size]


@functools.cache
def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, up to a bound, for the next part.

    It gives blocks of megabytes back to the kernel at once, and the next part's temporaries are then cleared and mapped
    page by page, which takes several times as long as all that is computed in them. Where the environment says how it is to
    be, that stands.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


os.register_at_fork(after_in_child=_pool.cache_clear)
