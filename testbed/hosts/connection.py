"""A connection to a host over SSH, made as `ssh` makes it: the keys, the agent, ``~/.ssh/config``, the hosts that are known.

Known hosts are checked and never added. Of the configuration these words count: HostName, User, Port, IdentityFile,
IdentitiesOnly, ProxyJump, ProxyCommand, UserKnownHostsFile, GlobalKnownHostsFile and HostKeyAlias.
"""

from __future__ import annotations

import contextlib
import glob
import logging
import re
import shlex
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import paramiko
from paramiko.hostkeys import HostKeyEntry

from testbed.errors import EndpointError, UsageError
from testbed.hosts.address import parse_address
from testbed.identity import invoking_user

#: How long until a host has answered, in each step; how long one may be silent before it counts as lost.
_CONNECT_S, _KEEPALIVE_S, _SILENT_S = 15.0, 5.0, 20.0
_MOST_JUMPS, _MOST_INCLUDES = 8, 16
#: A line of a configuration, ssh_config(5); what it may be matched by that paramiko takes for a match whatever it says.
_LINE = re.compile(r"\s*([A-Za-z]+)(?:\s*=\s*|\s+)(.*?)\s*")
_UNMATCHED = re.compile(r"(?i)(?:^|[\s!])(localnetwork|tagged|version|sessiontype|command)\s")

#: What paramiko raises where a connection, or a session on it, has ended.
LOST = (paramiko.SSHException, OSError, EOFError)

_log = logging.getLogger("paramiko")
_log.addHandler(logging.NullHandler())
_log.propagate = False  # what it would print is in our errors


@dataclass(frozen=True)
class Where:
    """A host as it is to be reached: what its address and the configuration say."""

    address: str  #: as the user wrote it
    user: str
    name: str  #: or a number
    port: int
    known_as: str  #: in the files of known hosts
    settings: dict[str, Any] = field(compare=False)


def where(address: str) -> Where:
    """``ssh://[user@]name[:port]``. Raises SpecError, UsageError."""
    given = parse_address(address)
    name = given.name
    try:
        path = Path("~/.ssh/config").expanduser()
    except RuntimeError as error:  # a user whom nobody knows, as in a container
        raise UsageError(
            f"{address}: there is no home directory, where keys and known hosts are; set HOME"
        ) from error
    try:
        text = "".join(_configuration(path, "Host *\n")) if path.exists() else ""
        settings = dict(paramiko.SSHConfig.from_text(text).lookup(name))
        port = int(given.port or settings.get("port", 22))
        if not 1 <= port <= 65535:
            raise ValueError(f"there is no port {port}")
    except KeyError as error:  # paramiko asks for a user's name whether it is needed or not
        raise UsageError(f"{address}: the system knows no name of this user; set LOGNAME") from error
    except (OSError, ValueError, paramiko.SSHException) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    host = settings.get("hostname", name)
    alias = settings.get("hostkeyalias")
    known_as = alias or (host if port == 22 else f"[{host}]:{port}")
    return Where(
        address, given.user or settings.get("user") or invoking_user().name, host, port, known_as, settings
    )


