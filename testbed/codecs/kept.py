"""Files that codecs refer to by a hash of what they say: kept among this machine's, found again by that name.

A payload names the hash, never a file. Who needs what it names looks among those that the machine has, and checks that a file
says what its name promises.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from testbed import files
from testbed.errors import SpecError

LARGEST_FILE = 64 << 20
_NAME = re.compile(r"[0-9a-f]{32}")

T = TypeVar("T")


def is_name(word: str) -> bool:
    """Whether a word is a hash that names what is kept, not a file."""
    return _NAME.fullmatch(word) is not None


class Kept(Generic[T]):
    """Those of one kind. `what` they are, in the plural: their directory, and how a file is called; `kind`: of which msgspec
    reads one; `wrong`: what is wrong with one that could be read (empty: nothing).
    """

    def __init__(self, what: str, kind: type[T], wrong: Callable[[T], str]) -> None:
        self._what, self._kind, self._wrong = what, kind, wrong
        self.known = functools.lru_cache(maxsize=8)(self._known)

    def save(self, value: T) -> tuple[str, Path]:
        """Keeps one: its name and file."""
        data = msgspec.msgpack.encode(value)
        name = _name(data)
        path = self._path(name)
        with files.storing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        files.replace(path, data)
        return name, path

    def load(self, path: Path) -> tuple[str, T]:
        """One from a file, and its name. Raises SpecError naming the file and what is wrong with it."""
        here = f"{self._what} {path}"
        try:
            data = files.read_at_most(path, LARGEST_FILE)
        except OSError as error:
            raise SpecError(f"{here}: {error.strerror or error}") from None
        try:
            value = msgspec.msgpack.decode(data, type=self._kind)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise SpecError(f"{here}: {str(error)[:100]}") from None
        if wrong := self._wrong(value):
            raise SpecError(f"{here}: {wrong}")
        return _name(data), value

    def size(self, name: str) -> int:
        """Bytes of the one of that name. Raises SpecError as `known` does."""
        return len(msgspec.msgpack.encode(self.known(name)))

    def _known(self, name: str) -> T:
        """The one of that name on this machine. Raises SpecError where it has none, or where the file holds another."""
        path = self._path(name)
        if not is_name(name) or not path.is_file():
            raise SpecError(
                f"the {self._what} {name[:40]} are not on this machine; copy their file to {path}"
            )
        held, value = self.load(path)
        if held != name:
            raise SpecError(f"{self._what} {path}: the file holds the {self._what} {held}, not {name}")
        return value

    def directory(self) -> Path:
        """Where this machine has them."""
        from testbed.models.sources import cache_directory

        return cache_directory() / self._what

    def _path(self, name: str) -> Path:
        return self.directory() / f"{name}.{self._what}"


def _name(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
