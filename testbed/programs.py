"""Programs of ours, and of Python's, that run in a process of their own: how they are called, where they find modules, and how
punctual they are.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

_HERE = Path(__file__).parents[1]
_LOAD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from {} import main; main()"


def module(name: str, *arguments: str) -> list[str]:
    """The argument vector that runs a module. What lies in the working directory is no part of it (-P)."""
    return [sys.executable, "-P", "-m", name, *arguments]


def isolated(name: str, *arguments: str) -> list[str]:
    """What runs a module's ``main`` with the standard library and parts of ours alone, to be there in milliseconds."""
    return [sys.executable, "-I", "-S", "-c", _LOAD.format(name), str(_HERE), *arguments]


def environment() -> dict[str, str]:
    """This process's environment, in which such a program finds this package also where it is not installed.

    Of PYTHONPATH only whole paths are kept: an empty or relative one is the working directory, or somewhere below it.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_HERE), *filter(os.path.isabs, given)])}


def schedule_in_real_time(priority: int) -> bool:
    """Lets the kernel run this process before all ordinary ones; whether that was permitted. sched(7)."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError:
        return False
    return True


def end_sleeps_exactly() -> None:
    """Has no timer of this process come late to spare the processor, where that is permitted. prctl(2), PR_SET_TIMERSLACK."""
    with contextlib.suppress(OSError), open("/proc/self/timerslack_ns", "w") as slack:
        slack.write("1")
