"""What endpoints answer the orchestrator, and what of it can be: an answer that cannot becomes an error, never a row."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from testbed.errors import EndpointError
from testbed.experiment.results import STAGES

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]
Nats = Annotated[float, Meta(ge=-1e-3, le=1e6)]  #: finite; below 0 by rounding alone
Port = Annotated[int, Meta(ge=1, le=65535)]
Name = Annotated[str, Meta(max_length=512)]


class Loaded(TypedDict):
    """`load`, as far as the orchestrator relies on it."""

    kv_bytes_per_token: Count


class Computed(TypedDict):
    """`compute`."""

    tokens: Count
    seconds: Annotated[float, Meta(gt=0, le=1e7)]
    share: Annotated[float, Meta(ge=0, le=1)] | None


class Made(TypedDict):
    """`prepare`."""

    batch: Count
    prefix_text: str
    longest: Count
    examples: list[dict[str, Any]]


class Reference(TypedDict):
    """`reference`."""

    context_tokens: Count
    kv_bytes: Count
    answer: str
    nll: Nats
    distributions: bytes
    vocabulary: Count


class Served(TypedDict):
    """A trial: `split`, `cloud` or `edge`."""

    stages: dict[str, Seconds]
    e2e_s: Seconds
    reused: list[Name]
    replayed: bool
    answer: str
    answer_tokens: Count
    token_s: Seconds | None
    wire_bytes: Count
    retransmits: Count
    payload_bytes: Count
    shared_bytes: NotRequired[Count]
    congestion: Name
    request: NotRequired[Count]


class Outcome(TypedDict):
    """`outcome`."""

    tokens_kept: Count
    nll: Nats
    kl: NotRequired[Nats | None]
    payload_digest: Name
    kept_digest: Name


T = TypeVar("T")


def checked(kind: type[T], answer: Any, of: str) -> T:
    """`answer` as it is, where it is one of its kind. Raises EndpointError naming `of` whom, and the value's place.

    What an answer has besides is left to whoever reads it.
    """
    try:
        msgspec.convert(answer, kind)
    except msgspec.ValidationError as error:
        raise EndpointError(f"{of} gave an answer that cannot be: {error}") from error
    if kind is Served and (strange := set(answer["stages"]) - set(STAGES)):
        raise EndpointError(f"{of} gave an answer with unknown stages: {', '.join(sorted(strange))}")
    found: T = answer
    return found
