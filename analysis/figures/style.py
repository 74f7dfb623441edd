"""How figures look: fonts, the frame with title and footnote, and one mark per setting that survives a
black-and-white print.
"""

from __future__ import annotations

import contextlib
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from testbed.analysis.names import LONGEST, longest
from testbed.codecs.spec import parse, written
from testbed.errors import SpecError

# M. Okabe and K. Ito, "Color Universal Design", 2008: eight colours told apart with every common colour
# vision.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, INK = "#8A8A8A", "#222222"

_RIGHT = 0.18  #: inches, room for half of a tick's label
_NARROW = 6.0  #: inches, below which panels stand below one another
_BOLD = 0.663  #: of a bold text's size, a character's width
_LEAST = 6.0  #: points, of a text as it is printed


@dataclass(frozen=True)
class Paper:
    """What figures are made for. `drawn`: how wide they are laid out, inches; `printed`: how wide they are then; `longest`:
    characters of a name. Without `titles` they have no title, subtitle and footnotes: a paper's caption says that.
    """

    drawn: float
    printed: float
    longest: int = LONGEST
    titles: bool = True


#: A README at 100 pixels an inch; a page's text block and a column of a two-column paper, where 8.5 points become 7 and 6.4.
PAPERS = {"screen": Paper(9.0, 9.0), "page": Paper(8.4, 7.0), "column": Paper(4.5, 3.4, 20)}
_paper: ContextVar[Paper] = ContextVar("paper", default=PAPERS["screen"])


def paper() -> Paper:
    """What the figure that is being made is for."""
    return _paper.get()


def legible(points: float) -> float:
    """A text's size, or the one that is 6 points when it is printed."""
    return max(points, _LEAST * paper().drawn / paper().printed)


@contextlib.contextmanager
def style(made_for: Paper | None = None) -> Iterator[None]:
    """The settings under which figures are made and saved; None: for the screen."""
    chosen = made_for or PAPERS["screen"]
    token, names = _paper.set(chosen), longest.set(chosen.longest)
    try:
        with _settings():
            yield
    finally:
        longest.reset(names)
        _paper.reset(token)


def _settings() -> AbstractContextManager[None]:
    return matplotlib.rc_context(
        {
            "font.family": "DejaVu Sans",
            "font.size": 9,
            "axes.titlesize": 9.5,
            "axes.labelsize": 9,
            "axes.edgecolor": "#666666",
            "axes.linewidth": 0.8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E6E6E6",
            "grid.linewidth": 0.7,
            "hatch.linewidth": 0.6,
            "legend.frameon": False,
            "legend.fontsize": 8.5,
            "pdf.fonttype": 42,  # TrueType, embedded: text stays text, and no font has to be there where it is read
            "savefig.dpi": 200,
            "xtick.labelsize": 8.5,
            "ytick.labelsize": 8.5,
        }
    )