def _configuration(path: Path, block: str, depth: int = 0) -> Iterator[str]:
    """The lines of a configuration, with those of what it includes in their places, which paramiko does not know."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            found = _LINE.fullmatch(line)
            word, value = (found[1].lower(), found[2]) if found else ("", "")
            if word == "match" and (unknown := _UNMATCHED.search(value)):
                raise ValueError(f"Match {unknown[1]} is not understood here")
            if found and word not in ("match", "proxycommand") and '"' not in value:
                value = re.sub(r"(?:^|\s+)#.*", "", value)
                line = f"{found[1]} {value}"
            if word in ("host", "match"):
                block = line
            if word != "include":
                yield line.rstrip("\n") + "\n"
            elif depth < _MOST_INCLUDES:
                for pattern in shlex.split(value):
                    named = Path("~/.ssh").expanduser() / Path(pattern).expanduser()
                    for each in sorted(glob.glob(str(named))):  # noqa: PTH207 (a whole path)
                        yield from _configuration(Path(each), block, depth + 1)
                yield block.rstrip("\n") + "\n"


class Connection:
    """The connection to one host, made when it is first needed, and again where it was lost."""

    def __init__(self, address: str) -> None:
        self.where = where(address)
        self._clients: list[paramiko.SSHClient] = []  # ours and, before it, those to hosts on the way
        self._lock = threading.Lock()

    @property
    def stands(self) -> bool:
        transport = self._clients[-1].get_transport() if self._clients else None
        return transport is not None and transport.is_active()

    def open(self) -> paramiko.Channel:
        """A new session. Raises EndpointError where the host cannot be reached, UsageError where it is not the one that is known
        or takes none of our keys."""
        with self._lock:
            if not self.stands:
                self._close()
                self._clients = _connected(self.where)
            transport = self._clients[-1].get_transport()
        assert transport is not None
        try:
            return transport.open_session(timeout=_CONNECT_S)
        except LOST as error:
            raise EndpointError(
                f"{self.where.address}: no session on its connection: {_words(error)}"
            ) from error

    def addresses(self) -> tuple[str, str]:
        """Ours and the host's, as its connection has them; empty where it goes through another host, or a program. Raises as
        `open` does."""
        end(self.open())
        sock = _socket(self._clients[-1])
        return (sock.getsockname()[0], sock.getpeername()[0]) if sock is not None else ("", "")

    def first_hop(self) -> str:
        """The address to which the connection leaves this machine, that of a host on the way where there is one; empty: a program
        knows it. Raises as `open` does."""
        end(self.open())
        sock = _socket(self._clients[0])
        return str(sock.getpeername()[0]) if sock is not None else ""

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        while self._clients:
            with contextlib.suppress(Exception):
                self._clients.pop().close()


def _socket(client: paramiko.SSHClient) -> socket.socket | None:
    transport = client.get_transport()
    sock = transport.sock if transport is not None else None
    return sock if isinstance(sock, socket.socket) else None


def end(session: paramiko.Channel) -> None:
    """Close a session, whose connection may be lost."""
    with contextlib.suppress(*LOST):
        session.close()


@contextlib.contextmanager
def ending(session: paramiko.Channel) -> Iterator[None]:
    """Close a session at the block's end."""
    try:
        yield
    finally:
        end(session)


def _connected(place: Where, jumps: int = 0, first: paramiko.PKey | None = None) -> list[paramiko.SSHClient]:
    # Connected, behind the hosts on the way to it. first: of the keys by which it is known, the one to be expected.
    if jumps > _MOST_JUMPS:
        raise UsageError(f"{place.address}: more than {_MOST_JUMPS} hosts on the way (ProxyJump)")
    clients: list[paramiko.SSHClient] = []
    client = paramiko.SSHClient()
    known = list(_known_keys(place))
    try:
        client.set_missing_host_key_policy(_Refusing(place))
        for key in [*reversed(known), *([first] if first else [])]:  # of a kind the last one counts
            client.get_host_keys().add(place.known_as, key.get_name(), key)
        sock = _way(place, clients, jumps)
        settings = place.settings
        keys = [str(Path(each).expanduser()) for each in settings.get("identityfile", ())]
        only = settings.get("identitiesonly", "no").lower() == "yes"
        # The name under which a host is known is all that paramiko takes a host and a port for, given a socket.
        client.connect(
            place.known_as,
            username=place.user,
            sock=sock,
            key_filename=[key for key in keys if Path(key).is_file()],
            allow_agent=not only,
            look_for_keys=not keys,
            timeout=_CONNECT_S,
            banner_timeout=_CONNECT_S,
            auth_timeout=_CONNECT_S,
            channel_timeout=_CONNECT_S,
        )
        transport = client.get_transport()
        assert transport is not None
        transport.set_keepalive(int(_KEEPALIVE_S))
        return [*clients, client]
    except BaseException as error:
        for each in (client, *reversed(clients)):
            each.close()
        if isinstance(error, paramiko.BadHostKeyException) and first is None and error.key in known:
            return _connected(place, jumps, error.key)
        if isinstance(error, (*LOST, ValueError)):
            raise _translated(error, place) from error
        raise


