"""A trace's file, line by line, and what is said of a line that is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from testbed.errors import SpecError

MAX_LINE = 4096
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def wrong(path: Path, line: int, what: str) -> SpecError:
    """The error that names the file and the line."""
    return SpecError(f"trace {path}: line {line}: {what}")


def says_nothing(line: bytes) -> bool:
    """Whether a line is blank, or a comment."""
    return not line.strip() or line.lstrip().startswith(b"#")


def first_line(file: BinaryIO, path: Path) -> bytes:
    """The first line that says something, stripped; empty where there is none. Raises SpecError."""
    for _, text in lines_that_say(file, path):
        return text.encode()
    return b""


def lines_that_say(file: BinaryIO, path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and stripped texts of the lines that are neither blank nor comments. Raises SpecError."""
    number = 0
    while line := file.readline(MAX_LINE + 1):
        number += 1
        if len(line) > MAX_LINE:
            raise wrong(path, number, f"longer than {MAX_LINE} characters")
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if says_nothing(line):
            continue
        try:
            yield number, line.decode().strip()
        except UnicodeDecodeError:
            raise wrong(path, number, "not text (UTF-8)") from None


def comma_separated(file: BinaryIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and fields, without comments and blank lines. Raises SpecError."""
    for number, text in lines_that_say(file, path):
        yield number, [field.strip() for field in text.split(",")]
