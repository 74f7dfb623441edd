"""Kinds of a thing, each a frozen dataclass with a name, whose fields are its parameters: how they are found, written and read.

What a name stands for is a line in its registry, such as ``"q2c": "testbed.codecs.select.q2c:Q2C"``; what is written is
``name(key=value, …)``, defaults left out.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, Literal

from testbed.errors import SpecError

Value = int | float | bool | str

_INTEGER = re.compile(r"[+-]?\d{1,15}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,3})?")
_WORD = re.compile(r"[\w./:-]{1,200}", re.ASCII)
_TEXT = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\(([^()]*)\)\s*)?", re.ASCII)


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, type in words, default (`None`: must be given) and choices (empty: any value)."""

    name: str
    type: str
    default: Value | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Kind:
    """Base of all kinds. Fields are `int`, `float`, `bool`, `str` or `Literal` words with defaults.

    The class docstring's first line is the description that people see; `source` names the paper.
    `__post_init__` checks ranges with `require`, which raises `SpecError`.
    """

    name: ClassVar[str]
    source: ClassVar[str]

    def require(self, parameter: str, wanted: str, satisfied: bool) -> None:
        """Raises SpecError saying what `parameter` must be, unless `satisfied`."""
        if not satisfied:
            value = print_value(getattr(self, parameter))[:40]
            raise SpecError(f"{self.name}: {parameter} is {value}, but must be {wanted}")

    def __str__(self) -> str:
        """The canonical text: parameters that differ from their defaults, numbers as short as they read back."""
        given = [
            f"{field.name}={print_value(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if field.init and field.name != "ratio" and getattr(self, field.name) != field.default
        ]
        ratio = f"@{print_value(self.ratio)}" if hasattr(self, "ratio") else ""
        return self.name + ratio + (f"({', '.join(given)})" if given else "")


def load(target: str) -> Any:
    """What a line of a registry stands for, ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


def parse(text: str, registry: Mapping[str, str], what: str) -> Any:
    """``"name(key=value, …)"`` -> that kind of the registry. Raises SpecError: which `what` is wrong, and what would be right."""
    match = _TEXT.fullmatch(text)
    if match is None or match[1] not in registry:
        near = difflib.get_close_matches(match[1] if match else text[:40], registry, 1)
        remedy = f"did you mean {near[0]!r}?" if near else f"there is {', '.join(registry)}"
        raise SpecError(f"{what} {clip(text)}: unknown; {remedy}")
    kind = load(registry[match[1]])
    known = {parameter.name: parameter for parameter in parameters(kind)}
    try:
        return kind(**read_arguments(match[1], match[2], known))
    except SpecError as error:
        raise SpecError(f"{what} {clip(text)}: {error}") from None


def parameters(kind: type[Kind]) -> tuple[Parameter, ...]:
    """The parameters of a kind, in order, `ratio` included."""
    return _parameters(kind)  # type: ignore[arg-type]  # mypy asks the class for its instances' hash


@functools.cache
def _parameters(kind: Any) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(kind)
    found = []
    for field in dataclasses.fields(kind):
        if field.init:
            default = None if field.default is dataclasses.MISSING else field.default
            hint = hints[field.name]
            choices = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
            found.append(Parameter(field.name, "word" if choices else hint.__name__, default, choices))
    return tuple(found)


def print_value(value: Value) -> str:
    """`0.25` -> ``"0.25"``, `4.0` -> ``"4"``, `True` -> ``"true"``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def read_value(text: str, parameter: Parameter) -> Value:
    """The value of `parameter` written as `text`; raises SpecError saying what was expected."""
    if parameter.choices:
        if text in parameter.choices:
            return text
        raise SpecError(f"{parameter.name}={text[:40]!r}: expected one of {', '.join(parameter.choices)}")
    readers: dict[str, tuple[Any, str]] = {
        "bool": (lambda word: {"true": True, "false": False}[word], "true or false"),
        "int": (lambda word: int(_whole(_INTEGER, word)), "a whole number"),
        "float": (lambda word: _finite(_whole(_NUMBER, word)), "a number"),
        "str": (lambda word: _whole(_WORD, word), "a word or a path"),
    }
    reader, expected = readers[parameter.type]
    try:
        return reader(text)
    except (KeyError, ValueError):
        raise SpecError(f"{parameter.name}={text[:40]!r}: expected {expected}") from None


def _whole(pattern: re.Pattern[str], text: str) -> str:
    if pattern.fullmatch(text) is None:
        raise ValueError(text)
    return text


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def read_arguments(name: str, text: str | None, known: Mapping[str, Parameter]) -> dict[str, Value]:
    """What stands in a kind's parentheses, by parameter. Raises SpecError."""
    values: dict[str, Value] = {}
    for item in (text or "").split(",") if (text or "").strip() else ():
        key, equals, value = (piece.strip() for piece in item.partition("="))
        if not equals:
            raise SpecError(f"{name}: {clip(item.strip())} is not key=value")
        if key == "ratio":
            raise SpecError(f"{name}: write the ratio as {name}@{value[:20]}")
        if key not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise SpecError(f"{name} has no parameter {clip(key)}; {takes}")
        if key in values:
            raise SpecError(f"{name}: {key} is given twice")
        try:
            values[key] = read_value(value, known[key])
        except SpecError as error:
            raise SpecError(f"{name}: {error}") from None
    return values


def clip(value: object) -> str:
    """Quoted, and not too long for a message."""
    text = str(value)
    return repr(text if len(text) <= 60 else text[:57] + "…")
