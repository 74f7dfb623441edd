"""A figure as a page of PDF that is smaller than it was laid out: everything in it by the same factor, its text's size, too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_pdf import Op, PdfFile, PdfPages
from matplotlib.figure import Figure


def save(figure: Figure, path: Path, scale: float) -> None:
    """Write the figure as PDF, `scale` times as wide and high. Without a date: the same figure gives the same bytes."""
    with _Pages(path, scale) as pages:
        figure.savefig(pages, format="pdf")


class _Pages(PdfPages):
    """A file whose pages are scaled."""

    def __init__(self, path: Path, scale: float) -> None:
        super().__init__(path, metadata={"CreationDate": None})
        self._path, self._scale = path, scale

    def _ensure_file(self) -> PdfFile:
        if self._file is None:
            self._file = _Scaled(self._path, self._scale)
        return self._file


class _Scaled(PdfFile):
    def __init__(self, path: Path, scale: float) -> None:
        super().__init__(path, metadata={"CreationDate": None})
        self._scale = scale

    def newPage(self, width: float, height: float) -> Any:
        """The page in its printed size, on which what follows is drawn as it was laid out."""
        super().newPage(width * self._scale, height * self._scale)
        if self._scale != 1:
            self.output(self._scale, 0, 0, self._scale, 0, 0, Op.concat_matrix)
