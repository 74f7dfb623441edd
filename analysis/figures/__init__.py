"""The figures, one file each. To add one: a function from a `Run` to a matplotlib Figure, and its line in
`FIGURES`.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from testbed.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from testbed.analysis.run import Run

FIGURES = {
    "latency_quality": "testbed.analysis.figures.latency_quality:draw",
    "latency_quality_by_task": "testbed.analysis.figures.latency_quality:draw_by_task",
    "latency_nll": "testbed.analysis.figures.latency_quality:draw_nll",
    "stages": "testbed.analysis.figures.stages:draw",
    "ttft": "testbed.analysis.figures.ttft:draw",
    "regimes": "testbed.analysis.figures.regimes:draw",
    "who_prefills": "testbed.analysis.figures.who_prefills:draw",
    "naive_error": "testbed.analysis.figures.naive_error:draw",
    "link_sweep": "testbed.analysis.figures.link_sweep:draw",
    "retention": "testbed.analysis.figures.retention:draw",
    "rate_distortion": "testbed.analysis.figures.rate_distortion:draw",
    "latency_cdf": "testbed.analysis.figures.latency_cdf:draw",
    "pipeline": "testbed.analysis.figures.pipeline:draw",
    "adaptive": "testbed.analysis.figures.adaptive:draw",
    "deadlines": "testbed.analysis.figures.deadlines:draw",
    "load_latency": "testbed.analysis.figures.load_latency:draw",
    "goodput": "testbed.analysis.figures.load_latency:draw_goodput",
    "load_timeline": "testbed.analysis.figures.load_timeline:draw",
    "timeline": "testbed.analysis.figures.timeline:draw",
    "layer_sensitivity": "testbed.analysis.figures.layer_sensitivity:draw_run",
    "programs": "testbed.analysis.figures.programs:draw",
    "fidelity": "testbed.analysis.figures.fidelity:draw",
    "fidelity_traces": "testbed.analysis.figures.fidelity_traces:draw",
}

_PRINTED_DPI = 300
#: What says something of links, or by a model of a single request: what waited for others has no place there.
_ALONE = ("regimes", "who_prefills", "naive_error", "link_sweep")


#: What is said of programs of one's own, which send no caches and answer no questions: their columns, their times, their links.
_OF_PROGRAMS = ("programs", "latency_cdf", "fidelity", "fidelity_traces")
#: What says nothing of times, or of links that were measured.
_TIMELESS = ("retention", "rate_distortion", "layer_sensitivity", "fidelity", "fidelity_traces")


class NotInThisRun(UsageError):
    """The run has no data for this figure: an error where it was asked for by name, passed over where all
    were.
    """


def figure(name: str, run: Run) -> Figure:
    """One figure, not written anywhere. Raises UsageError for an unknown name and NotInThisRun for a run
    without its data.
    """
    if name not in FIGURES:
        raise UsageError(f"unknown figure {name!r}; choose from {', '.join(FIGURES)}")
    from testbed.analysis import programs

    module, function = FIGURES[name].split(":")
    run = run.require(_least(name))
    if programs.is_one(run) and name not in _OF_PROGRAMS:
        raise NotInThisRun(
            f"{run.path}: is of programs, of which there are the figures {', '.join(_OF_PROGRAMS)}"
        )
    if run.untimed and name not in _TIMELESS:
        raise NotInThisRun(f"{run.path}: {run.untimed}, and {name} is of times")
    if name in _ALONE and (alone := run.alone) is not run:
        if len(alone.rows) < _least(name):
            raise NotInThisRun(
                f"{run.path}: it is of requests made one behind the other, and all are under a load"
            )
        run = alone
    drawn: Figure = getattr(importlib.import_module(module), function)(run)
    return drawn


def draw_all(
    run: Run, names: list[str] | None = None, width: str = "screen", titles: bool = True
) -> list[Path]:
    """Write the named figures (None: all the run has data for) as PNG and PDF; returns the paths. Raises as
    `figure` does.

    width: one of `style.PAPERS`; a paper's are in a folder of their own, ``figures-column``. Without `titles` each figure's texts
    are in a file beside it, for a caption.
    """
    from testbed.analysis.figures.style import PAPERS, style

    for name in names or ():
        if name not in FIGURES:
            raise UsageError(f"unknown figure {name!r}; choose from {', '.join(FIGURES)}")
    run.require(min(map(_least, names)) if names else 2)
    written = []
    folder = "figures" if width == "screen" and titles else f"figures-{width}"
    with style(replace(PAPERS[width], titles=titles)):
        for name in names or FIGURES:
            try:
                drawn = figure(name, run)
            except NotInThisRun:
                if names:
                    raise
                continue
            for suffix in ("png", "pdf"):
                written.append(run.write(f"{folder}/{name}.{suffix}", partial(_save, drawn)))
            if not titles:
                written.append(run.write(f"{folder}/{name}.txt", partial(_save_caption, drawn)))
    return written


def _least(name: str) -> int:
    """So many finished trials a figure needs: most compare; links are measured before the first one."""
    return {
        "timeline": 1,
        "load_timeline": 1,
        "layer_sensitivity": 0,
        "fidelity": 0,
        "fidelity_traces": 0,
    }.get(name, 2)


def _save(drawn: Figure, path: Path) -> None:
    from testbed.analysis.figures import pages
    from testbed.analysis.figures.style import paper

    # No dates and versions inside: the same rows give the same bytes. What it shows is, for whoever cannot see it.
    metadata = {
        "Software": None,
        "Description": " ".join(str(drawn.get_label()).partition("\n\n")[0].splitlines()),
    }
    scale = paper().printed / float(drawn.get_size_inches()[0])
    if path.suffix == ".pdf":
        pages.save(drawn, path, scale)
    elif scale == 1:
        drawn.savefig(path, metadata=metadata)
    else:
        drawn.savefig(
            path,
            dpi=_PRINTED_DPI * scale,
            metadata=metadata,
            pil_kwargs={"dpi": (_PRINTED_DPI,) * 2},
        )


def _save_caption(drawn: Figure, path: Path) -> None:
    path.write_text(f"{drawn.get_label()}\n", encoding="utf-8")
