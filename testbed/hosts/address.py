"""Which machine a host is: this one, or one that SSH knows, as topology files name it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from testbed.errors import SpecError
from testbed.hosts.host import Host, host

_SCHEME = "ssh://"
_WRITTEN = re.compile(
    r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?"
    r"(?:\[(?P<six>[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9_.-]{1,15})?)\]|(?P<name>[A-Za-z0-9_][A-Za-z0-9_.-]{0,254}))"
    r"(?::(?P<port>[0-9]{1,5}))?"
)


@dataclass(frozen=True)
class Address:
    """`name`: as SSH is to reach it, an alias of ~/.ssh/config too; empty: this machine. `str` reads back."""

    name: str
    user: str | None = None  #: None: as ~/.ssh/config says, or the invoking user
    port: int | None = None  #: None: as ~/.ssh/config says, or 22

    @property
    def local(self) -> bool:
        """Whether it is this machine."""
        return not self.name

    def __str__(self) -> str:
        if self.local:
            return "local"
        name = f"[{self.name}]" if ":" in self.name else self.name
        return f"{_SCHEME}{f'{self.user}@' if self.user else ''}{name}{f':{self.port}' if self.port else ''}"

    def host(self, python: str) -> Host:
        """Where processes are started there. `python`: the Python that has a testbed there; this machine's is our own. Raises
        UsageError, EndpointError where it cannot be reached."""
        return host("local") if self.local else host("ssh", address=self, python=python)


LOCAL = Address("")


def parse_address(text: str) -> Address:
    """``local``, or ``ssh://[user@]name[:port]``. Raises SpecError."""
    if text == "local":
        return LOCAL
    written = _WRITTEN.fullmatch(text[len(_SCHEME) :]) if text.startswith(_SCHEME) else None
    port = int(written["port"]) if written and written["port"] else None
    if written is None or (port is not None and not 1 <= port <= 65535):
        raise SpecError(f"host {text[:80]!r}: write ssh://[user@]name[:port], or local for this machine")
    return Address(written["six"] or written["name"], written["user"], port)
