"""YAML as people should be held to: no key twice, no anchors, no tags, bounded in size and depth."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import yaml

from testbed.errors import SpecError
from testbed.files import read_at_most

if TYPE_CHECKING:
    from pydantic import BaseModel

M = TypeVar("M", bound="BaseModel")
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
        split = error.context == "while parsing a flow sequence"
        remedy = "; in brackets, quote what has brackets or commas of its own" if split else ""
        raise SpecError(f"{where}{line}: {error.problem}{remedy}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else "nested too deeply"
        raise SpecError(f"{where}: not YAML: {reason}") from None


def checked(model: type[M], value: Any, place: str = "") -> M:
    """The pydantic model that the value makes. Raises SpecError: one line with place, value and remedy for its first mistake, a
    misspelt key before what is missing for it."""
    from pydantic import ValidationError  # whoever reads no file need not wait for it

    if not isinstance(value, Mapping):
        raise SpecError(f"{_at(place)}expected a mapping with {', '.join(_known(model, []))}")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        mistakes = error.errors(include_url=False)
    first = min(mistakes, key=lambda mistake: mistake["type"] != "extra_forbidden")
    keys = list(first["loc"])
    last = str(keys.pop()) if first["type"] in ("extra_forbidden", "missing") else ""
    where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")
    here = _at(place) + _at(where)
    if first["type"] == "extra_forbidden":
        raise SpecError(f"{here}unknown key {last[:40]!r}{did_you_mean(last, _known(model, keys))}")
    if first["type"] == "missing":
        raise SpecError(f"{here}{last} is missing")
    if cause := first.get("ctx", {}).get("error"):
        raise SpecError(f"{here}{cause}")
    raise SpecError(f"{here}{first['msg']} (got {str(first['input'])[:60]!r})")


def _at(place: str) -> str:
    return f"{place}: " if place else ""


def _known(model: Any, keys: list[int | str]) -> list[str]:
    """The keys of the model that is found below *keys*."""
    for key in keys:
        if isinstance(key, str) and key in model.model_fields:  # and no name of what a mapping has
            annotation = model.model_fields[key].annotation
            model = next(
                kind for kind in (*get_args(annotation), annotation) if hasattr(kind, "model_fields")
            )
    return sorted(field.alias or name for name, field in model.model_fields.items())


def did_you_mean(word: str, known: list[str]) -> str:
    """``"; did you mean 'delay'?"``, or the whole list where nothing comes near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; use one of {', '.join(known)}"
