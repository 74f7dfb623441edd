"""Starting an endpoint in its namespace, as the user who asked for the run, without capabilities, tied to our life.

`nsenter` and `setpriv` (util-linux) do the work, so the command line that runs is plain data and can be printed, tested
and repeated by hand.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed import files, programs
from testbed.errors import EndpointError, UsageError
from testbed.hosts import processes, rootless
from testbed.hosts.channel import Channel, Refused
from testbed.identity import User, invoking_user

#: What a call may take where nobody says otherwise: a long context on a slow machine.
CALL_S = 1800.0
#: A process that stands still for longer is given up.
STOPPED_S = 1.0


def command(module: str, namespace: str | None, user: User, control_fd: int) -> list[str]:
    """The argument vector that runs `module` inside `namespace` as `user`, without a capability left to regain.

    Without root there is nothing to enter and nothing to drop: the module runs as it is (namespace None).
    """
    argv = programs.module(module, "--control-fd", str(control_fd))
    drop = ["setpriv", "--pdeathsig=KILL", "--no-new-privs"]
    if os.geteuid() == 0:
        groups = "--clear-groups" if user.uid == 0 or user.name.isdigit() else "--init-groups"
        if rootless.inside():
            groups = "--keep-groups"  # without root nobody can change them
        drop += [f"--reuid={user.uid}", f"--regid={user.gid}", groups]
        drop += ["--inh-caps=-all", "--bounding-set=-all", "--securebits=+noroot,+noroot_locked"]
    enter = ["nsenter", f"--net=/run/netns/{namespace}", "--"] if namespace else []
    return [*enter, *drop, "--", *argv]


class Gone(EndpointError):
    """An endpoint's process has ended, or stands still."""


class Endpoint:
    """A running endpoint: its process and the channel to call it by."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], channel: Channel, log: Path) -> None:
        self.role, self.process, self.channel, self.log = role, process, channel, log
        self._watch = processes.Watch(process.pid)
        self._lost = False

    @classmethod
    def start(cls, role: str, namespace: str | None, log: Path, user: User | None = None) -> Endpoint:
        """Start ``testbed.endpoints.<role>``; what it prints goes to `log`."""
        user = user or invoking_user()
        ours, theirs = socket.socketpair()
        environment = {**programs.environment(), "HOME": user.home, "USER": user.name, "LOGNAME": user.name}
        environment.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
        # OpenMP's threads would spin at barriers while another process has the core that the last of them needs; unless they
        # are more than there are cores, which a side is that computes in two threads in turn, as the cloud does. So on a busy
        # machine the edge took several times as long as the cloud. Who sleeps at once is treated alike.
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
        environment.pop("GOMP_SPINCOUNT", None)
        with files.writing(log, os.O_APPEND) as output:
            try:
                process = subprocess.Popen(
                    command(f"testbed.endpoints.{role}", namespace, user, theirs.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=[theirs.fileno()],
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the orchestrator's affair
                )
            except OSError as error:
                ours.close()
                raise EndpointError(f"cannot start the {role} process: {error}") from error
            finally:
                theirs.close()
        return cls(role, process, Channel(ours), log)

    def call(
        self, name: str, timeout: float = CALL_S, besides: Callable[[], None] = lambda: None, **arguments: Any
    ) -> Any:
        """Call the endpoint; its answer is there within `timeout` seconds. Raises EndpointError naming the role, and the last
        line of its log where it died.

        besides: looked at while the answer is awaited, as is the process; what it raises ends the call.
        """

        def look() -> None:
            self.check()
            besides()

        self._lost = True  # until it has answered
        try:
            result = self.channel.call(name, timeout, look, **arguments)
        except (Refused, UsageError) as error:
            self._lost = False
            if isinstance(error, UsageError):
                raise
            raise EndpointError(f"{self.role}: {error}") from error
        except Gone:
            raise
        except EndpointError as error:
            # A broken channel and the end of the process reach us in either order.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            if self.process.poll() is None:
                raise EndpointError(
                    f"the {self.role}, asked to `{name}`: {error} (its log: {self.log})"
                ) from error
            raise Gone(self._end()) from error
        self._lost = False
        return result

    def check(self, within_s: float = 0.0) -> None:
        """Raises Gone where the process has ended, or ends within so many seconds, or has stood still for one."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(within_s)
        if self.process.poll() is not None:
            raise Gone(self._end())
        if (stopped_s := self._watch.stopped_s()) > STOPPED_S:
            raise Gone(
                f"the {self.role} process ({self.process.pid}) has been stopped for {stopped_s:.1f} s (SIGSTOP)"
            )

    @property
    def alive(self) -> bool:
        """Whether the process still runs, and owes no answer."""
        return self.process.poll() is None and not self._lost

    def _end(self) -> str:
        return f"the {self.role} process ended ({self._fate()}): {self._last_words()}"

    def _fate(self) -> str:
        code = self.process.poll()
        if code is not None and code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"exit status {code}"

    def _last_words(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return f"{lines[-1][:300]} (see {self.log})" if lines else f"it printed nothing to {self.log}"

    def stop(self) -> None:
        """End the process: it leaves when the channel closes, and is killed where it does not."""
        self.channel.socket.close()
        try:
            self.process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
