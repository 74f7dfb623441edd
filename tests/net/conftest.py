"""What tests of networks share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testbed.net.fabric import removal, state
from tests.net.wire import Wire, wire


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory of states of its own; the networks that a failing test leaves in it are removed."""
    monkeypatch.setenv("TESTBED_STATE", str(tmp_path / "state"))
    yield tmp_path / "state"
    if os.geteuid() == 0:
        for left in state.list_states():
            with state.locked():
                removal.remove(left)


def eventually(true: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether it becomes true in so many seconds."""
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return true()


@pytest.fixture
def net() -> Iterator[Wire]:
    """Two namespaces and a wire between them, for emulators."""
    with wire() as made:
        yield made
