"""Root's part of shaping a link between hosts, sent to one of them as text: standard library alone, any Python from 3.8 on.

It knows no profile. It is told by lines of JSON on standard input, and answers by such lines:

    {"interface": …, "peer": …, "force": …, "ssh": [addresses], "spare": [ports]}    what its first line says; or {"clean": true}
    {"do": "put", "way": "egress"|"ingress", "qdiscs": [[handle, parent, kind, options and more, in hexadecimal], …]}
    {"do": "read"}                                                        the kernel's own words for qdiscs and filters

What passes between the interface and the peer goes through an ``ifb`` each way, and no other packet does: the interface's own
queueing disciplines stay as they are. Its segmentation offloads are off meanwhile, since a packet is to be one.

When standard input ends, or a signal ends it, all is undone; a second process does where this one is killed; where both are, a
record below /run says what is left, for the next one that comes, or for ``clean``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path
from typing import Any

RECORDS = Path("/run/testbed-shaping")
_NEWLINK, _DELLINK, _GETLINK, _GETROUTE, _NEWQDISC, _DELQDISC, _GETQDISC = 16, 17, 18, 26, 36, 37, 38
_NEWFILTER, _GETFILTER = 44, 46
_REQUEST, _ACK, _ECHO, _DUMP, _NEW = 1, 4, 8, 0x300, 0x600
_HEADER, _LINK, _TC = struct.Struct("=IHHII"), struct.Struct("=BxHiII"), struct.Struct("=BxxxiIII")
_CLSACT, _ROOT = 0xFFFF0000, 0xFFFFFFFF
_HOOKS = {"egress": 0xFFFFFFF3, "ingress": 0xFFFFFFF2}
_OFFLOADS = {"tso": (0x1E, 0x1F), "gso": (0x23, 0x24), "gro": (0x2B, 0x2C)}  # ETHTOOL_G…, ETHTOOL_S…
_SIOCETHTOOL = 0x8946


class Refusal(Exception):
    """Why not, in a line."""


class Kernel:
    """A connection to the kernel's routing part."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._socket.settimeout(30)
        self._socket.bind((0, 0))
        self._number = 0

    def ask(self, message: int, flags: int, body: bytes) -> list[bytes]:
        """The bodies of what it answers. Raises OSError where it refuses."""
        self._number += 1
        header = _HEADER.pack(_HEADER.size + len(body), message, flags | _REQUEST, self._number, 0)
        self._socket.send(header + body)
        found: list[bytes] = []
        while True:
            data, at = self._socket.recv(1 << 18), 0
            while at + _HEADER.size <= len(data):
                length, kind, _, number, _ = _HEADER.unpack_from(data, at)
                payload, at = data[at + _HEADER.size : at + length], at + ((length + 3) & ~3)
                if number != self._number:
                    continue
                if kind == 2:  # NLMSG_ERROR
                    wrong = -struct.unpack_from("=i", payload)[0]
                    if wrong:
                        raise OSError(wrong, os.strerror(wrong))
                    return found
                if kind == 3:  # NLMSG_DONE
                    return found
                found.append(payload)
                if not flags & (_ACK | _DUMP):
                    return found

    def link(self, name: str) -> tuple[int, int]:
        """Index and MTU."""
        body = _LINK.pack(0, 0, 0, 0, 0) + _text(3, name)
        (reply,) = self.ask(_GETLINK, 0, body)
        return _LINK.unpack_from(reply)[2], struct.unpack("=I", _attributes(reply[_LINK.size :])[4])[0]

    def way_to(self, address: str) -> int:
        """The index of the interface by which packets leave for an address; 0: by none."""
        number, _, zone = address.partition("%")
        family, bits = (socket.AF_INET6, 128) if ":" in number else (socket.AF_INET, 32)
        try:
            if zone:  # of a link, which names its interface
                return socket.if_nametoindex(zone)
            body = struct.pack("=BBBBBBBBI", family, bits, 0, 0, 0, 0, 0, 0, 0)
            (reply,) = self.ask(_GETROUTE, 0, body + _attribute(1, socket.inet_pton(family, number)))
        except OSError:
            return 0
        return int(struct.unpack("=I", _attributes(reply[12:]).get(4, bytes(4)))[0])


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", len(value) + 4, kind) + value + bytes(-len(value) % 4)


def _text(kind: int, value: str) -> bytes:
    return _attribute(kind, value.encode() + b"\0")


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


# --- what there is, and what is put there ---


def _offload(interface: str, command: int, value: int = 0) -> int:
    about = ctypes.create_string_buffer(struct.pack("=II", command, value))
    request = struct.pack("16sP", interface.encode(), ctypes.addressof(about))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCETHTOOL, request + bytes(16))
    return int(struct.unpack("=II", about.raw[:8])[1])


