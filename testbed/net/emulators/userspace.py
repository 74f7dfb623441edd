"""The userspace emulator: a relay process between two TAPs, for kernels without netem.

    l0a ──redirect──▶ l0ta ═ relay, up ═▶ l0tb ──redirect──▶ l0b        and the other way after *down*

The TAPs belong to the relay: they go when it does, however it ends. Without ``keep`` the relay ends with this process.
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
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import NetworkError, UsageError
from testbed.net.emulators import relay
from testbed.net.emulators.contract import Attachment, Counters
from testbed.net.emulators.namespace import inside, inside_scratch
from testbed.net.emulators.redirect import end_redirect, quieten, redirect
from testbed.net.emulators.refusal import refuse_unknown
from testbed.net.emulators.rtnetlink import Netlink

if TYPE_CHECKING:
    from testbed.net.profile import Profile

HONOURED: frozenset[str] = frozenset()
"""What of `Direction.beyond_the_basics` this emulator knows."""

_TUN = Path("/dev/net/tun")
_TUNSETIFF, _IFF_TAP, _IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
_ANSWER_S = 5.0
# The TAP's own queue in front of the relay must outlast the relay's not getting to run for a while: at 1 Gbit/s, 0.1 s.
_TAP_QUEUE_PACKETS = 10_000


def require_taps() -> None:
    """Raises UsageError when this machine cannot run the userspace emulator."""
    try:
        os.close(inside_scratch(lambda: _open_tap("probe")))
    except UsageError as error:
        raise UsageError(f"emulator userspace: {error}") from None


class Userspace:
    """The emulator called ``userspace``; see `testbed.net.emulators`."""

    name = "userspace"

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> Attachment:
        """See `Emulator.attach`. Raises UsageError without /dev/net/tun, NetworkError when the kernel refuses."""
        refuse_unknown(self.name, profile, HONOURED)
        quieten(wire)
        tap_a, tap_b = f"{link}ta", f"{link}tb"
        with contextlib.ExitStack() as undo, Netlink(wire) as netlink:
            mtu = netlink.interface(a).mtu
            taps = []
            for name in (tap_a, tap_b):
                taps.append(inside(wire, lambda name=name: _open_tap(name)))  # type: ignore[misc]
                undo.callback(os.close, taps[-1])
                netlink.set_up(netlink.interface(name).index, mtu=mtu, queue_packets=_TAP_QUEUE_PACKETS)
            orders = {
                "tap_a": taps[0],
                "tap_b": taps[1],
                "frame_bytes": mtu + 32,
                "seed": self._seed,
                "conditions": _conditions(profile),
            }
            process, control = _start(orders, link, keep)
            attachment = RelayAttachment(wire, link, a, b, process, control, keep)
            try:
                for source, target in ((a, tap_a), (tap_a, a), (b, tap_b), (tap_b, b)):
                    redirect(netlink, netlink.interface(source).index, netlink.interface(target).index)
                attachment.counters()  # it answers: it runs
            except BaseException:
                attachment.detach()
                raise
        return attachment

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> Attachment:
        """See `Emulator.reattach`."""
        record = keep / f"{link}.json"
        try:
            pid, started = json.loads(record.read_text())["process"]
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise NetworkError(f"link {link}: no relay is recorded in {record}: {error}") from None
        if start_time(pid) != started:
            raise NetworkError(f"link {link}: its relay (process {pid}) is gone")
        return RelayAttachment(wire, link, a, b, (pid, started), None, keep)


class RelayAttachment:
    """One link whose frames pass through a relay process."""

    def __init__(
        self,
        wire: str,
        link: str,
        a: str,
        b: str,
        process: tuple[int, int],
        control: socket.socket | None,
        keep: Path | None,
    ) -> None:
        self.process: tuple[int, int] | None = process
        self._wire, self._link, self._a, self._b = wire, link, a, b
        self._control, self._keep = control, keep

    def apply(self, profile: Profile) -> None:
        refuse_unknown(Userspace.name, profile, HONOURED)
        self._ask({"do": "apply", "conditions": _conditions(profile)})

    def counters(self) -> dict[str, Counters]:
        answer = self._ask({"do": "counters"})
        with Netlink(self._wire) as netlink:
            overruns = {
                "up": netlink.interface(f"{self._link}ta"),
                "down": netlink.interface(f"{self._link}tb"),
            }
        counters = {way: Counters(**answer[way]) for way in ("up", "down")}
        # What the TAP's own queue had no room for never reached the relay.
        return {w: replace(c, overrun=c.overrun + overruns[w].tx_dropped) for w, c in counters.items()}

    def detach(self) -> None:
        if self.process is None:
            return
        process, self.process = self.process, None
        with contextlib.suppress(NetworkError):
            self._ask({"do": "stop"}, process)
        if self._control is not None:
            self._control.close()
        _await_end(process)
        with contextlib.suppress(NetworkError), Netlink(self._wire) as netlink:
            for name in (self._a, self._b):
                end_redirect(netlink, netlink.interface(name).index)
        if self._keep is not None:
            for suffix in ("sock", "json", "log"):
                (self._keep / f"{self._link}.{suffix}").unlink(missing_ok=True)

    def _ask(self, order: dict[str, Any], process: tuple[int, int] | None = None) -> dict[str, Any]:
        pid = (process or self.process or (0, 0))[0]
        try:
            with self._connection() as connection:
                connection.settimeout(_ANSWER_S)
                connection.send(json.dumps(order).encode())
                answer = connection.recv(65536)
        except OSError as error:
            raise NetworkError(
                f"link {self._link}: its relay (process {pid}) does not answer: {error}"
            ) from None
        if not answer:
            raise NetworkError(f"link {self._link}: its relay (process {pid}) has ended")
        return json.loads(answer)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[socket.socket]:
        if self._control is not None:
            yield self._control
            return
        assert self._keep is not None
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            _short(self._keep) as directory,
        ):
            connection.settimeout(_ANSWER_S)
            connection.connect(f"{directory}/{self._link}.sock")
            yield connection


def start_time(pid: int) -> int:
    """When a process started, in clock ticks since boot: with its id, this names it for good. 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in "ZX" else int(fields[19])


