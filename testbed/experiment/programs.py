"""Programs of one's own in a scenario: what is started on which node, when it is ready, and what of its output is a column.

`programs:` has servers by any names, and one `client`, which is what a trial measures. In words of a command ``{cloud.address}``
is a node's address, ``{NAME}`` a parameter's value, ``{repeat}`` the trial's number among those alike. ``%{…}`` and ``${…}``, and
braces around anything else, stay.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    model_validator,
)

from testbed.errors import SpecError
from testbed.strict_yaml import did_you_mean
from testbed.units import exact_time, parse_time

CLIENT = "client"
#: Columns that a program measures itself: of the client's names, those that a row has already.
MEASURED = ("e2e_s", "ttft_s", "token_s", "answer_tokens", "answer", "score", "em", "f1", "payload_bytes")
_MOST_COLUMNS, _LONGEST_TEXT = 200, 1000
_WORD = re.compile(r"(?<![%$])\{([A-Za-z][\w-]*(?:\.address)?)\}", re.ASCII)
_NAME = re.compile(r"[A-Za-z]\w{0,63}", re.ASCII)

Scalar = bool | int | float | str


def _words(value: Any) -> Any:
    if not isinstance(value, str):
        return [str(word) for word in value] if isinstance(value, list) else value
    try:
        return shlex.split(value)
    except ValueError as error:
        raise SpecError(f"{value!r}: {error}") from None


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise SpecError(f"{text!r} is no regular expression: {error}") from None
    return text


Command = Annotated[list[str], BeforeValidator(_words), Field(min_length=1)]
Seconds = Annotated[
    float,
    BeforeValidator(lambda value: value if isinstance(value, float) else parse_time(str(value))),
    Field(ge=0, le=86400),
    PlainSerializer(exact_time, when_used="json"),
]


class Ready(BaseModel):
    """When a server takes callers: it listens at a TCP `port`, printed a line that matches `log`, a command ends with 0, or so
    much time has passed.
    """

    model_config = ConfigDict(extra="forbid")

    port: Annotated[str, BeforeValidator(str)] | None = None
    log: Annotated[str, AfterValidator(_pattern)] | None = None
    run: Command | None = None
    after: Seconds | None = None

    @model_validator(mode="after")
    def _one(self) -> Ready:
        if len([value for value in (self.port, self.log, self.run, self.after) if value is not None]) != 1:
            raise SpecError("write one of port: 8000, log: a pattern, run: a command, after: 2s")
        return self


class Program(BaseModel):
    """One program."""

    model_config = ConfigDict(extra="forbid")

    node: str
    run: Command
    env: dict[str, Annotated[str, BeforeValidator(str)]] = {}
    ready: Ready | None = None  #: a server's
    #: a client's: column -> where in its JSON, such as ``end.sum_received.bits_per_second``
    columns: dict[str, str] = {}


Programs = dict[str, Program]
Parameters = dict[
    str,
    Annotated[
        list[Scalar], BeforeValidator(lambda v: v if isinstance(v, list) else [v]), Field(min_length=1)
    ],
]


def check(programs: Programs, parameters: Parameters, nodes: Sequence[str], columns: Sequence[str]) -> None:
    """Raises SpecError where that cannot be run: no client, a node or word that there is not, a name that `columns` has."""
    if CLIENT not in programs:
        raise SpecError("programs: one of them is the `client`, whose time is measured; the others serve it")
    for name, values in parameters.items():
        if not _NAME.fullmatch(name) or name in (*columns, "repeat"):
            raise SpecError(
                f"parameters: {name!r} is no name for one, or that of a column; call it otherwise"
            )
        if len(set(map(str, values))) < len(values):
            raise SpecError(f"parameters: {name}: a value is listed twice")
    known = {*(f"{node}.address" for node in nodes), *parameters, "repeat"}
    for name, program in programs.items():
        if program.node not in nodes:
            raise SpecError(
                f"programs.{name}.node: there is no node {program.node!r}{did_you_mean(program.node, list(nodes))}"
            )
        ready = program.ready
        if name == CLIENT and ready is not None:
            raise SpecError(f"programs.{CLIENT}: is over when it ends; `ready` is for servers")
        if name != CLIENT and program.columns:
            raise SpecError(f"programs.{name}: columns are of what the client prints")
        texts = [*program.run, *program.env.values()]
        texts += [*(ready.run or []), *([ready.port] if ready.port else [])] if ready else []
        for word in (word for text in texts for word in _WORD.findall(text)):
            if word not in known:
                raise SpecError(
                    f"programs.{name}: {{{word}}} stands for nothing{did_you_mean(word, sorted(known))}"
                )
    for column in programs[CLIENT].columns:
        if (
            not _NAME.fullmatch(column)
            or (column in columns and column not in MEASURED)
            or column in parameters
        ):
            raise SpecError(
                f"programs.{CLIENT}.columns: {column!r} is no name for one, or taken; call it otherwise"
            )


def combinations(parameters: Parameters) -> Iterator[dict[str, Scalar]]:
    """Each combination of the parameters' values."""
    for values in itertools.product(*parameters.values()):
        yield dict(zip(parameters, values, strict=True))


def label(values: Mapping[str, Scalar], parameters: Parameters) -> str:
    """A combination as rows name it, by what is varied."""
    varied = [name for name in parameters if len(parameters[name]) > 1]
    return ",".join(f"{name}={_text(values[name])}" for name in varied)


def _text(value: Scalar) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def filled(words: Sequence[str], values: Mapping[str, Scalar]) -> list[str]:
    """A command's words with what stands in braces filled in."""
    return [
        _WORD.sub(lambda found: _text(values[found[1]]) if found[1] in values else found[0], word)
        for word in words
    ]


def last_object(printed: bytes) -> dict[str, Any] | None:
    """The JSON object on the last line that has one, or that all of it is; None where there is none."""
    text = printed.decode(errors="replace").strip()
    for candidate in (*reversed(text.splitlines()[-20:]), text):
        if candidate.lstrip().startswith("{"):
            try:
                value = json.loads(candidate)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                return value
    return None


def columns_of(value: Mapping[str, Any] | None, wanted: Mapping[str, str]) -> dict[str, Any]:
    """The columns of what a client printed: those that are `wanted`, or all numbers and words in it, names of those inside others
    joined by underscores. Raises SpecError where one that is wanted is not there.
    """
    if wanted:
        return {column: _at(value or {}, path) for column, path in wanted.items()}
    found = dict(itertools.islice(_flat(value or {}, ""), _MOST_COLUMNS))
    return {name: each for name, each in found.items() if _NAME.fullmatch(name)}


def _flat(value: Mapping[str, Any], before: str) -> Iterator[tuple[str, Any]]:
    for key, each in value.items():
        name = before + re.sub(r"\W", "_", str(key), flags=re.ASCII)
        if isinstance(each, Mapping):
            yield from _flat(each, f"{name}_")
        elif _is_column(each):
            yield name, each


def _is_column(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, bool | int) or (isinstance(value, str) and len(value) <= _LONGEST_TEXT)


def _at(value: Any, path: str) -> Any:
    for key in path.split("."):
        if isinstance(value, list) and key.isdigit() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, Mapping) and key in value:
            value = value[key]
        else:
            raise SpecError(f"the client's last line of JSON has no {path!r}")
    if not _is_column(value):
        raise SpecError(f"{path!r} of the client's JSON is no number or short text")
    return value
