"""A trace's file, line by line, and what is said of a line that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError

MAX_LINE = 4096


def wrong(path: Path, line: int, what: str) -> SpecError:
    """The error that names the file and the line."""
    return SpecError(f"trace {path}: line {line}: {what}")


def comma_separated(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without comments. Raises SpecError."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise wrong(path, number, f"longer than {MAX_LINE} characters")
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise wrong(path, number, "not text (UTF-8)") from None
        if not text:
            raise wrong(path, number, "empty")
        if not text.startswith("#"):
            yield number, [field.strip() for field in text.split(",")]
