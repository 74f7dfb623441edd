"""The userspace emulator: a relay process between two TAPs, for kernels without netem.

    l0a ──redirect──▶ l0ta ═ relay, up ═▶ l0tb ──redirect──▶ l0b        and the other way after *down*

The TAPs are persistent, so that they go with the wire's namespace, all at once: taking one off a kernel by closing it lasts some
twenty milliseconds. Without ``keep`` the relay ends with this process.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from testbed.errors import NetworkError, UsageError
from testbed.net import rootless
from testbed.net.emulators import relay
from testbed.net.emulators.contract import Attachment, Counters, Wanted
from testbed.net.emulators.namespace import inside, inside_scratch
from testbed.net.emulators.redirect import end_redirect, quieten, redirect
from testbed.net.emulators.refusal import refuse_unknown
from testbed.net.emulators.rtnetlink import Netlink, RefusedError

if TYPE_CHECKING:
    from testbed.net.profile import Profile

HONOURED: frozenset[str] = frozenset({"trace"})
"""What of `Direction.beyond_the_basics` this emulator knows."""

WAYS: tuple[Literal["up", "down"], ...] = ("up", "down")
_TUN = Path("/dev/net/tun")
_TUNSETIFF, _TUNSETPERSIST, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x400454CB, 0x0002, 0x1000
_SOL_PACKET, _PACKET_IGNORE_OUTGOING, _EVERY_PROTOCOL = 263, 23, 3
_PACKET_BUFFER_BYTES = 16 << 20
_ANSWER_S = 5.0
LINKS_A_RELAY = 256
"""Two descriptors each have to fit into what a process may have open by default, 1024, here and there."""
# The TAP's own queue in front of the relay must outlast the relay's not getting to run for a while: at 1 Gbit/s, 0.1 s.
_TAP_QUEUE_PACKETS = 10_000


def opens_taps() -> bool:
    """Whether this process may open TAPs. Where not (without root, on machines that keep /dev/net/tun for root), the relay reads
    and writes the wire's interfaces themselves by packet(7) sockets."""
    return os.access(_TUN, os.R_OK | os.W_OK)


def require_taps() -> None:
    """Raises UsageError when this machine cannot run the userspace emulator."""
    if rootless.inside() and not opens_taps():
        return
    try:
        os.close(inside_scratch(lambda: _open_tap("probe")))
    except UsageError as error:
        raise UsageError(f"emulator userspace: {error}") from None


