"""A process of ours that serves links, as seen from outside: it is started, asked, found again and ended.

The relay is one (`testbed.net.emulators.relay`), and what makes netem follow traces is another
(`testbed.net.emulators.netem.trace_follower`). Inside, `control.Control` takes what is ordered here.

With a directory to keep its files in (*keep*), such a process outlives this one, listens on a socket there, and is found again by
the JSON file beside it. Without one it has one end of a socket pair, and ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

from testbed.errors import NetworkError
from testbed.hosts import processes
from testbed.hosts.namespaces import call_inside
from testbed.identity import as_root
from testbed.net.emulators.relay.control import LARGEST
from testbed.programs import isolated

_ANSWER_S = 5.0
_STOPPED_S = 1.0
"""A process that stands still for longer is given up."""
_CHILDREN: dict[int, subprocess.Popen[bytes]] = {}
"""Those started by this process, so that they can be reaped."""


class ServingProcess:
    """Such a process (a relay, or *what* else), as the links it serves see it. Its files in *keep* are named after the first."""

    def __init__(
        self,
        process: tuple[int, int],
        links: Iterable[str],
        control: socket.socket | None,
        keep: Path | None,
        what: str,
    ) -> None:
        self.process, self._what = process, what
        self._first, *_ = names = list(links)
        self._links, self._control, self._keep = set(names), control, keep
        self._stopped = False
        self._owing = False
        self._watch = processes.Watch(process[0])

    @classmethod
    def start(
        cls,
        links: dict[str, dict[str, Any]],
        keep: Path | None,
        module: str,
        what: str = "relay",
        namespace: str | None = None,
    ) -> ServingProcess:
        """Starts *module*'s program for *links* in *namespace* (None: this one)."""
        first = next(iter(links))
        with contextlib.ExitStack() as closing:
            closing.enter_context(as_root())
            ours: socket.socket | None = None
            if keep is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                log = None
            else:
                theirs = _listener(keep, first)
                log = closing.enter_context(open(keep / f"{first}.log", "wb"))
            closing.enter_context(theirs)
            # In memory and not on its command line, which has a limit.
            orders = closing.enter_context(os.fdopen(os.memfd_create("orders"), "wb", buffering=0))
            description = {"control": theirs.fileno(), "listening": keep is not None, "links": links}
            orders.write(json.dumps(description).encode())
            orders.seek(0)
            files = (file for link in links.values() for file in link.get("files", ()))
            ports = (link[port] for link in links.values() for port in ("port_a", "port_b") if port in link)
            passed = (theirs.fileno(), orders.fileno(), *ports, *files)
            launch = partial(_launch, isolated(module, str(orders.fileno())), passed, log)
            process = launch() if namespace is None else call_inside(namespace, launch)
            _CHILDREN[process.pid] = process
            identity = (process.pid, processes.start_time(process.pid) or 0)
            if keep is not None:
                (keep / f"{first}.json").write_text(json.dumps({"process": identity, "links": list(links)}))
            return cls(identity, links, ours, keep, what)

    @classmethod
    def recorded(cls, link: str, keep: Path, what: str = "relay") -> ServingProcess:
        """The one that serves *link*, as its file in *keep* says. Raises NetworkError."""
        for record in [keep / f"{link}.json", *sorted(keep.glob("*.json"))]:
            try:
                noted = json.loads(record.read_text())
                pid, started = noted["process"]
                links = list(noted["links"])
            except (OSError, ValueError, LookupError, TypeError):
                continue
            if link not in links:
                continue
            if processes.start_time(pid) != started:
                raise NetworkError(f"link {link}: its {what} (process {pid}) is gone")
            return cls((pid, started), links, None, keep, what)
        raise NetworkError(f"link {link}: no {what} is recorded in {keep}")

    def fate(self) -> str | None:
        """What has become of a process that serves no longer, for a sentence; None: it serves."""
        pid, started = self.process
        child = _CHILDREN.get(pid)
        code = child.poll() if child is not None else None
        if code is not None:
            how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
            return f"its {self._what} (process {pid}) ended ({how})"
        if processes.start_time(pid) != started:
            return f"its {self._what} (process {pid}) ended"
        if (stopped_s := self._watch.stopped_s()) > _STOPPED_S:
            return f"its {self._what} (process {pid}) has been stopped for {stopped_s:.1f} s (SIGSTOP)"
        return None

    def ask(self, link: str, order: dict[str, Any], files: Sequence[int] = ()) -> dict[str, Any]:
        """The process's answer to an order for *link*, sent with open *files*. Raises NetworkError when there is none."""
        pid = self.process[0]
        if self._owing:  # it would be taken for the answer to this order
            raise NetworkError(
                f"link {link}: its {self._what} (process {pid}) owes an answer for {_ANSWER_S:g} s"
            )
        try:
            with self._connected() as connection:
                connection.settimeout(_ANSWER_S)
                message = [json.dumps(order | {"link": link}).encode()]
                if files:
                    socket.send_fds(connection, message, list(files))
                else:
                    connection.sendmsg(message)
                answer = connection.recv(LARGEST)
        except TimeoutError:
            self._owing = self._control is not None
            why = self.fate() or f"its {self._what} (process {pid}) does not answer within {_ANSWER_S:g} s"
            raise NetworkError(f"link {link}: {why}") from None
        except OSError as error:
            raise NetworkError(
                f"link {link}: its {self._what} (process {pid}) does not answer: {error}"
            ) from None
        if not answer:
            raise NetworkError(f"link {link}: {self.fate() or f'its {self._what} (process {pid}) has ended'}")
        return json.loads(answer)

    def release(self, link: str) -> None:
        """Ends the process's work for *link*, and the process when that was its last one."""
        if link not in self._links:
            return
        self._links.discard(link)
        if not self._links:
            self.end()
            return
        with contextlib.suppress(NetworkError):
            self.ask(link, {"do": "remove"})

    def stop(self) -> None:
        """Tells the process to end, whatever it still serves."""
        self._links.clear()
        if not self._stopped:
            self._stopped = True
            with contextlib.suppress(NetworkError):
                self.ask(self._first, {"do": "stop"})

    def end(self) -> None:
        """Ends the process, whatever it still serves."""
        self.stop()
        if self._control is not None:
            self._control.close()
        _await_end(self.process)
        if self._keep is not None:
            with as_root():
                for suffix in ("sock", "json", "log"):
                    (self._keep / f"{self._first}.{suffix}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        if self._control is not None:
            yield self._control
            return
        assert self._keep is not None
        with (
            as_root(),
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            _short(self._keep) as directory,
        ):
            connection.settimeout(_ANSWER_S)
            connection.connect(f"{directory}/{self._first}.sock")
            yield connection


def _launch(argv: Sequence[str], passed: Sequence[int], log: IO[bytes] | None) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        argv,
        pass_fds=passed,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=log,
        cwd="/",
        start_new_session=True,  # Ctrl-C is not for it: the link must live until its owner takes it down
    )


def _await_end(process: tuple[int, int]) -> None:
    """Waits a moment for a process that was told to stop, and kills it when it does not."""
    for attempt in range(220):
        child = _CHILDREN.get(process[0])
        if child is not None and child.poll() is not None:
            del _CHILDREN[process[0]]
        if processes.start_time(process[0]) != process[1]:
            return
        if attempt == 120:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process[0], signal.SIGKILL)
        time.sleep(0.001 if attempt < 20 else 0.01)


def _listener(keep: Path, link: str) -> socket.socket:
    keep.mkdir(parents=True, exist_ok=True)
    (keep / f"{link}.sock").unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with _short(keep) as directory:
        listener.bind(f"{directory}/{link}.sock")
    (keep / f"{link}.sock").chmod(0o600)
    listener.listen(8)
    return listener


@contextlib.contextmanager
def _short(directory: Path) -> Iterator[str]:
    """A short name for a directory: a Unix socket's path may have 107 bytes at most."""
    handle = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{handle}"
    finally:
        os.close(handle)
