"""Processes on this machine: as the user who asked for the run, without capabilities, tied to our life; also in a namespace.

`nsenter` and `setpriv` (util-linux) do the work, so the command line that runs is plain data and can be printed, tested
and repeated by hand.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

from testbed import files, programs
from testbed.errors import EndpointError
from testbed.hosts import processes, rootless
from testbed.hosts.started import Started
from testbed.identity import User, invoking_user

#: How long a process may take to leave, once its standard input has ended.
_LEAVE_S = 3.0


class LocalProcess(Started):
    """A `Process` of this machine; what its parts are for is said there."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path | None, printed: IO[bytes] | None) -> None:
        stdin, stdout = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        super().__init__(process.pid, stdin, stdout, log, printed)
        self._process, self._watch = process, processes.Watch(process.pid)

    def status(self, within_s: float | None = 0.0) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(within_s)
        return self._process.poll()

    def stopped_s(self) -> float:
        return self._watch.stopped_s()

    def kill(self) -> None:
        self._process.kill()

    def stop(self) -> None:
        self._hang_up()
        if self.status(_LEAVE_S) is None:
            self._process.kill()
            self._process.wait()
        if self._printed is not None:
            self._printed.close()


class Local:
    """This machine, as a `Host`. `user`: as whom programs run; None: the user who typed the command."""

    def __init__(self, user: User | None = None) -> None:
        self._user = user or invoking_user()

    def command(self, argv: Sequence[str]) -> list[str]:
        """The argument vector that runs `argv` as the user, without a capability left to regain.

        Without root there is nothing to drop: the program runs as it is.
        """
        user = self._user
        drop = ["setpriv", "--pdeathsig=KILL", "--no-new-privs"]
        if os.geteuid() == 0:
            groups = "--clear-groups" if user.uid == 0 or user.name.isdigit() else "--init-groups"
            if rootless.inside():
                groups = "--keep-groups"  # without root nobody can change them
            drop += [f"--reuid={user.uid}", f"--regid={user.gid}", groups]
            drop += ["--inh-caps=-all", "--bounding-set=-all", "--securebits=+noroot,+noroot_locked"]
        return [*drop, "--", *argv]

    def module(self, name: str, *arguments: str) -> list[str]:
        return programs.module(name, *arguments)

    def start(
        self, argv: Sequence[str], env: Mapping[str, str | None], log: Path | None = None
    ) -> LocalProcess:
        return self._started(self.command(argv), env, log)

    def start_as_root(self, argv: Sequence[str]) -> LocalProcess:
        """Start a program with all the rights that we have, or can get by sudo."""
        return self._started([*self._inside, *argv], {}, None)

    _inside: tuple[str, ...] = ()
    """What runs a program in the namespace."""

    def _started(
        self, command: Sequence[str], env: Mapping[str, str | None], log: Path | None
    ) -> LocalProcess:
        # The host's own environment is ours, with the user's home and name.
        user = self._user
        given = {"HOME": user.home, "USER": user.name, "LOGNAME": user.name, **env}
        environment = {k: v for k, v in {**programs.environment(), **given}.items() if v is not None}
        with contextlib.ExitStack() as closing:
            if log is not None:
                printed, kept = closing.enter_context(files.writing(log, os.O_APPEND)), None
            else:
                printed = kept = closing.enter_context(tempfile.TemporaryFile())
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=printed,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the orchestrator's affair
                )
            except OSError as error:
                raise EndpointError(f"cannot start {error.filename or command[0]}: {error}") from error
            if kept is not None:
                closing.pop_all()
        return LocalProcess(process, log, kept)

    def put(self, source: Path, target: Path) -> None:
        with files.storing(target):
            shutil.copyfile(source, target)

    def get(self, source: Path, target: Path) -> None:
        self.put(source, target)

    def describe(self) -> dict[str, Any]:
        return {"kind": "local", "user": self._user.name}

    def clock(self) -> tuple[float, float]:
        return 0.0, 0.0


class Namespace(Local):
    """A network namespace of this machine, one under /run/netns. Entering it takes root, which the program has not."""

    def __init__(self, name: str, user: User | None = None) -> None:
        super().__init__(user)
        self.name = name
        self._inside = ("nsenter", f"--net=/run/netns/{name}", "--")

    def command(self, argv: Sequence[str]) -> list[str]:
        return [*self._inside, *self.plain(argv)]

    def plain(self, argv: Sequence[str]) -> list[str]:
        """The argument vector that runs `argv` as the user from within the namespace, which somebody else has entered."""
        return super().command(argv)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "kind": "namespace", "name": self.name}
