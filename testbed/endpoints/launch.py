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
from pathlib import Path
from typing import Any

from testbed import files, programs
from testbed.endpoints.control import Channel
from testbed.errors import EndpointError
from testbed.identity import User, invoking_user
from testbed.net import rootless


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


class Endpoint:
    """A running endpoint: its process and the channel to call it by."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], channel: Channel, log: Path) -> None:
        self.role, self.process, self.channel, self.log = role, process, channel, log

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

    def call(self, name: str, timeout: float | None = None, **arguments: Any) -> Any:
        """Call the endpoint. Raises EndpointError naming the role, and the last line of its log where it died."""
        try:
            return self.channel.call(name, timeout, **arguments)
        except EndpointError as error:
            # A broken channel and the end of the process reach us in either order.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
            if self.process.poll() is None:
                raise EndpointError(f"{self.role}: {error}") from error
            raise EndpointError(
                f"the {self.role} process ended ({self._fate()}): {self._last_words()}"
            ) from error

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self.process.poll() is None

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