def _offloads(interface: str) -> dict[str, int]:
    found = {}
    for name, (get, _) in _OFFLOADS.items():
        with contextlib.suppress(OSError):
            found[name] = _offload(interface, get)
    return found


def _names(index: int) -> dict[str, str]:
    return {"egress": f"tbs{index}e", "ingress": f"tbs{index}i"}


def _add_ifb(kernel: Kernel, name: str, mtu: int) -> int:
    kind = _attribute(18, _text(1, "ifb"))
    size = _attribute(4, struct.pack("=I", mtu)) + _attribute(13, struct.pack("=I", 1000))
    try:
        kernel.ask(_NEWLINK, _ACK | _NEW, _LINK.pack(0, 0, 0, 0, 0) + _text(3, name) + size + kind)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            raise Refusal(
                "this kernel has no ifb, through which a link is shaped (try modprobe ifb)"
            ) from None
        raise
    with contextlib.suppress(OSError):  # nothing of its own is to be sent there
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    kernel.ask(_NEWLINK, _ACK, _LINK.pack(0, 0, 0, 1, 1) + _text(3, name))
    return kernel.link(name)[0]


def _filter(
    kernel: Kernel, index: int, way: str, first: int, keys: list[tuple[int, int, int]], to: int
) -> None:
    # u32: all keys (mask, value, offset in the IP header) have to match; what does passes to the interface `to`, or (0) as it was
    selector = struct.pack("=BBBxHHhhI", 1, 0, len(keys), 0, 0, 0, 0, 0)
    for mask, value, offset in keys:
        selector += struct.pack("!II", mask, value) + struct.pack("=ii", offset, 0)
    options = _attribute(1, struct.pack("=I", 0x10001)) + _attribute(5, selector)
    if to:  # mirred: stolen (4), to leave (1)
        mirred = _attribute(2, struct.pack("=IIiiiiI", 0, 0, 4, 0, 0, 1, to))
        options += _attribute(7, _attribute(1, _text(1, "mirred") + _attribute(2, mirred)))
    body = _TC.pack(0, index, 0, _HOOKS[way], first << 16 | socket.htons(0x0800))
    kernel.ask(_NEWFILTER, _ACK | _NEW, body + _text(1, "u32") + _attribute(2, options))


class Shaped:
    """The interface, the peer, and the two ifbs between them."""

    def __init__(self, kernel: Kernel, asked: dict[str, Any], record: Record) -> None:
        self._kernel, self._record = kernel, record
        self._index, self.mtu = kernel.link(asked["interface"])
        names = _names(self._index)
        there = kernel.ask(_GETQDISC, _DUMP, _TC.pack(0, self._index, 0, 0, 0))
        if any(_TC.unpack_from(each)[1:3] == (self._index, _CLSACT) for each in there):
            raise Refusal(
                f"{asked['interface']} has filters of somebody else's (tc qdisc show dev {asked['interface']})"
            )
        record.write(asked["interface"], self._index, _offloads(asked["interface"]))
        clsact = _TC.pack(0, self._index, _CLSACT, 0xFFFFFFF1, 0) + _text(1, "clsact")
        kernel.ask(_NEWQDISC, _ACK | _NEW, clsact)
        for _, put in _OFFLOADS.values():
            with contextlib.suppress(OSError):
                _offload(asked["interface"], put, 0)
        self._ifbs = {way: _add_ifb(kernel, name, self.mtu) for way, name in names.items()}
        (peer,) = struct.unpack("!I", socket.inet_aton(asked["peer"]))
        for way, at in (("egress", 16), ("ingress", 12)):
            here = [(0xFFFFFFFF, peer, at)]
            for number, port in enumerate(asked["spare"]):
                tcp = [*here, (0x00FF0000, 0x00060000, 8)]
                for beside, (mask, value) in enumerate(((0xFFFF0000, port << 16), (0xFFFF, port))):
                    _filter(kernel, self._index, way, 1 + 2 * number + beside, [*tcp, (mask, value, 20)], 0)
            _filter(kernel, self._index, way, 100, here, self._ifbs[way])

    def put(self, asked: dict[str, Any]) -> dict[str, Any]:
        ifb = self._ifbs[asked["way"]]
        with contextlib.suppress(OSError):  # there is none yet
            self._kernel.ask(_DELQDISC, _ACK, _TC.pack(0, ifb, 0, _ROOT, 0))
        for handle, parent, kind, rest in asked["qdiscs"]:
            body = _TC.pack(0, ifb, handle, parent, 0) + _text(1, kind) + bytes.fromhex(rest)
            try:
                self._kernel.ask(_NEWQDISC, _ACK | _NEW, body)
            except OSError as error:
                if error.errno == errno.ENOENT:
                    raise Refusal(f"this kernel has no sch_{kind} (try modprobe sch_{kind})") from None
                raise OSError(error.errno, f"tc {kind}: {error.strerror}") from None
        return {}

    def read(self, asked: dict[str, Any]) -> dict[str, Any]:
        """By way: qdiscs by handle, and filters, as the kernel's messages in hexadecimal."""
        answer = {}
        for way, ifb in self._ifbs.items():
            dumped = self._kernel.ask(_GETQDISC, _DUMP, _TC.pack(0, ifb, 0, 0, 0))
            qdiscs = [found.hex() for found in dumped if _TC.unpack_from(found)[1] == ifb]
            body = _TC.pack(0, self._index, 0, _HOOKS[way], 0)
            filters = [found.hex() for found in self._kernel.ask(_GETFILTER, _DUMP, body)]
            answer[way] = {"qdiscs": qdiscs, "filters": filters}
        return answer


