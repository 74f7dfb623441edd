"""The userspace emulator: a relay process between two packet sockets, for kernels without netem.

    l0a ──▶ packet socket ═ relay, up ═▶ packet socket ──▶ l0b        and the other way after *down*

Without ``keep`` the relay ends with this process, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from msgspec import structs

from testbed.errors import NetworkError, UsageError
from testbed.net.emulators.contract import Attachment, Counters, Wanted
from testbed.net.emulators.namespace import inside, inside_scratch
from testbed.net.emulators.redirect import quieten
from testbed.net.emulators.refusal import refuse_unknown
from testbed.net.emulators.relaying.control import LARGEST
from testbed.net.emulators.relaying.jitter import pack
from testbed.net.emulators.relaying.port import open_port
from testbed.net.jitter import table
from testbed.net.losses import FourState, GilbertElliott

if TYPE_CHECKING:
    from testbed.net.profile import Direction, Profile

HONOURED = frozenset(
    {"jitter law", "jitter reorder", "loss model", "codel", "duplicate", "corrupt", "reorder", "ecn"}
    | {"overhead", "mtu", "seed", "trace"}
)
"""What of `Direction.beyond_the_basics` this emulator knows."""

WAYS: tuple[Literal["up", "down"], ...] = ("up", "down")
_ANSWER_S = 5.0
LINKS_A_RELAY = 256
"""Two descriptors each have to fit into what a process may have open by default, 1024, here and there."""
_SUPER_PACKET_S = 0.5e-3
_SUPER_PACKET_BYTES = 60_000
PACKAGE = Path(__file__).parents[3]
"""Where the relay finds this package."""
PROGRAM = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from testbed.net.emulators.relay import main; main()"
)


def require_packet_sockets() -> None:
    """Raises UsageError when this machine cannot run the userspace emulator."""
    try:
        inside_scratch(lambda: _open("lo")).close()
    except UsageError as error:
        raise UsageError(f"emulator userspace: {error}") from None


def super_packet_segments(direction: Direction) -> int:
    """How many TCP segments may cross as one packet without being told from so many: half a millisecond's worth.

    One where chance decides over each packet, and where there is no rate to say how long they take.
    """
    chance = (direction.loss, direction.duplicate, direction.corrupt, direction.reorder, direction.jitter_s)
    if any(chance) or direction.queue.codel is not None or direction.rate_bps is None or _changes(direction):
        return 1
    at_once = min(direction.rate_bps / 8 * _SUPER_PACKET_S, _SUPER_PACKET_BYTES)
    return max(1, int(at_once / direction.mtu))


def _changes(direction: Direction) -> bool:
    return direction.trace is not None


class Userspace:
    """The emulator called ``userspace``; see `testbed.net.emulators`."""

    name = "userspace"

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """See `Emulator.attach`. Raises UsageError without the right to, NetworkError when the kernel refuses."""
        return self.attach_all(wire, [Wanted(link, a, b, profile)], keep=keep)[0]

    def attach_all(
        self, wire: str, wanted: Sequence[Wanted], *, keep: Path | None = None
    ) -> list[Attachment]:
        """The same for many links, up to `LINKS_A_RELAY` of which share a relay process."""
        for one in wanted:
            refuse_unknown(self.name, one.profile, HONOURED)
        quieten(wire)
        made: list[Attachment] = []
        try:
            for start in range(0, len(wanted), LINKS_A_RELAY):
                made += self._attach(wire, wanted[start : start + LINKS_A_RELAY], keep)
        except BaseException:
            for attachment in made:
                attachment.detach()
            raise
        return made

    def _attach(self, wire: str, wanted: Sequence[Wanted], keep: Path | None) -> list[RelayAttachment]:
        with contextlib.ExitStack() as undo:
            ports = inside(wire, lambda: _open_ports([name for one in wanted for name in (one.a, one.b)]))
            for port in ports.values():
                undo.callback(port.close)
            links: dict[str, dict[str, Any]] = {}
            now = time.monotonic()
            for one in wanted:
                conditions, files = undo.enter_context(_conditions(one.profile, now))
                links[one.link] = {
                    "port_a": ports[one.a].fileno(),
                    "port_b": ports[one.b].fileno(),
                    "seed": self._seed,
                    "conditions": conditions,
                    "files": files,
                }
            first = wanted[0].link
            process, control = start(links, first, keep)
            # The links of one relay share the connection to it, which ends the relay when the last of them is detached.
            shared = Connection(first, process, control, keep, {one.link for one in wanted})
            attachments = [RelayAttachment(one.link, shared) for one in wanted]
            try:
                attachments[-1].counters()  # it answers: it runs
            except BaseException:
                for attachment in attachments:
                    attachment.detach()
                raise
        return attachments

    def super_packets(self, profile: Profile) -> dict[str, int]:
        """See `Attachment.super_packets`."""
        return {"up": super_packet_segments(profile.up), "down": super_packet_segments(profile.down)}

    def release_all(self, attachments: Sequence[Attachment]) -> None:
        """Ends the relays behind *attachments*, whose wire is about to be removed."""
        relays = {id(a.relay): a.relay for a in attachments if isinstance(a, RelayAttachment)}.values()
        for relay in relays:  # all are told before the first is waited for
            relay.stop()
        for relay in relays:
            relay.end()

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        """See `Emulator.reattach`."""
        first, process, links = recorded(link, keep)
        return RelayAttachment(link, Connection(first, process, None, keep, set(links)))


def recorded(link: str, keep: Path) -> tuple[str, tuple[int, int], list[str]]:
    """The relay that serves *link*: the name it goes by, its process, and its links. Raises NetworkError."""
    for record in [keep / f"{link}.json", *sorted(keep.glob("*.json"))]:
        try:
            found = json.loads(record.read_text())
            pid, started = found["process"]
            links = list(found["links"])
        except (OSError, ValueError, LookupError, TypeError):
            continue
        if link not in links:
            continue
        if start_time(pid) != started:
            raise NetworkError(f"link {link}: its relay (process {pid}) is gone")
        return record.stem, (pid, started), links
    raise NetworkError(f"link {link}: no relay is recorded in {keep}")


class Connection:
    """A relay process (or another, *what*), as the links that it serves see it. Its files in *keep* are named after the first."""

    def __init__(
        self,
        first: str,
        process: tuple[int, int],
        control: socket.socket | None,
        keep: Path | None,
        links: set[str],
        what: str = "relay",
    ) -> None:
        self.process, self._what = process, what
        self._first, self._control, self._keep, self._links = first, control, keep, links
        self._stopped = False

    def ask(self, link: str, order: dict[str, Any], files: Sequence[int] = ()) -> dict[str, Any]:
        """The relay's answer to an order for *link*, sent with open *files*. Raises NetworkError when there is none."""
        pid = self.process[0]
        try:
            with self._connected() as connection:
                connection.settimeout(_ANSWER_S)
                message = [json.dumps(order | {"link": link}).encode()]
                if files:
                    socket.send_fds(connection, message, list(files))
                else:
                    connection.sendmsg(message)
                answer = connection.recv(LARGEST)
        except OSError as error:
            raise NetworkError(
                f"link {link}: its {self._what} (process {pid}) does not answer: {error}"
            ) from None
        if not answer:
            raise NetworkError(f"link {link}: its {self._what} (process {pid}) has ended")
        return json.loads(answer)

    def release(self, link: str) -> None:
        """Ends the relay's work for *link*, and the relay when that was its last one."""
        if link not in self._links:
            return
        self._links.discard(link)
        if not self._links:
            self.end()
            return
        with contextlib.suppress(NetworkError):
            self.ask(link, {"do": "remove"})

    def stop(self) -> None:
        """Tells the relay to end, whatever it still serves."""
        self._links.clear()
        if not self._stopped:
            self._stopped = True
            with contextlib.suppress(NetworkError):
                self.ask(self._first, {"do": "stop"})

    def end(self) -> None:
        """Ends the relay, whatever it still serves."""
        self.stop()
        if self._control is not None:
            self._control.close()
        _await_end(self.process)
        if self._keep is not None:
            for suffix in ("sock", "json", "log"):
                (self._keep / f"{self._first}.{suffix}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[socket.socket]:
        if self._control is not None:
            yield self._control
            return
        assert self._keep is not None
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            _short(self._keep) as directory,
        ):
            connection.settimeout(_ANSWER_S)
            connection.connect(f"{directory}/{self._first}.sock")
            yield connection


