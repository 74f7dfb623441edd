"""Programs of ours, and of Python's, that run in a process of their own: how they are called, and where they find modules."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_HERE = Path(__file__).parents[1]


def module(name: str, *arguments: str) -> list[str]:
    """The argument vector that runs a module. What lies in the working directory is no part of it (-P)."""
    return [sys.executable, "-P", "-m", name, *arguments]


def environment() -> dict[str, str]:
    """This process's environment, in which such a program finds this package also where it is not installed.

    Of PYTHONPATH only whole paths are kept: an empty or relative one is the working directory, or somewhere below it.
    """
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(_HERE), *filter(os.path.isabs, given)])}