class Userspace:
    """The emulator called ``userspace``; see `testbed.net.emulators`."""

    name = "userspace"

    @property
    def reads_packets(self) -> bool:
        """Whether it does without TAPs. Then the nodes have to fill in checksums, which a TAP would."""
        return rootless.inside() and not opens_taps()

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """See `Emulator.attach`. Raises UsageError without /dev/net/tun, NetworkError when the kernel refuses."""
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
        with contextlib.ExitStack() as undo, Netlink(wire) as netlink:
            names = [(f"{one.link}ta", f"{one.link}tb") for one in wanted]
            if self.reads_packets:
                names = [(one.a, one.b) for one in wanted]
                taps = inside(wire, lambda: _open_packets([name for pair in names for name in pair]))
            else:
                taps = inside(wire, lambda: _open_taps([name for pair in names for name in pair]))
            for tap in taps.values():
                undo.callback(os.close, tap)
            links: dict[str, dict[str, Any]] = {}
            now = time.monotonic()
            unserved = undo.enter_context(contextlib.ExitStack())
            for tap in () if self.reads_packets else taps.values():
                unserved.callback(fcntl.ioctl, tap, _TUNSETPERSIST, 0)
            index: dict[str, int] = {}  # asked for once each: a thousand links have four thousand interfaces
            for one, pair in zip(wanted, names, strict=True):
                ends = {name: netlink.interface(name) for name in dict.fromkeys((one.a, one.b, *pair))}
                index.update({name: end.index for name, end in ends.items()})
                mtu = ends[one.a].mtu
                for name in () if self.reads_packets else pair:
                    netlink.set_up(index[name], mtu=mtu, queue_packets=_TAP_QUEUE_PACKETS)
                conditions, files = undo.enter_context(_conditions(one.profile, now))
                links[one.link] = {
                    "tap_a": taps[pair[0]],
                    "tap_b": taps[pair[1]],
                    "frame_bytes": mtu + 32,
                    "seed": self._seed,
                    "conditions": conditions,
                    "files": files,
                }
            first = wanted[0].link
            process, control = _start(links, first, keep)
            unserved.pop_all()
            # The links of one relay share the connection to it, which ends the relay when the last of them is detached.
            shared = Connection(first, process, control, keep, {one.link for one in wanted})
            attachments = [RelayAttachment(wire, one.link, one.a, one.b, shared) for one in wanted]
            try:
                for one, pair in () if self.reads_packets else zip(wanted, names, strict=True):
                    for source, target in (
                        (one.a, pair[0]),
                        (pair[0], one.a),
                        (one.b, pair[1]),
                        (pair[1], one.b),
                    ):
                        redirect(netlink, index[source], index[target])
                attachments[-1].counters()  # it answers: it runs
            except BaseException:
                for attachment in attachments:
                    attachment.detach()
                raise
        return attachments

    def release_all(self, attachments: Sequence[Attachment]) -> None:
        """Ends the relays behind *attachments*, whose wire is about to be removed."""
        for served in {id(a.relay): a.relay for a in attachments if isinstance(a, RelayAttachment)}.values():
            served.end()

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        """See `Emulator.reattach`."""
        first, process, links = _recorded(link, keep)
        return RelayAttachment(wire, link, a, b, Connection(first, process, None, keep, set(links)))


