"""What a started program is on every kind of host: its streams, what it printed besides, a block at whose end it is stopped."""

from __future__ import annotations

import abc
import contextlib
import functools
from pathlib import Path
from typing import IO, Self

from testbed import files
from testbed.errors import StorageError
from testbed.hosts.channel import Channel


class Started(abc.ABC):
    """A `Process` but for what its kind of host does in its own way.

    printed: what it prints besides where it has no log; None: there is nothing, or it is in the log.
    """

    def __init__(
        self, pid: int, stdin: IO[bytes], stdout: IO[bytes], log: Path | None, printed: IO[bytes] | None
    ) -> None:
        self.pid, self.stdin, self.stdout, self.log, self._printed = pid, stdin, stdout, log, printed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.kill()
        self.stop()

    @abc.abstractmethod
    def kill(self) -> None: ...

    @abc.abstractmethod
    def stop(self) -> None: ...

    @functools.cached_property
    def channel(self) -> Channel:
        return Channel(self.stdout, self.stdin)

    def last_words(self) -> str:
        try:
            data = files.read(self.log) if self.log is not None else self._kept_words()
        except (OSError, ValueError, StorageError):  # gone, or closed
            return ""
        lines = data.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _kept_words(self) -> bytes:
        if self._printed is None:
            return b""
        self._printed.seek(0)
        return self._printed.read()

    def _hang_up(self) -> None:
        """Close its streams, at which it is to leave."""
        for stream in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                stream.close()
