"""Files and directories that a scenario names, on hosts of their own: what is small is sent there, once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, cast

from testbed import files
from testbed.errors import EndpointError, UsageError
from testbed.hosts import asking
from testbed.hosts.host import Host
from testbed.models.sources import find

if TYPE_CHECKING:
    from testbed.hosts.ssh import Ssh

#: Of a file, or a directory, that is sent.
MOST_BYTES = 256 << 20
#: Where copies lie there, below the home in which programs of ours run; each in a directory of its digest's name.
SENT = ".cache/testbed/sent"
_SHORT_S = 60.0


def model_there(host: Host, name: str) -> str:
    """A model by the name that it has on the host. Raises UsageError, EndpointError, StorageError as `there` does."""
    return there(host, name) if find(name).kind in ("directory", "gguf") else name


def there(host: Host, named: str) -> str:
    """A file or directory of ours by its path on the host, which has it as it is here, or a copy.

    Raises UsageError where it is not there and too large to be sent; EndpointError and StorageError where it cannot be.
    """
    path = Path(named).expanduser().absolute()
    if host.describe()["kind"] != "ssh" or not path.exists():
        return named
    ssh = cast("Ssh", host)
    parts = [path] if not path.is_dir() else sorted(part for part in path.iterdir() if part.is_file())
    if not parts or not parts[0].is_file():
        raise UsageError(f"{named}: is no file, and no directory of files")
    size = sum(part.stat().st_size for part in parts)
    if size > MOST_BYTES:
        if ssh.run(["test", "-e", str(path)])[0] == 0:
            return str(path)
        raise UsageError(
            f"{named}: its {size / 1e9:.1f} GB are not sent to {ssh.address}; copy it there, to {path} as here"
        )
    folder = f"{SENT}/{_digest(parts)}"
    target = f"{folder}/{path.name}"
    # What is whole is known by the name that it gets last.
    inside = f"{target}/" if path.is_dir() else f"{folder}/"
    *first, last = sorted(parts, key=lambda part: part.name == "config.json")
    if ssh.run(["test", "-f", f"{inside}{last.name}"])[0] != 0:
        # What lies there is believed by its name: nobody else may write there, whatever the umask.
        make = ["install", "-d", "-m", "700", SENT, folder, inside]
        status, _, said = asking.run(ssh, make, _SHORT_S)
        if status:
            raise EndpointError(f"{ssh.address}: there can be no directory ~/{inside}: {said}")
        for part in [*first, last]:
            ssh.put(part.resolve(), Path(f"{inside}{part.name}"))
    return target


def _digest(parts: list[Path]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        with files.open_named(part) as file:
            whole.update(f"{part.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()[:16]
