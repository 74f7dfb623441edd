"""What tests of the analysis share: commands as people type them, and a run with much in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from testbed.analysis.figures import FIGURES
from tests import command as commands
from tests.analysis.make_pipeline import ADAPTING, CHANGING, make_pipeline
from tests.analysis.make_run import PROFILES, SWEEP, lines, make_run, rewrite, write_calibration

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command() -> Command:
    """Runs a command: its exit status, what it prints, and what it prints as an error."""

    def typed(*arguments: object) -> tuple[int, str, str]:
        done = commands.command(*map(str, arguments))
        return done.status, done.out, done.errors

    return typed


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who draws all figures draws two, for tests of something else."""
    few = {name: FIGURES[name] for name in ("stages", "timeline")}
    for module in ("figures", "report"):
        monkeypatch.setattr(f"testbed.analysis.{module}.FIGURES", few)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Many settings with long names, a link without a rate, one out of tolerance."""
    path = make_run(tmp_path_factory.mktemp("wide") / "run", examples=4, tasks=("needle",))
    rows = lines(path)
    longer = [
        r | {"codec": r["codec"].replace("snapkv@0.25", "snapkv@0.5(window=32)") + "+zstd"}
        for r in rows
        if r["codec"]
    ]
    inline = "up:rate=10mbit,delay=20ms,jitter=5ms,loss=1%;down:rate=50mbit,delay=20ms"
    odd = [
        r | {"profile": inline, "rate_up_bps": None, "calibrated": False}
        for r in rows
        if r["profile"] == "lte"
    ]
    rewrite(path, [r | {"trial": str(i)} for i, r in enumerate(rows + longer + odd)])
    write_calibration(path, (*PROFILES, *SWEEP, inline), off=("lte",), trace=inline)
    return path


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stores, streams and caches met half-way on four links that hold."""
    return make_pipeline(tmp_path_factory.mktemp("pipelines") / "run", examples=6)


@pytest.fixture(scope="session")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adaptive senders with a deadline on a link that follows a trace."""
    return make_pipeline(
        tmp_path_factory.mktemp("changing") / "run", profiles=(CHANGING,), settings=ADAPTING, examples=8
    )
