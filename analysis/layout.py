"""Text that keeps within a terminal's width: tables whose longest texts wrap, and sentences."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Sequence

_LEAST = 16  #: characters of a text's column, below which its table is broken into groups of columns
_NARROWEST = 40  #: columns of a terminal, below which nothing is legible
_FURTHER = 4  #: characters by which a row's second line stands further in
_BETWEEN = "  "
#: A setting's, a link's or a path's name breaks behind what joins its parts: no word of it is torn while there is room.
_PIECE = re.compile(r"\S+?(?:[,+(\[/](?=\S)|\s+|$)")


def terminal_width() -> int | None:
    """Columns of the terminal that standard output is, or what COLUMNS says; None of a file or a pipe, where a line is as long
    as what it says, for programs that read lines.
    """
    if os.environ.get("COLUMNS", "").isdigit() or (sys.stdout is not None and sys.stdout.isatty()):
        return max(_NARROWEST, shutil.get_terminal_size().columns)
    return None


def sentences(text: str, width: int | None = None, indent: str = "") -> str:
    """The text's lines, wrapped to `width` characters; what a line goes on in stands under `indent`, behind the line's own."""
    if width is None:
        return text
    wrapped: list[str] = []
    for line in text.split("\n"):
        own = line[: len(line) - len(line.lstrip())]
        wrapped += textwrap.wrap(
            line, width, subsequent_indent=own + indent, break_on_hyphens=False, drop_whitespace=True
        ) or [""]
    return "\n".join(wrapped)


def table(
    rows: Sequence[Sequence[str]],
    header: Sequence[str],
    width: int | None = None,
    *,
    texts: Sequence[int] | None = None,
    indent: int = 0,
) -> str:
    """Columns under their headings, two spaces apart.

    `texts`: numbers of the columns that are texts (None: all are), which stand left and wrap where the table is wider than
    `width`; all others are figures, which stand right and do not. Where that is not enough, each row goes on in a line below,
    further in, with the columns that found no room; the headings do, too.
    """
    left = set(range(len(header)) if texts is None else texts)
    lines = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    if width is None:
        groups = [list(range(len(header)))]
    else:
        groups = _groups(_narrowed(widths, left, width - indent), width - indent)
        for number, group in enumerate(groups):
            room = width - indent - (_FURTHER if number else 0)
            own = _narrowed([widths[i] for i in group], {at for at, i in enumerate(group) if i in left}, room)
            widths = [own[group.index(i)] if i in group else wide for i, wide in enumerate(widths)]
    out = []
    for line in lines:
        for number, group in enumerate(groups):
            cells = [(line[i], widths[i], i in left or number > 0) for i in group]
            below = _row(cells, indent + (_FURTHER if number else 0))
            out += [text for text in below if text or not number]
    return "\n".join(out)


def _narrowed(widths: Sequence[int], left: set[int], room: int) -> list[int]:
    """The columns' widths with texts narrowed, the widest first, until the row has room or no text is longer than `_LEAST`."""
    widths = list(widths)
    while sum(widths) + len(_BETWEEN) * (len(widths) - 1) > room:
        widest = max(left, key=lambda i: widths[i], default=None)
        if widest is None or widths[widest] <= _LEAST:
            break
        widths[widest] -= 1
    return widths


def _groups(widths: Sequence[int], room: int) -> list[list[int]]:
    """The columns in order, as many in a line as it has room for."""
    groups: list[list[int]] = [[]]
    used = 0
    for i, wide in enumerate(widths):
        if groups[-1] and used + wide > room:
            groups.append([])
            used, room = 0, room - (_FURTHER if len(groups) == 2 else 0)
        groups[-1].append(i)
        used += wide + len(_BETWEEN)
    return groups


def _row(cells: Sequence[tuple[str, int, bool]], indent: int) -> list[str]:
    """One row of cells (text, width, whether it stands left) as lines."""
    parts = [_broken(text, wide) if left else [text] for text, wide, left in cells]
    lines = []
    for at in range(max(map(len, parts))):
        own = [part[at] if at < len(part) else "" for part in parts]
        line = _BETWEEN.join(
            text.ljust(wide) if left else text.rjust(wide)
            for text, (_, wide, left) in zip(own, cells, strict=True)
        )
        lines.append((" " * indent + line).rstrip())
    return lines


def _broken(text: str, width: int) -> list[str]:
    """The text in lines of `width` characters at most."""
    lines = [""]
    for piece in _PIECE.findall(text):
        while len(lines[-1]) + len(piece.rstrip()) > width:
            if lines[-1]:
                lines.append("")
            else:
                lines[-1], piece = piece[:width], piece[width:]
                lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines if line.strip()] or [""]
