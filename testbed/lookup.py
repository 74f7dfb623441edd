"""Where files are looked for while a file that names them is read: traces, tables, questions, models, topologies.

    with beside(path):          # of the scenario or topology
        …what it names is parsed…

What is found beside the file, or among a run's own copies, is remembered by whoever asked; everything else is looked for when
it is needed, from the working directory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path

_folder: ContextVar[Path | None] = ContextVar("folder", default=None)
_copies: ContextVar[Mapping[str, Path] | None] = ContextVar("copies", default=None)


@contextlib.contextmanager
def beside(file: Path) -> Iterator[None]:
    """Relative paths are looked for in the folder of *file* first."""
    token = _folder.set(file.absolute().parent)
    try:
        yield
    finally:
        _folder.reset(token)


@contextlib.contextmanager
def among(copies: Mapping[str, Path]) -> Iterator[None]:
    """What was written -> the file that is used for it, before anything else."""
    token = _copies.set(copies)
    try:
        yield
    finally:
        _copies.reset(token)


def find(written: str) -> str:
    """Where what was named so is, as far as that is fixed as it is read; empty where it is not."""
    copies, folder = _copies.get(), _folder.get()
    if copies is not None and written in copies:
        return str(copies[written])
    if folder is not None and not Path(written).is_absolute() and (folder / written).exists():
        return str(folder / written)
    return ""
