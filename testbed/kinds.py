"""Kinds of a thing, each a frozen dataclass with a name, whose fields are its parameters: how they are found, written and read.

What a name stands for is a line in its registry, such as ``"q2c": "testbed.codecs.select.q2c:Q2C"``; what is written is
``name(key=value, …)``, defaults left out. A value is a number, a word, ``true`` or ``false``, a time (``2s``), so many a second
(``2/s``), a size (``8gb``), a kind of its own (``policy=ewma(alpha=0.3)``) or a list of texts in brackets
(``levels=[int8, q2c@0.25(pool=1)+int4, text]``).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Union

from testbed.errors import SpecError, UnitError
from testbed.units import exact_per_second, exact_size, exact_time, parse_per_second, parse_size, parse_time

LONGEST = 2000  # characters of a kind's text, with all that is in it
DEEPEST = 8  # parentheses and brackets in one another

#: Of a field: seconds, events a second, bytes, which people write with their unit.
Time = Annotated[float, "time"]
PerSecond = Annotated[float, "rate"]
Size = Annotated[int, "size"]

_INTEGER = re.compile(r"[+-]?\d{1,15}")
_NUMBER = re.compile(r"[+-]?(?:\d{1,30}\.?\d{0,30}|\.\d{1,30})(?:[eE][+-]?\d{1,3})?")
_WORD = re.compile(r"[\w./:-]{1,200}", re.ASCII)
_TEXT = re.compile(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\)\s*)?", re.ASCII | re.DOTALL)
_PAIRS = {")": "(", "]": "["}


@dataclass(frozen=True)
class Parameter:
    """One parameter: its name, type in words, default (`None`: nothing, or where it is `required`, none) and choices (empty: any
    value). `family`: where the names of the kinds stand that it may be.
    """

    name: str
    type: str
    default: Value | None
    choices: tuple[str, ...] = ()
    required: bool = False
    family: Mapping[str, str] | None = None


@dataclass(frozen=True)
class Kind:
    """Base of all kinds. Fields are `int`, `float`, `bool`, `str`, `Time`, `PerSecond`, `Size`, `Literal` words,
    `tuple[str, ...]` (a list of texts) or a base class of other kinds, which says what `family` they are of; ``… | None = None``
    is nothing where it is not given.

    The class docstring's first line is the description that people see; `source` names the paper.
    `__post_init__` checks ranges with `require`, which raises `SpecError`.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    family: ClassVar[Mapping[str, str]]  #: the registry, of a base class whose kinds are values of others

    def require(self, parameter: str, wanted: str, satisfied: bool) -> None:
        """Raises SpecError saying what `parameter` must be, unless `satisfied`."""
        if not satisfied:
            known = {known.name: known for known in parameters(type(self))}
            value = print_value(getattr(self, parameter), known[parameter].type)[:40]
            raise SpecError(f"{self.name}: {parameter} is {value}, but must be {wanted}")

    def __str__(self) -> str:
        """The canonical text: parameters that differ from their defaults, numbers as short as they read back."""
        given = [
            f"{known.name}={print_value(value, known.type)}"
            for known in parameters(type(self))
            if (value := getattr(self, known.name)) != known.default and known.name != "ratio"
        ]
        ratio = f"@{print_value(self.ratio)}" if hasattr(self, "ratio") else ""
        return self.name + ratio + (f"({', '.join(given)})" if given else "")


def load(target: str) -> Any:
    """What a line of a registry stands for, ``"module:attribute"``."""
    module, _, attribute = target.partition(":")
    return getattr(import_module(module), attribute)


Value = Union[int, float, bool, str, tuple[str, ...], Kind]  # noqa: UP007 (a class beside types)


def parse(text: str, registry: Mapping[str, str], what: str) -> Any:
    """``"name(key=value, …)"`` -> that kind of the registry. Raises SpecError: which `what` is wrong, and what would be right."""
    if len(text) > LONGEST:
        raise SpecError(f"{what} {clip(text)}: {len(text)} characters, but it has at most {LONGEST}")
    try:
        split(text)
    except SpecError as error:
        raise SpecError(f"{what} {clip(text)}: {error}") from None
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
    hints = typing.get_type_hints(kind, include_extras=True)
    fields = [field for field in dataclasses.fields(kind) if field.init]
    return tuple(_parameter(field, hints[field.name]) for field in fields)


