"""An endpoint as its caller sees it: a role, and calls that are answered in time or end with the process's fate."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from testbed.endpoints.protocol import Hello, Message
from testbed.errors import EndpointError, UsageError
from testbed.hosts.channel import Refused
from testbed.hosts.host import Host, Process

#: What a call may take where nobody says otherwise: a long context on a slow machine.
CALL_S = 1800.0
#: A process that stands still for longer is given up.
STOPPED_S = 1.0
#: Between the end of a process's channel and its own, in either order.
_ENDING_S = 0.5

T = TypeVar("T")


class Gone(EndpointError):
    """An endpoint's process has ended, or stands still."""


class Endpoint:
    """A running endpoint: its role, and its process to call."""

    def __init__(self, role: str, process: Process) -> None:
        self.role, self.process = role, process
        self._lost = self._greeted = False

    @classmethod
    def start(cls, role: str, host: Host, log: Path) -> Endpoint:
        """Start ``testbed.endpoints.<role>``; what it prints goes to `log`. Raises EndpointError."""
        env = {
            "HF_HUB_DISABLE_TELEMETRY": os.environ.get("HF_HUB_DISABLE_TELEMETRY", "1"),
            # OpenMP's threads would spin at barriers while another process has the core that the last of them needs; unless they
            # are more than there are cores, which a side is that computes in two threads in turn, as the cloud does. So on a busy
            # machine the edge took several times as long as the cloud. Who sleeps at once is treated alike.
            "OMP_WAIT_POLICY": "PASSIVE",
            "GOMP_SPINCOUNT": None,
        }
        return cls(role, host.start(host.module(f"testbed.endpoints.{role}"), env, log))

    def call(
        self, message: Message[T], within_s: float = CALL_S, besides: Callable[[], None] = lambda: None
    ) -> T:
        """The endpoint's answer. Raises EndpointError naming the role, and the last line of its log where it died; UsageError
        where it is of a testbed that speaks another protocol.

        besides: looked at while the answer is awaited, as is the process; what it raises ends the call.
        """

        def look() -> None:
            self.check()
            besides()

        if not self._greeted and not isinstance(message, Hello):
            self.call(Hello(), within_s, besides).check(f"the {self.role}")
            self._greeted = True
        self._lost = True  # until it has answered
        try:
            result: T = self.process.channel.call(message, message.answer(), within_s, look)
        except (Refused, UsageError) as error:
            self._lost = False
            if isinstance(error, UsageError):
                raise
            raise EndpointError(f"{self.role}: {error}") from error
        except Gone:
            raise
        except EndpointError as error:
            if self.process.status(_ENDING_S) is None:
                raise EndpointError(
                    f"the {self.role}, asked to `{message.__struct_config__.tag}`: {error} (its log: {self.process.log})"
                ) from error
            raise Gone(self._end()) from error
        self._lost = False
        return result

    def check(self, within_s: float = 0.0) -> None:
        """Raises Gone where the process has ended, or ends within so many seconds, or has stood still for one."""
        if self.process.status(within_s) is not None:
            raise Gone(self._end())
        if (stopped_s := self.process.stopped_s()) > STOPPED_S:
            raise Gone(
                f"the {self.role} process ({self.process.pid}) has been stopped for {stopped_s:.1f} s (SIGSTOP)"
            )

    @property
    def alive(self) -> bool:
        """Whether the process still runs, and owes no answer."""
        return self.process.status() is None and not self._lost

    def _end(self) -> str:
        status, words, log = self.process.status(), self.process.last_words(), self.process.log
        fate = (
            f"exit status {status}" if not status or status > 0 else f"signal {signal.Signals(-status).name}"
        )
        said = f"{words[:300]} (see {log})" if words else f"it printed nothing to {log}"
        return f"the {self.role} process ended ({fate}): {said}"
