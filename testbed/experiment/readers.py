"""How the values of a scenario's file are read: each before it is checked, to what the scenario holds.

All raise SpecError, or ValueError, where a value is none of its kind.
"""

from __future__ import annotations

from typing import Any

from testbed import strict_yaml
from testbed.codecs.spec import CodecSpec
from testbed.codecs.spec import parse as parse_codec
from testbed.delivery.delivery import Delivery
from testbed.delivery.delivery import parse as parse_delivery
from testbed.errors import SpecError
from testbed.load.load import Load
from testbed.load.load import parse as parse_load
from testbed.net.traffic.traffic import Flow
from testbed.serving.serving import Serving
from testbed.serving.serving import parse as parse_serving
from testbed.tasks.prompt import parse_prompt
from testbed.transport.transport import Transport
from testbed.transport.transport import parse as parse_transport
from testbed.units import parse_time

#: Of a task's mapping: how many of its examples. The rest are the task's own parameters.
EXAMPLES = "examples"
MOST_EXAMPLES = 100_000


def listed(value: Any) -> Any:
    """A list, of one thing where it is no list."""
    return value if isinstance(value, list) else [value]


def _unsplit(text: str, what: str, example: str) -> str:
    """The text, which YAML has not split. Raises SpecError where it has."""
    if text.count("(") > text.count(")"):
        raise SpecError(
            f"{what} {text[:80]!r}: ends within its parentheses; in brackets, YAML splits at commas: "
            f'quote it, as ["{example}"]'
        )
    return text


def codec(value: Any) -> CodecSpec:
    """A codec."""
    return parse_codec(_unsplit(str(value), "codec", "q2c@0.25(pool=1, scope=global)+int8"))


def delivery(value: Any) -> Delivery:
    """A delivery."""
    return parse_delivery(_unsplit(str(value), "delivery", "stream(by=layers, chunk=8)"))


def load(value: Any) -> Load:
    """A load."""
    return parse_load(_unsplit(str(value), "load", "closed(clients=8, think=1s)"))


def serving(value: Any) -> Serving:
    """In which order the cloud answers."""
    return parse_serving(_unsplit(str(value), "serving", "batch(max=8, memory=40gb)"))


def transport(value: Any) -> Transport:
    """A transport."""
    return parse_transport(_unsplit(str(value), "transport", "datagram(fec=0.05, connections=4)"))


def seconds(value: Any) -> float:
    """A time, in seconds."""
    return parse_time(value)


def task(value: Any) -> dict[str, Any]:
    """A task's name and parameters."""
    if isinstance(value, str):
        return {"task": value}
    if not isinstance(value, dict) or not isinstance(value.get("task"), str):
        raise ValueError("write a task's name, or a mapping with `task: NAME` and its parameters")
    examples = value.get(EXAMPLES, 1)
    if not isinstance(examples, int) or isinstance(examples, bool) or not 1 <= examples <= MOST_EXAMPLES:
        raise ValueError(f"`examples` of a task: write a whole number from 1 to {MOST_EXAMPLES}")
    return value


def flow(value: Any) -> dict[str, Any]:
    """A flow of background traffic, as it was written."""
    strict_yaml.checked(Flow, value)
    return dict(value)


def prompt(value: Any) -> str:
    """How tasks' texts are laid out, canonical text."""
    return str(parse_prompt(str(value)) or "auto")
