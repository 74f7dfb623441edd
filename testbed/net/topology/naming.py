"""How names are resolved in a node: the files a command in it sees in place of the host's. See hosts(5), nsswitch.conf(5)."""

from __future__ import annotations

import re
import socket
from collections.abc import Collection
from ipaddress import ip_address
from pathlib import Path

HOSTS, SWITCH = Path("/etc/hosts"), Path("/etc/nsswitch.conf")
_LONGEST = 1 << 20


def own_names(taken: Collection[str]) -> str:
    """Lines of a hosts file that keep the host's own names, such as sudo looks up; but for those that are *taken*."""
    lines: dict[str, str] = {}
    for line in _text(HOSTS).splitlines():
        address, *names = line.partition("#")[0].split() or [""]
        if _is_loopback(address):
            lines |= {
                f"{address} {name}": name for name in names if name not in taken and name != "localhost"
            }
    name = socket.gethostname()
    if name not in taken and name not in lines.values():
        lines[f"127.0.1.1 {name}"] = name
    return "".join(f"{line}\n" for line in lines)


def switch() -> str:
    """The host's name service switch, asking files alone for hosts: in a node there is nobody else to ask, and waiting for name
    servers takes seconds."""
    text, count = re.subn(r"(?m)^\s*hosts:.*$", "hosts: files", _text(SWITCH))
    return text if count else f"{text}\nhosts: files\n"


def _is_loopback(address: str) -> bool:
    try:
        return ip_address(address).is_loopback
    except ValueError:
        return False


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LONGEST).decode(errors="replace")
    except OSError:
        return ""