def _start(
    orders: dict[str, Any], link: str, keep: Path | None
) -> tuple[tuple[int, int], socket.socket | None]:
    """Starts the relay; its identity, and this end of its control socket when it is ours alone."""
    with contextlib.ExitStack() as closing:
        ours: socket.socket | None = None
        if keep is None:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            log = None
        else:
            theirs = _listener(keep, link)
            log = closing.enter_context(open(keep / f"{link}.log", "wb"))
        closing.enter_context(theirs)
        orders = orders | {"control": theirs.fileno(), "listening": keep is not None}
        process = subprocess.Popen(
            # By its path, isolated and without site-packages: the standard library is all it needs.
            [sys.executable, "-I", "-S", relay.__file__, json.dumps(orders)],
            pass_fds=(orders["tap_a"], orders["tap_b"], orders["control"]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=log,
            cwd="/",
            start_new_session=True,  # Ctrl-C is not for the relay: the link must live until its owner takes it down
        )
        _CHILDREN[process.pid] = process
        identity = (process.pid, start_time(process.pid))
        if keep is not None:
            (keep / f"{link}.json").write_text(json.dumps({"process": identity}))
        return identity, ours


_CHILDREN: dict[
    int, subprocess.Popen[bytes]
] = {}  # those started by this process, so that they can be reaped


def _await_end(process: tuple[int, int]) -> None:
    """Waits a moment for a relay that was told to stop, and kills it when it does not."""
    for attempt in range(200):
        child = _CHILDREN.get(process[0])
        if child is not None and child.poll() is not None:
            del _CHILDREN[process[0]]
        if start_time(process[0]) != process[1]:
            return
        if attempt == 100:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process[0], signal.SIGKILL)
        time.sleep(0.01)


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


def _conditions(profile: Profile) -> dict[str, dict[str, Any]]:
    return {
        way: {
            "rate_bps": direction.rate_bps,
            "delay_s": direction.delay_s,
            "jitter_s": direction.jitter_s,
            "loss": direction.loss,
            "queue_bytes": direction.queue_bytes(profile.round_trip_s),
        }
        for way, direction in (("up", profile.up), ("down", profile.down))
    }