def _recorded(link: str, keep: Path) -> tuple[str, tuple[int, int], list[str]]:
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
    """A relay process, as the links that it serves see it. Its files in *keep* are named after its first link."""

    def __init__(
        self,
        first: str,
        process: tuple[int, int],
        control: socket.socket | None,
        keep: Path | None,
        links: set[str],
    ) -> None:
        self.process = process
        self._first, self._control, self._keep, self._links = first, control, keep, links

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
                answer = connection.recv(65536)
        except OSError as error:
            raise NetworkError(f"link {link}: its relay (process {pid}) does not answer: {error}") from None
        if not answer:
            raise NetworkError(f"link {link}: its relay (process {pid}) has ended")
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

    def end(self) -> None:
        """Ends the relay, whatever it still serves."""
        self._links.clear()
        with contextlib.suppress(NetworkError):
            self.ask(self._first, {"do": "stop"})
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

    def __init__(self, wire: str, link: str, a: str, b: str, relay: Connection) -> None:
        self.process: tuple[int, int] | None = relay.process
        self._wire, self._link, self._a, self._b, self.relay = wire, link, a, b, relay

    def apply(self, profile: Profile, origin_s: float | None = None) -> None:
        refuse_unknown(Userspace.name, profile, HONOURED)
        origin_s = time.monotonic() if origin_s is None else origin_s
        with _conditions(profile, origin_s) as (conditions, files):
            self.relay.ask(self._link, {"do": "apply", "conditions": conditions}, files)

    def counters(self) -> dict[str, Counters]:
        answer = self.relay.ask(self._link, {"do": "counters"})
        counters = {way: Counters(**answer[way]) for way in ("up", "down")}
        with Netlink(self._wire) as netlink:
            try:
                overruns = {
                    "up": netlink.interface(f"{self._link}ta"),
                    "down": netlink.interface(f"{self._link}tb"),
                }
            except RefusedError:  # it does without TAPs
                return counters
        # What the TAP's own queue had no room for never reached the relay.
        return {w: replace(c, overrun=c.overrun + overruns[w].tx_dropped) for w, c in counters.items()}

    def detach(self) -> None:
        if self.process is None:
            return
        self.process = None
        self.relay.release(self._link)
        with contextlib.suppress(NetworkError), Netlink(self._wire) as netlink:
            for name in (f"{self._link}ta", f"{self._link}tb"):
                netlink.delete(netlink.interface(name).index)
            for name in (self._a, self._b):
                end_redirect(netlink, netlink.interface(name).index)


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its id, this names it for good. 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _start(
    links: dict[str, dict[str, Any]], first: str, keep: Path | None
) -> tuple[tuple[int, int], socket.socket | None]:
    """Starts a relay for *links*; its identity, and this end of its control socket when it is ours alone."""
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
        process = subprocess.Popen(
            # By its path, isolated and without site-packages: the standard library is all it needs.
            [sys.executable, "-I", "-S", relay.__file__, str(orders.fileno())],
            pass_fds=(
                theirs.fileno(),
                orders.fileno(),
                *(link[tap] for link in links.values() for tap in ("tap_a", "tap_b")),
                *(file for link in links.values() for file in link["files"]),
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd="/",
            start_new_session=True,  # Ctrl-C is not for the relay: the link must live until its owner takes it down
        )
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


def _open_taps(names: list[str]) -> dict[str, int]:
    """New TAPs in the calling thread's namespace, by name."""
    taps: dict[str, int] = {}
    try:
        for name in names:
            taps[name] = _open_tap(name)
            fcntl.ioctl(taps[name], _TUNSETPERSIST, 1)
    except BaseException:
        for tap in taps.values():
            os.close(tap)
        raise
    return taps


def _open_packets(interfaces: list[str]) -> dict[str, int]:
    """Packet sockets on interfaces of the calling thread's namespace, by name: what arrives there is read from them, what is
    written to them leaves there."""
    sockets: dict[str, int] = {}
    try:
        for name in interfaces:
            opened = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            sockets[name] = opened.detach()
            with socket.socket(fileno=os.dup(sockets[name])) as same:
                same.setsockopt(_SOL_PACKET, _PACKET_IGNORE_OUTGOING, 1)
                same.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVBUF, _PACKET_BUFFER_BYTES
                )  # up to net.core.rmem_max
                same.bind((name, _EVERY_PROTOCOL))  # ETH_P_ALL; bind converts to network order
    except OSError as error:
        for number in sockets.values():
            os.close(number)
        raise NetworkError(f"cannot open a packet socket: {error.strerror}") from None
    return sockets


def _open_tap(name: str) -> int:
    """A new TAP in the calling thread's namespace, non-blocking; it exists for as long as it is open."""
    try:
        tap = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        remedy = "modprobe tun, or give the container --device /dev/net/tun"
        if error.errno in (errno.EACCES, errno.EPERM):
            remedy = "run it with sudo"
        raise UsageError(f"cannot open {_TUN} ({error.strerror}); {remedy}") from None
    try:
        fcntl.ioctl(tap, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI))
    except OSError as error:
        os.close(tap)
        if error.errno == errno.EPERM:
            raise UsageError(f"no permission to create TAP {name}; run it with sudo") from None
        raise NetworkError(f"cannot create TAP {name}: {error.strerror}") from None
    return tap


@contextlib.contextmanager
def _conditions(profile: Profile, origin_s: float) -> Iterator[tuple[dict[str, dict[str, Any]], list[int]]]:
    """What the relay is told, and the open files that hold what changes over time, which may be long."""
    conditions: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as closing:
        files: list[int] = []
        for way in WAYS:
            direction = getattr(profile, way)
            conditions[way] = {
                "rate_bps": direction.rate_bps,
                "delay_s": direction.delay_s,
                "jitter_s": direction.jitter_s,
                "loss": direction.loss,
                "queue_bytes": profile.queue_bytes(way),
            }
            if (schedule := direction.schedule(way, origin_s)) is not None:
                file = closing.enter_context(open(os.memfd_create("schedule"), "wb"))
                conditions[way]["schedule"] = schedule.pack(file) | {"file": len(files)}
                file.flush()
                files.append(file.fileno())
        yield conditions, files