@dataclass(frozen=True)
class Mark:
    """A setting's mark: shape and colour say the selector or placement, the fill says the precision, the
    size what is kept.
    """

    marker: str
    color: str
    fill: str = "full"  #: matplotlib's fillstyle
    size: float = 8.0

    def options(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot`."""
        # An open mark is filled with white: lines behind it must not show through.
        solid = self.fill == "full"
        return {
            "marker": self.marker,
            "color": self.color,
            "markerfacecolor": "white" if self.fill == "none" else self.color,
            "markerfacecoloralt": "white",
            "fillstyle": "full" if self.fill == "none" else self.fill,
            "markersize": self.size,
            "markeredgecolor": INK if solid else self.color,
            "markeredgewidth": 0.6 if solid else 1.3,
            "linestyle": "none",
        }

    def handle(self, label: str) -> Line2D:
        """What stands for the mark in a legend."""
        return Line2D([], [], label=label, **self.options())


_PLACEMENTS = {
    "cloud": Mark("*", VERMILLION, size=13),
    "edge": Mark("X", VERMILLION, size=9),
    "scout": Mark("H", VERMILLION, size=9),
}
_SELECTORS = {
    "": ("o", BLACK),
    "q2c": ("s", BLUE),
    "snapkv": ("^", ORANGE),
    "h2o": ("D", GREEN),
    "window": ("v", SKY),
    "random": ("p", PURPLE),
}
_SPARE = [("P", BLUE), ("h", ORANGE), ("<", GREEN), (">", PURPLE), ("d", SKY), ("8", GREY)]
_FILLS = {16: "full", 8: "left", 4: "none"}
_PLAIN = {"fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "int3": 3, "int2": 2}


def marks(settings: Iterable[tuple[str, str, str]]) -> dict[str, Mark]:
    """A mark for each (label, placement, codec), by label; distinct ones as long as shapes, fills and sizes
    last. A codec that is met a second time, placed or delivered otherwise, has another shape there.
    """
    shapes = dict(_SELECTORS)
    ways: list[str] = []  #: how a codec crosses, by what its label says besides
    spare = iter(_SPARE * 20)
    taken: set[Mark] = set()
    chosen: dict[str, Mark] = {}
    for label, placement, codec in settings:
        way = label.replace(codec, "", 1) if codec in label else ""
        ways += [way] if way not in ways and placement not in _PLACEMENTS else []
        first = placement in _PLACEMENTS or way == ways[0]
        mark = _PLACEMENTS.get(placement) or _codec_mark(codec, shapes, spare, "" if first else way)
        for fill in ("top", "bottom", "right", "full", "none", "left"):
            if mark in taken:
                mark = Mark(mark.marker, mark.color, fill, mark.size)
        taken.add(mark)
        chosen[label] = mark
    return chosen


def _codec_mark(codec: str, shapes: dict[str, tuple[str, str]], spare: Any, way: str) -> Mark:
    try:
        parts = written(codec)
    except SpecError:  # of a version that has other methods
        parts = {}
    selector, quantizer = parts.get("selector"), parts.get("quantizer")
    bits = _bits(quantizer.text) if quantizer else 16 if parts else None
    shown = selector or parts.get("transform") or quantizer
    name = way + (codec if shown is None else "" if shown.name in _PLAIN else shown.name)
    if name not in shapes:
        shapes[name] = next(spare)
    marker, color = shapes[name]
    kept = 1.0 if selector is None or selector.ratio is None else selector.ratio
    size = 5.2 + 3.2 * min(1.0, max(0.0, kept)) ** 0.75 if selector else 7.5
    return Mark(marker, color, _FILLS.get(bits or 0, "bottom"), size)


def _bits(quantizer: str) -> int | None:
    """Of an element, as the method's name or its parameter says; None where neither does, as of mixed precision."""
    try:
        method = parse(quantizer).quantizer
    except SpecError:
        return None
    return _PLAIN.get(method.name) or getattr(method, "bits", None)


@dataclass(frozen=True)
class Frame:
    """A figure of equal panels with title, subtitle, legend and footnotes around them; lengths in inches.

    The places are computed, not left to a layout engine: they are then known before anything is drawn.
    """

    title: str
    subtitle: str
    footnotes: list[str]
    rows: int
    columns: int
    panel: float  #: height of one panel's axes
    legend: float  #: height left free for the legend, above the footnotes
    left: float = 0.7  #: room for the labels of the leftmost axes
    between: float = 0.55  #: and of the others
    above: float = 0.44  #: room for a panel's title
    below: float = 0.24  #: and for its ticks
    stacks: bool = (
        True  #: a panel is understood without the one beside it, so that they may stand below one another
    )

    @property
    def width(self) -> float:
        """The whole figure's, inches."""
        return paper().drawn if self.stacks else max(_NARROW, paper().drawn)

    @property
    def _grid(self) -> tuple[int, int]:
        """Rows and columns, as the paper has room for them."""
        narrow = self.width < _NARROW
        return (self.rows * self.columns, 1) if narrow else (self.rows, self.columns)

    @property
    def _notes(self) -> list[str]:
        return _wrapped(self.footnotes, self.width * 19.6) if paper().titles else []

    @property
    def footer(self) -> float:
        """Height of the footnotes: where the legend begins."""
        return (0.14 if paper().titles else 0.06) + 0.135 * len(self._notes)

    def caption(self) -> str:
        """Its texts, for where they are not in the figure; what it shows, and behind an empty line what is to be known of it."""
        return "\n".join([self.title, *self.subtitle.splitlines(), "", *self.footnotes])

    def figure(self) -> tuple[Figure, list[Axes]]:
        """The figure with its texts, and its axes row by row."""
        (rows, columns), width = self._grid, self.width
        title = _wrapped([self.title], width * 10.5)
        below = _wrapped(self.subtitle.splitlines(), width * 14.5)
        head = 0.22 + 0.2 * len(title) + 0.16 * len(below) if paper().titles else 0.04
        legend = self.legend + 0.2 if self.legend and width < _NARROW else self.legend  # in fewer columns
        foot = self.footer + legend + self.below + 0.22
        step = self.panel + self.above + self.below
        height = head + rows * step - self.below + foot
        figure = Figure(figsize=(width, height))
        figure.set_label(self.caption())
        if paper().titles:
            _write_around(figure, (width, height), title, below, self._notes)
        left = min(self.left, 0.5 * width)
        wide = (width - left - _RIGHT - (columns - 1) * self.between) / columns
        grid = {
            "left": left / width,
            "right": 1 - _RIGHT / width,
            "top": 1 - (head + self.above) / height,
            "bottom": foot / height,
            "wspace": self.between / wide,
            "hspace": (self.above + self.below) / self.panel,
        }
        axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid)
        return figure, list(axes.flat)


def _write_around(
    figure: Figure, size: tuple[float, float], title: list[str], below: list[str], notes: list[str]
) -> None:
    """Title, subtitle and footnotes."""
    width, height = size
    start = 0.1 / width
    places: list[tuple[float, list[str], dict[str, Any]]] = [
        (1 - 0.1 / height, title, {"va": "top", "fontsize": 12, "fontweight": "bold", "color": INK}),
        (1 - (0.16 + 0.2 * len(title)) / height, below, {"va": "top", "fontsize": 8.5, "color": "#444444"}),
        (0.08 / height, notes, {"va": "bottom", "fontsize": legible(7.2), "color": "#555555"}),
    ]
    for y, lines, look in places:
        figure.text(start, y, "\n".join(lines), linespacing=1.3, **look)


def _wrapped(paragraphs: Iterable[str], characters: float) -> list[str]:
    return [line for paragraph in paragraphs for line in textwrap.wrap(paragraph, int(characters))]


def panel_title(axes: Axes, title: str, below: str) -> None:
    """A panel's name, and under it the conditions that it shows; both kept within the panel's width."""
    width = axes.get_window_extent().width / axes.figure.dpi * 72  # points
    large = max(legible(6.8), min(9.5, width / (_BOLD * max(1, len(title)))))
    if len(title) * _BOLD * large > width:
        most = int(width / (_BOLD * large))  # what differs between links may stand at the end of their names
        title = f"{title[: most // 2]} … {title[3 - (most - most // 2) :]}"
    small = max(legible(6.0), min(8.0, width / (0.55 * max(1, len(below)))))
    lines = textwrap.wrap(below, max(20, int(width / (0.55 * small)))) or [""]
    looks: list[tuple[str, float, dict[str, Any]]] = [
        (title, 17 + 1.2 * small * (len(lines) - 1), {"fontsize": large, "fontweight": "bold"}),
        ("\n".join(lines), 5, {"fontsize": small, "color": "#444444"}),
    ]
    for text, height, look in looks:
        axes.annotate(text, (0, 1), (0, height), xycoords="axes fraction", textcoords="offset points", **look)


def legend_columns(labels: Iterable[str], most: int = 5) -> int:
    """How many columns of these labels fit beside each other."""
    return max(1, min(most, int((paper().drawn - 0.2) / (0.5 + 0.072 * max(map(len, labels), default=1)))))


def legend_height(labels: Sequence[str], most: int = 5) -> float:
    """What a figure leaves free for a legend of these labels, in inches."""
    return 0.2 * math.ceil(len(labels) / legend_columns(labels, most)) + 0.14


def bottom_legend(figure: Figure, frame: Frame, handles: list[Any], columns: int, above: float = 0.0) -> None:
    """A legend across the figure, `above` inches above the footnotes, in so many columns or as many as there is room for."""
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(columns, legend_columns([str(handle.get_label()) for handle in handles], columns)),
        bbox_to_anchor=(0.5, (frame.footer + above - 0.04) / float(figure.get_size_inches()[1])),
        columnspacing=1.5,
        handletextpad=0.5,
        borderpad=0.2,
        labelspacing=0.45,
    )


def tell_missing(ax: Axes, missing: list[str], most: int = 4) -> None:
    """Write into a panel's lower right corner what has no mark in it, such as settings that failed."""
    if missing:
        rest = [f"and {len(missing) - most + 1} more"] if len(missing) > most else []
        lines = [*(missing[: most - 1] if rest else missing), *rest]
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5}
        ax.text(
            0.985,
            0.03,
            "\n".join(lines),
            transform=ax.transAxes,
            ha="right",
            va="bottom",
            fontsize=legible(6.8),
            color=VERMILLION,
            zorder=1.8,
            bbox=box,
        )