# --- what is undone ---


class Record:
    """What of an interface is to be undone, and, by its lock, whether somebody still does that. Raises Refusal then."""

    def __init__(self, path: Path) -> None:
        self._path = path
        RECORDS.mkdir(mode=0o755, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Refusal(f"{path.name.partition('-')[2]} is shaped by another run") from None

    @classmethod
    def of(cls, interface: str) -> Record:
        return cls(RECORDS / f"{_namespace()}-{interface}")

    def write(self, interface: str, index: int, offloads: dict[str, int]) -> None:
        data = json.dumps({"interface": interface, "index": index, "offloads": offloads}).encode()
        os.pwrite(self._file, data, 0)
        os.fsync(self._file)

    def undo(self, kernel: Kernel) -> str:
        """The interface on which something was undone; empty: nothing was on record."""
        data = os.pread(self._file, 1 << 16, 0)
        about: dict[str, Any] = json.loads(data) if data else {}
        if about:
            interface, index = about["interface"], about["index"]
            for name in _names(index).values():
                with contextlib.suppress(OSError):
                    kernel.ask(_DELLINK, _ACK, _LINK.pack(0, 0, 0, 0, 0) + _text(3, name))
            with contextlib.suppress(OSError):  # it is another one, or gone
                if kernel.link(interface)[0] == index:
                    kernel.ask(_DELQDISC, _ACK, _TC.pack(0, index, _CLSACT, 0xFFFFFFF1, 0))
                    for name, value in about["offloads"].items():
                        with contextlib.suppress(OSError):
                            _offload(interface, _OFFLOADS[name][1], value)
        with contextlib.suppress(OSError):
            self._path.unlink()
            RECORDS.rmdir()
        os.ftruncate(self._file, 0)
        return str(about.get("interface", ""))


def _namespace() -> int:
    return Path("/proc/self/ns/net").stat().st_ino


def _clean(kernel: Kernel) -> list[str]:
    undone = []
    for path in sorted(RECORDS.glob(f"{_namespace()}-*")):
        with contextlib.suppress(Refusal):
            undone.append(Record(path).undo(kernel))
    return [name for name in undone if name]


# --- what is asked ---


def _say(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _refuse(kernel: Kernel, asked: dict[str, Any]) -> None:
    interface = asked["interface"]
    try:
        index, _ = kernel.link(interface)
    except OSError:
        raise Refusal(f"no interface {interface} there") from None
    if kernel.way_to(asked["peer"]) != index:
        raise Refusal(f"{asked['peer']} is not reached by {interface}")
    for address in asked["ssh"]:
        if kernel.way_to(address) == index and not asked["force"]:
            raise Refusal(
                f"{interface} carries the SSH connection ({address}); force: true on the link shapes it all the same"
            )


def _serve(kernel: Kernel, asked: dict[str, Any], record: Record) -> None:
    try:
        shaped = Shaped(kernel, asked, record)
        _say({"mtu": shaped.mtu})
        for line in sys.stdin:
            order = json.loads(line)
            _say(shaped.put(order) if order["do"] == "put" else shaped.read(order))
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        record.undo(kernel)


def _leave(*_: object) -> None:
    raise SystemExit(1)


def main() -> None:
    kernel = Kernel()
    asked = json.loads(sys.stdin.readline() or "null")
    if asked is None:
        return
    if asked.get("clean"):
        _say({"undone": _clean(kernel)})
        return
    logged_in = (sys.argv[1] if len(sys.argv) > 1 else "").split()
    if len(logged_in) == 4:  # SSH_CONNECTION
        asked["ssh"].append(logged_in[0].replace("::ffff:", ""))
        asked["spare"].append(int(logged_in[3]))
    _refuse(kernel, asked)
    record = Record.of(asked["interface"])
    record.undo(kernel)
    record = Record.of(asked["interface"])
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    worker = os.fork()
    if worker:
        os.waitpid(worker, 0)
        record.undo(Kernel())
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    _serve(Kernel(), asked, record)


if __name__ == "__main__":
    try:
        main()
    except Refusal as refusal:
        _say({"error": str(refusal), "usage": True})
    except (OSError, KeyError, ValueError) as error:
        _say({"error": str(getattr(error, "strerror", None) or repr(error))})
