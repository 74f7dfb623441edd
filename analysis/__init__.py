"""From a run's directory to figures and tables. Reads a run directory and nothing else; needs neither root
nor torch.
"""

from __future__ import annotations

from pathlib import Path


def draw(run_path: Path, names: list[str] | None = None, where: str | None = None) -> list[Path]:
    """Draw figures into ``figures/`` under the run's directory, each as PNG and PDF; returns the files'
    paths.

    `names`: which figures (see `analysis.figures.FIGURES`); None draws all that the run has data for.
    `where`: an expression over the columns that selects rows, such as ``profile == "5g-mid"``. Raises
    UsageError for an unknown figure, an expression that cannot be read, and a run in which there is nothing
    to draw.
    """
    from testbed.analysis.figures import draw_all
    from testbed.analysis.run import load

    return draw_all(load(run_path, where), names)


def write_summary(run_path: Path) -> Path:
    """Write ``summary.csv``, one row per cell and task; returns its path. Raises UsageError for a run
    without rows.
    """
    from testbed.analysis.run import load
    from testbed.analysis.summary import write

    return write(load(run_path))


def write_report(run_path: Path, figures: list[Path] | None = None) -> Path:
    """Write ``report.html`` and ``comparisons.csv``; returns the page's path. `figures`: what `draw` returned;
    None draws all. Raises UsageError for a run without rows.
    """
    from testbed.analysis import report
    from testbed.analysis.run import load

    return report.write(load(run_path), figures)


def headline(run_path: Path) -> str:
    """A plain-text table for the terminal: latency, quality and payload of each setting, profile by profile.

    Raises UsageError for a run without finished trials.
    """
    from testbed.analysis.run import load
    from testbed.analysis.summary import table

    return table(load(run_path))