def _parameter(field: dataclasses.Field[Any], hint: Any) -> Parameter:
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    required = field.default is dataclasses.MISSING
    default: Any = None if required else field.default
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return Parameter(field.name, "word", default, arguments, required)
    if origin is Annotated:
        return Parameter(field.name, arguments[1], default, (), required)
    if origin is tuple:
        return Parameter(field.name, "list", default, (), required)
    if issubclass(hint, Kind):
        return Parameter(field.name, hint.__name__.lower(), default, (), required, hint.family)
    return Parameter(field.name, hint.__name__, default, (), required)


def print_value(value: Value, type: str = "") -> str:
    """`0.25` -> ``"0.25"``, `4.0` -> ``"4"``, `True` -> ``"true"``; `type` is a parameter's: a time's `2.0` -> ``"2s"``."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(value)}]"
    if type == "time" and isinstance(value, float | int) and math.isfinite(value):
        return exact_time(value)
    if type == "rate" and isinstance(value, float | int) and math.isfinite(value):
        return exact_per_second(value)
    if type == "size" and isinstance(value, int):
        return exact_size(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value)


def read_value(text: str, parameter: Parameter) -> Value:
    """The value of `parameter` written as `text`; raises SpecError saying what was expected."""
    if parameter.choices:
        if text in parameter.choices:
            return text
        raise SpecError(f"{parameter.name}={text[:40]!r}: expected one of {', '.join(parameter.choices)}")
    if parameter.family is not None:
        return typing.cast("Kind", parse(text, parameter.family, parameter.name))
    readers: dict[str, tuple[Any, str]] = {
        "bool": (lambda word: {"true": True, "false": False}[word], "true or false"),
        "int": (lambda word: int(_whole(_INTEGER, word)), "a whole number"),
        "float": (lambda word: _finite(_whole(_NUMBER, word)), "a number"),
        "str": (lambda word: _whole(_WORD, word), "a word or a path"),
        "time": (parse_time, "a time"),
        "rate": (parse_per_second, "so many a second"),
        "size": (parse_size, "a size"),
        "list": (_items, "a list in brackets, such as [a, b]"),
    }
    reader, expected = readers[parameter.type]
    try:
        return reader(text)
    except UnitError as error:
        raise SpecError(f"{parameter.name}: {error}") from None
    except (KeyError, ValueError):
        raise SpecError(f"{parameter.name}={text[:40]!r}: expected {expected}") from None


def _items(text: str) -> tuple[str, ...]:
    """``"[a, b(c=1)]"`` -> its items; raises ValueError where it is no list or an item is empty."""
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError(text)
    items = tuple(item.strip() for item in split(text[1:-1])) if text[1:-1].strip() else ()
    if not all(items):
        raise ValueError(text)
    return items


def split(text: str) -> list[str]:
    """The pieces between the commas that stand outside of parentheses and brackets. Raises SpecError where these do not match, or
    there are more than `DEEPEST` in one another.
    """
    opened: list[str] = []
    pieces, start = [], 0
    for at, sign in enumerate(text):
        if sign in "([":
            opened.append(sign)
            if len(opened) > DEEPEST:
                raise SpecError(f"more than {DEEPEST} parentheses in one another: {clip(text[start:])}")
        elif sign in ")]":
            if not opened or opened.pop() != _PAIRS[sign]:
                raise SpecError(f"the {sign} behind {text[max(0, at - 20) : at]!r} closes nothing")
        elif sign == "," and not opened:
            pieces.append(text[start:at])
            start = at + 1
    if opened:
        raise SpecError(f"ends within its {'parentheses' if opened[-1] == '(' else 'brackets'}")
    return [*pieces, text[start:]]


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
    for item in split(text or "") if (text or "").strip() else ():
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
    for parameter in known.values():
        if parameter.required and parameter.name not in values:
            raise SpecError(f"{name} needs {parameter.name}, a {parameter.type}: {name}({parameter.name}=…)")
    return values


def clip(value: object) -> str:
    """Quoted, and not too long for a message."""
    text = str(value)
    return repr(text if len(text) <= 60 else text[:57] + "…")
