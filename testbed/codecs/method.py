"""What every codec method is: a frozen dataclass whose fields are its hyper-parameters, and how they are read and printed."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from testbed.errors import SpecError

Value = int | float | bool | str

_INTEGER = re.compile(r"[+-]?\d{1,15}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,3})?")
_WORD = re.compile(r"[\w./:-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class Parameter:
    """One hyper-parameter: its name, type in words, default (`None`: must be given) and choices (empty: any value)."""

    name: str
    type: str
    default: Value | None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Method:
    """Base of all methods. Fields are `int`, `float`, `bool`, `str` or `Literal` words, all but `ratio` with defaults.

    The class docstring's first line is the description that people see; `source` names the paper.
    `__post_init__` checks ranges with `require`, which raises `SpecError`.
    """

    name: ClassVar[str]
    stage: ClassVar[Literal["selector", "transform", "quantizer", "coder"]]
    source: ClassVar[str]

    @property
    def refers(self) -> bool:
        """Whether the text refers to something outside of it (a file), so that it must be `bound` before it codes."""
        return False

    def bound(self, model: str | None) -> Method:
        """The method with what its text refers to written out. model: whose caches it will code. Raises SpecError."""
        return self

    @property
    def shared_bytes(self) -> int:
        """Bytes that both sides must have before anything crosses, and that no payload holds: of a method that is `bound`."""
        return 0

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


def parameters(method: type[Method]) -> tuple[Parameter, ...]:
    """The hyper-parameters of a method, in order, `ratio` included."""
    return _parameters(method)  # type: ignore[arg-type]  # mypy asks the class for its instances' hash


@functools.cache
def _parameters(method: Any) -> tuple[Parameter, ...]:
    hints = typing.get_type_hints(method)
    found = []
    for field in dataclasses.fields(method):
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
