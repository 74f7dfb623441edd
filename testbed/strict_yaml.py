"""YAML as people should be held to: no key twice, no anchors, no tags, bounded in size and depth."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from testbed.errors import SpecError
from testbed.files import read_at_most

MAX_BYTES = 1_000_000
_MAX_DEPTH = 50


class _StrictLoader(yaml.SafeLoader):
    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        # An alias repeats a subtree: a few lines of them unfold to gigabytes ("billion laughs"), and nobody
        # needs them here.
        if self.check_event(yaml.events.AliasEvent) or getattr(self.peek_event(), "anchor", None):
            raise yaml.constructor.ConstructorError(
                None,
                None,
                "anchors and aliases (& and *) are not understood here",
                self.peek_event().start_mark,
            )
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(None, None, "nested too deeply", mark)
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read(path: Path) -> Any:
    """What the file says. Raises SpecError naming the file, and the line where there is one."""
    try:
        data = read_at_most(path, MAX_BYTES)
    except OSError as error:
        raise SpecError(f"{path}: {error.strerror}") from None
    return parse(data, str(path))


def parse(data: bytes | str, where: str) -> Any:
    """What the text says. Raises SpecError beginning with `where`, and the line where there is one."""
    try:
        # a SafeLoader underneath: it builds text, numbers, lists and mappings, and nothing else
        return yaml.load(data, Loader=_StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"{where}{line}: {error.problem}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "nested too deeply"
        raise SpecError(f"{where}: not YAML: {reason}") from None


def mapping(value: Any, where: str, known: set[str], required: set[str]) -> None:
    """Raises SpecError beginning with `where` unless `value` is a mapping of known keys that has the required
    ones."""
    at = f"{where}: " if where else ""
    if not isinstance(value, Mapping):
        raise SpecError(f"{at}expected a mapping with {', '.join(sorted(known))}")
    for key in value:
        if key not in known:
            raise SpecError(f"{at}unknown key {str(key)[:40]!r}{did_you_mean(str(key), sorted(known))}")
    for key in sorted(required - set(value)):
        raise SpecError(f"{at}{key} is missing")


def items(value: Any, where: str) -> list[Any]:
    """`value`, if it is a list. Raises SpecError beginning with `where`."""
    if not isinstance(value, list):
        raise SpecError(f"{where}: expected a list")
    return value


def truth(value: Any, where: str) -> bool:
    """`value`, if it is true or false. Raises SpecError beginning with `where`."""
    if not isinstance(value, bool):
        raise SpecError(f"{where}: expected true or false, not {str(value)[:40]!r}")
    return value


def whole(value: Any, where: str, low: int, high: int) -> int:
    """`value`, if it is a whole number from `low` to `high`. Raises SpecError beginning with `where`."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise SpecError(f"{where}: expected a whole number from {low} to {high}, not {str(value)[:40]!r}")
    return value


def text(value: Any, where: str) -> str:
    """`value`, if it is text. Raises SpecError beginning with `where`."""
    if not isinstance(value, str):
        raise SpecError(f"{where}: expected text, not {str(value)[:40]!r}")
    return value


def did_you_mean(word: str, known: list[str]) -> str:
    """``"; did you mean 'delay'?"``, or the whole list where nothing comes near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; use one of {', '.join(known)}"
