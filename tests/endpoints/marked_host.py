"""A kind of host for a test: this machine, where every program finds a mark in its environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from testbed.hosts.local import Local, LocalProcess


class Marked(Local):
    """This machine, with a mark."""

    def __init__(self, mark: str) -> None:
        super().__init__()
        self.mark = mark

    def start(
        self, argv: Sequence[str], env: Mapping[str, str | None], log: Path | None = None
    ) -> LocalProcess:
        return super().start(argv, {**env, "MARK": self.mark}, log)

    def describe(self) -> dict[str, Any]:
        return {"kind": "marked", "mark": self.mark}
