"""A run's progress, for people."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from testbed.experiment.progress import Progress


class Console:
    """Progress for people: a live line on a terminal, an occasional line elsewhere."""

    def __init__(self) -> None:
        self._live: Any = None
        self._last = ""
        self._tenth = -1
        if sys.stderr.isatty():
            from rich.console import Console as Terminal

            self._live = Terminal(stderr=True).status("starting")
            self._live.start()

    def __call__(self, progress: Progress) -> None:
        text = self._text(progress)
        if self._live is not None:
            self._live.update(text)
            return
        tenth = 10 * progress.done // max(1, progress.total)
        counting = progress.done > 0 and progress.text.count("  ") == 1
        if (not counting or tenth != self._tenth) and text != self._last:
            click.echo(text, err=True)
            self._last, self._tenth = text, tenth if counting else self._tenth

    def line(self, text: str) -> None:
        """A line that stays, above the live one."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            click.echo(text, err=True)

    @staticmethod
    def _text(progress: Progress) -> str:
        from testbed.units import format_duration

        if not progress.done:
            return progress.text
        left = (
            f", about {format_duration(progress.remaining_s)} left"
            if progress.remaining_s is not None
            else ""
        )
        return f"{progress.done} of {progress.total} trials{left}: {progress.text}"

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._live is not None:
            self._live.stop()
            self._live = None