class RelayAttachment:
    """One link whose frames pass through a relay process."""

    def __init__(self, link: str, relay: Connection) -> None:
        self.process: tuple[int, int] | None = relay.process
        self._link, self.relay = link, relay

    def apply(self, profile: Profile, origin_s: float | None = None) -> None:
        refuse_unknown(Userspace.name, profile, HONOURED)
        origin_s = time.monotonic() if origin_s is None else origin_s
        with _conditions(profile, origin_s) as (conditions, files):
            self.relay.ask(self._link, {"do": "apply", "conditions": conditions}, files)

    def counters(self) -> dict[str, Counters]:
        answer = self.relay.ask(self._link, {"do": "counters"})
        return {way: Counters(**answer[way]) for way in ("up", "down")}

    def super_packets(self, profile: Profile) -> dict[str, int]:
        """See `Attachment.super_packets`."""
        return Userspace().super_packets(profile)

    def detach(self) -> None:
        if self.process is None:
            return
        self.process = None
        self.relay.release(self._link)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its id, this names it for good. 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def start(
    links: dict[str, dict[str, Any]],
    first: str,
    keep: Path | None,
    program: str = PROGRAM,
    namespace: str | None = None,
) -> tuple[tuple[int, int], socket.socket | None]:
    """Starts a relay for *links*, or another *program* that takes its orders the same way, in *namespace*; its identity, and this
    end of its control socket when it is ours alone."""
    with contextlib.ExitStack() as closing:
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
        told = {"control": theirs.fileno(), "listening": keep is not None, "links": links}
        orders.write(json.dumps(told).encode())
        orders.seek(0)
        files = (file for link in links.values() for file in link.get("files", ()))
        ports = (link[port] for link in links.values() for port in ("port_a", "port_b") if port in link)
        passed = (theirs.fileno(), orders.fileno(), *ports, *files)

        def popen() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                # Isolated and without site-packages: the standard library and its own parts are all it needs.
                [sys.executable, "-I", "-S", "-c", program, str(PACKAGE), str(orders.fileno())],
                pass_fds=passed,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                cwd="/",
                start_new_session=True,  # Ctrl-C is not for the relay: the link must live until its owner takes it down
            )

        process = popen() if namespace is None else inside(namespace, popen)
        _CHILDREN[process.pid] = process
        identity = (process.pid, start_time(process.pid))
        if keep is not None:
            (keep / f"{first}.json").write_text(json.dumps({"process": identity, "links": list(links)}))
        return identity, ours