def _way(place: Where, clients: list[paramiko.SSHClient], jumps: int) -> Any:
    """What leads to the host: a socket, or one through hosts on the way, whose `clients` stay open for it."""
    jump, command = place.settings.get("proxyjump", "none"), place.settings.get("proxycommand")
    if jump.lower() != "none":
        *before, last = jump.split(",")
        hop = where(f"ssh://{last.strip().removeprefix('ssh://')}")
        if before:
            hop.settings["proxyjump"] = ",".join(before)
        clients += _connected(hop, jumps + 1)
        transport = clients[-1].get_transport()
        assert transport is not None
        return transport.open_channel(
            "direct-tcpip", (place.name, place.port), ("127.0.0.1", 0), timeout=_CONNECT_S
        )
    if command:
        return paramiko.ProxyCommand(command)
    made = socket.create_connection((place.name, place.port), _CONNECT_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * _SILENT_S))
    return made


def _known_hosts(place: Where) -> list[Path]:
    users = place.settings.get("userknownhostsfile", "~/.ssh/known_hosts ~/.ssh/known_hosts2")
    everybodys = place.settings.get("globalknownhostsfile", "/etc/ssh/ssh_known_hosts")
    return [Path(each).expanduser() for each in shlex.split(users) + shlex.split(everybodys)]


def _known_keys(place: Where) -> Iterator[paramiko.PKey]:
    """By which a host is known. A line that is none is passed over, as `ssh` does, where paramiko gives up."""
    for path in _known_hosts(place):
        with contextlib.suppress(OSError):
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(Exception):  # paramiko does not say what it raises
                    entry = HostKeyEntry.from_line(line.strip())
                    own = paramiko.HostKeys()
                    for name in entry.hostnames:
                        own.add(name, entry.key.get_name(), entry.key)
                    if own.check(place.known_as, entry.key):
                        yield entry.key


class _Refusing(paramiko.MissingHostKeyPolicy):
    def __init__(self, place: Where) -> None:
        self.place = place

    def missing_host_key(self, client: Any, hostname: str, key: Any) -> None:
        place, kind = self.place, key.get_name().removeprefix("ssh-")
        apart = place.settings.keys() & {"proxyjump", "proxycommand", "hostkeyalias"}
        scan = f"ssh-keyscan -p {place.port} -t {kind} {place.name} >> {_file(place)}"
        remedy = f"say so to  ssh {place.address} true" if apart else scan
        raise _Unknown(
            f"{place.address}: this host is not known: its key is {key.get_name()} {key.fingerprint}; where that is right (ask "
            f"who runs it): {remedy}"
        )


def _file(place: Where) -> str:
    # of known hosts, where a user adds one and removes it, for a shell
    return shlex.quote(str(_known_hosts(place)[0]))


class _Unknown(paramiko.SSHException):
    """A host that is in no file of known hosts."""


def _translated(error: BaseException, place: Where) -> EndpointError | UsageError:
    about = place.address
    if isinstance(error, _Unknown):
        return UsageError(str(error))
    if isinstance(error, paramiko.BadHostKeyException):
        return UsageError(
            f"{about}: its host key has changed: {error.key.fingerprint}, known is {error.expected_key.fingerprint}; where the "
            f"host was set up anew, and no other is in its place: ssh-keygen -f {_file(place)} -R '{place.known_as}'"
        )
    if isinstance(error, paramiko.PasswordRequiredException):
        return UsageError(f"{about}: the key has a passphrase: ssh-add it to an agent (SSH_AUTH_SOCK) first")
    if isinstance(error, (socket.gaierror, UnicodeError)):  # the latter where it can be no name
        return UsageError(f"{about}: no host {place.name} is known to the resolver: {_words(error)}")
    if isinstance(error, (paramiko.AuthenticationException, ValueError)) or "No authentication" in str(error):
        who = f"-p {place.port} {place.user}@{parse_address(about).name}"
        return UsageError(
            f"{about}: it lets {place.user} in by none of the keys here; ssh-copy-id {who}, and see that `ssh {who} true` asks "
            "for nothing"
        )
    if isinstance(error, TimeoutError):
        return EndpointError(
            f"{about}: no answer within {_CONNECT_S:.0f} s at {place.name}, port {place.port}"
        )
    return EndpointError(f"{about}: not reached at {place.name}, port {place.port}: {_words(error)}")


def _words(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(said.split())[:300]
