"""What a scenario says of each endpoint: its model, its device and number format, and how fast it computes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, InstanceOf, PlainSerializer

from testbed.models import devices
from testbed.speed.words import HERE, Speed
from testbed.speed.words import parse as parse_speed


@dataclass(frozen=True)
class Models:
    """The model of each endpoint."""

    edge: str
    cloud: str


def model_from(value: Any) -> str | Models:
    """What a scenario writes: one name for both sides, or each side's. Raises ValueError."""
    if isinstance(value, Mapping) and set(value) == {"edge", "cloud"}:
        value = Models(**value) if value["edge"] != value["cloud"] else value["edge"]
    for name in (value.edge, value.cloud) if isinstance(value, Models) else (value,):
        if not isinstance(name, str) or not name:
            raise ValueError("write a model's name, or one for each side: {edge: MODEL, cloud: MODEL}")
    return value


def written(model: str | Models) -> Any:
    """As a scenario writes it."""
    return model if isinstance(model, str) else asdict(model)


class Sides(BaseModel):
    """A setting for each endpoint."""

    model_config = ConfigDict(extra="forbid")
    edge: str = "auto"
    cloud: str = "auto"


def known_devices(sides: Sides) -> Sides:
    """The same, if they are words for devices. Raises SpecError."""
    for word in (sides.edge, sides.cloud):
        devices.check(word)
    return sides


def sides_from(value: Any) -> Any:
    """One word is both sides'."""
    return {"edge": value, "cloud": value} if isinstance(value, str) else value


_Speed = Annotated[
    InstanceOf[Speed], BeforeValidator(parse_speed), PlainSerializer(Speed.written, when_used="json")
]


class Compute(BaseModel):
    """How each endpoint computes: so many times slower than this host, or as a device that was measured."""

    model_config = ConfigDict(extra="forbid")
    edge: _Speed = HERE
    cloud: _Speed = HERE