_CHILDREN: dict[
    int, subprocess.Popen[bytes]
] = {}  # those started by this process, so that they can be reaped


def _await_end(process: tuple[int, int]) -> None:
    """Waits a moment for a relay that was told to stop, and kills it when it does not."""
    for attempt in range(220):
        child = _CHILDREN.get(process[0])
        if child is not None and child.poll() is not None:
            del _CHILDREN[process[0]]
        if start_time(process[0]) != process[1]:
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


def _open_ports(interfaces: list[str]) -> dict[str, socket.socket]:
    """Packet sockets on interfaces of the calling thread's namespace."""
    with contextlib.ExitStack() as undo:
        ports = {name: undo.enter_context(_open(name)) for name in interfaces}
        undo.pop_all()
        return ports


def _open(interface: str) -> socket.socket:
    """A packet socket on an interface of the calling thread's namespace."""
    try:
        return open_port(interface)
    except PermissionError:
        raise UsageError("no permission to open a packet socket; run it with sudo") from None
    except OSError as error:
        raise NetworkError(f"cannot open a packet socket on {interface}: {error.strerror}") from None


@contextlib.contextmanager
def _conditions(profile: Profile, origin_s: float) -> Iterator[tuple[dict[str, dict[str, Any]], list[int]]]:
    """What the relay is told (see `Line.apply`), and the open files that hold what changes over time, which may be long."""
    conditions: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as closing:
        files: list[int] = []
        for way in WAYS:
            conditions[way] = plain_conditions(profile, way)
            direction = profile.up if way == "up" else profile.down
            if (schedule := direction.schedule(way, origin_s)) is not None:
                file = closing.enter_context(open(os.memfd_create("schedule"), "wb"))
                conditions[way]["schedule"] = schedule.pack(file) | {"file": len(files)}
                file.flush()
                files.append(file.fileno())
        yield conditions, files


def plain_conditions(profile: Profile, way: Literal["up", "down"]) -> dict[str, Any]:
    """What does not change over time, in plain values."""
    direction = profile.up if way == "up" else profile.down
    model, codel = direction.loss_model, direction.queue.codel
    kind = {GilbertElliott: "gilbert", FourState: "states"}
    return {
        "rate_bps": direction.rate_bps,
        "delay_s": direction.delay_s,
        "jitter_s": direction.jitter_s,
        "jitter_table": pack(table(direction.jitter_law)) if direction.jitter_s else None,
        "jitter_reorders": direction.jitter_reorders,
        "loss": direction.loss,
        "loss_model": model and {"kind": kind[type(model)]} | structs.asdict(model),
        "duplicate": direction.duplicate,
        "corrupt": direction.corrupt,
        "reorder": direction.reorder,
        "ecn": direction.ecn,
        "queue_bytes": profile.queue_bytes(way),
        "codel": codel and asdict(codel),
        "overhead_bytes": direction.overhead_bytes,
        "mtu": direction.mtu,
        "seed": direction.seed,
    }
