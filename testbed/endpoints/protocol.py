"""What the orchestrator and its endpoints say to each other: messages, and what each is answered with.

Both are structs whose types say what can be: an answer that cannot becomes an error, never a row. A copy of testbed on another
host may be of another version, so `Hello` comes first. What an older copy would misread makes `VERSION` one more; `Hello`,
`Greeting` and the channel's `Call` and `Result` stay as they are.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, get_args

from msgspec import Meta, Struct, structs

from testbed import __version__
from testbed.delivery.delivery import WHOLE
from testbed.errors import UsageError
from testbed.speed.times import DeviceTimes
from testbed.speed.words import HERE, Speed
from testbed.tasks.task import Example
from testbed.transport.secret import Secret

VERSION = 6

Count = Annotated[int, Meta(ge=0, le=1 << 48)]
Port = Annotated[int, Meta(ge=1, le=65535)]
Seconds = Annotated[float, Meta(ge=0, le=1e7)]  #: never NaN
Nats = Annotated[float, Meta(ge=-1e-3, le=1e6)]  #: finite; below 0 by rounding alone
Name = Annotated[str, Meta(max_length=512)]
#: What times, added up, may differ from the whole by.
ROUNDING_S = 1e-5

T = TypeVar("T")


class Message(Struct, Generic[T], forbid_unknown_fields=True, tag=str.lower):
    """Something that an endpoint is asked, and answers with a `T`."""

    @classmethod
    def answer(cls) -> Any:
        """The type of its answer."""
        return get_args(cls.__orig_bases__[0])[0]  # type: ignore[attr-defined]


class Part(Struct, forbid_unknown_fields=True):
    """What messages hold and are answered with: these fields, and no others."""


class Greeting(Struct):
    """Which protocol an endpoint speaks, and of which testbed it is."""

    version: int = VERSION
    testbed: str = __version__

    def check(self, who: str) -> None:
        """Raises UsageError where it is not the one spoken here."""
        if self.version != VERSION:
            raise UsageError(
                f"{who}: its testbed {self.testbed[:40]} speaks version {self.version} of the control protocol, this one "
                f"version {VERSION}: install testbed {__version__} there"
            )


class Hello(Message[Greeting]):
    """Comes before all others."""


class Loaded(Part):
    """The model, and what computes it. `kv_bytes_per_token`: in 16 bits; `tokenizer`: equal for tokenizers that are alike."""

    device: Name
    dtype: Name
    layers: Count
    kv_heads: Count
    head_dim: Count
    max_positions: Count
    kv_bytes_per_token: Count
    speed: Speed
    threads: Count
    tokenizer: Name


class Load(Message[Loaded]):
    """Load a model. speed: this side's from then on; times: of the device that it names."""

    model: str
    device: Name = "auto"
    dtype: Name = "auto"
    threads: Count | None = None
    speed: Speed = HERE
    times: DeviceTimes | None = None


class Computed(Part):
    """Seconds of a prefill of so many tokens; share: of the time it wanted a processor that it was given one, where known."""

    tokens: Count
    seconds: Annotated[float, Meta(gt=0, le=1e7)]
    share: Annotated[float, Meta(ge=0, le=1)] | None


class Compute(Message[Computed]):
    """Compute a fixed piece of work, before anything is stretched."""


class Learn(Message[Name]):
    """Prefill a task's prefix once; answered with the digest by which requests name it.

    closing: what the layout has behind each question, sent as little as the prefix. reach: tokens of the longest prompt that
    will begin with it.
    """

    text: str
    reach: Count | None = None
    closing: str = ""


class PreparedExample(Part):
    """An example without its context, which stays at the edge, and its answer as the model should write it."""

    example: Example
    gold: str


class Prepared(Part):
    """A task's examples, as the edge's batch of that number. longest: tokens of the longest context."""

    batch: Count
    prefix: Learn
    longest: Count
    examples: tuple[PreparedExample, ...]


class Prepare(Message[Prepared]):
    """Make a task's examples. codecs: canonical texts of those that will be asked for."""

    task: str
    parameters: dict[str, Any] = {}
    count: Count = 1
    context_tokens: Count | None = None
    seed: int = 0
    codecs: tuple[str, ...] = ()
    max_new_tokens: Count | None = None
    prompt: str = "plain:2"


class Serve(Message[Port]):
    """Listen by one transport (its canonical text), and answer requests from now on; asked again, by one more.

    max_payload: bounds what a request may make the cloud allocate, in bytes; request_s: what its bytes may take to come;
    address: where it listens, and nowhere else; left out: at all of its host's. secret: what the cloud has of it, where strangers
    are served nothing.
    """

    max_payload: Count
    congestion: Name | None = None
    request_s: Seconds = 120.0
    transport: Name = "tcp"
    address: Name = "0.0.0.0"
    secret: Secret | None = None


class Forget(Message[None]):
    """Drop the answers that a client had: a new example begins, and none of them can come again."""

    client: Name = ""


class FullCache(Part):
    """An example's answer, and next-token distributions along the gold answer (see `models.scores`), with the full cache. A shape
    has no likelihood: no `nll`, and no distributions."""

    context_tokens: Count
    kv_bytes: Count
    answer: str
    nll: Nats | None
    distributions: bytes
    vocabulary: Count


class Reference(Message[FullCache]):
    """Answer an example on the edge alone. Makes it the example at hand."""

    batch: Count
    example: Count


class Asked(Part):
    """An example as a model is asked it. prefix: by its digest; gold: its answer."""

    prefix: Name
    context: str
    question: str
    gold: str
    stop: str
    choices: tuple[str, ...]
    max_new_tokens: Count


class Show(Message[Asked]):
    """Tell an example's texts, for the cloud to `Read`."""

    batch: Count
    example: Count


class Read(Message[FullCache]):
    """Answer an example on the cloud alone, with its own model, and keep the distributions to compare a client's outcomes with.
    They stay there: the answer has none."""

    asked: Asked
    client: Name = ""


class Compare(Message[None]):
    """Keep these distributions to compare a client's outcomes with."""

    distributions: bytes
    vocabulary: Count
    client: Name = ""


class Link(Part):
    """Where the cloud is, and how it is asked. name: of the conditions, by which a connection that is kept is found again.
    transport: canonical text; congestion: the control that it uses where it names none. apart: the cloud's clock is another.
    secret: what the edge has of it, where the data path is closed. lingers: a connection that is not kept is closed only when
    that is asked for (`HangUp`).
    """

    address: Name
    port: Port
    name: str = ""
    transport: Name = "tcp"
    congestion: Name | None = None
    timeout: Seconds = 120.0
    client: Name = ""
    apart: bool = False
    secret: Secret | None = None
    lingers: bool = False


EDGE, LINK, CLOUD = "edge", "link", "cloud"


class Span(NamedTuple):
    """A stage at work on a chunk, from one moment to another. side: where (`EDGE`, `LINK`, `CLOUD`); level: of the chunk, of so
    many bytes, where it crosses; where a text that is met half-way is prefilled, so many tokens of it.
    """

    stage: Name
    start: Seconds
    end: Seconds
    chunk: int = 0
    side: Name = EDGE
    level: str = ""
    bytes: int = 0


class Stages(Part):
    """A request's stages in the order in which they happen, seconds; 0: a placement does not have it."""

    edge_queue_s: Seconds = 0.0
    prefill_s: Seconds = 0.0
    select_s: Seconds = 0.0
    encode_s: Seconds = 0.0
    link_queue_s: Seconds = 0.0
    connect_s: Seconds = 0.0
    transmit_s: Seconds = 0.0
    queue_s: Seconds = 0.0
    decode_s: Seconds = 0.0
    first_token_s: Seconds = 0.0
    generate_s: Seconds = 0.0

    def total(self) -> float:
        """Their sum."""
        return float(sum(structs.astuple(self)))


class TrialResult(Part):
    """What a trial came to at the edge; what its answer is worth, an `Outcome` says."""

    stages: Stages
    e2e_s: Seconds  #: their sum
    spans: tuple[Span, ...]  #: from the request's start on
    reused: tuple[Name, ...]  #: stages taken from an earlier trial
    replayed: bool  #: and waited for
    answer: str
    answer_tokens: Count
    token_s: Seconds | None
    wire_bytes: Count = 0
    retransmits: Count = 0
    congestion: Name = ""
    payload_bytes: Count = 0
    shared_bytes: Count = 0
    question_s: Seconds | None = None
    request: Count = 0  #: the cloud's `Examine` names it by this
    chunks: Count | None = None  #: of a delivery in parts
    levels: str = ""  #: as what they were sent
    tokens_left_out: Count | None = None
    deadline_s: Seconds | None = None  #: of the first token
    met: bool | None = None
    store_prefill_s: Seconds = 0.0  #: making what was stored
    store_encode_s: Seconds = 0.0
    planes: Count | None = None  #: that the answer was given from
    changed: bool | None = None  #: whether all planes give another one, `verified_answer`
    saved_s: float | None = None
    verified_s: Seconds | None = None
    verified_answer: str = ""
    later: tuple[Span, ...] = ()  #: spans behind the answer
    unverified: str = ""  #: why nothing is known of these
    clock_offset_s: float = (
        0.0  #: by which the cloud's clock was ahead of the edge's, on which all of these times are
    )
    clock_error_s: Seconds = 0.0  #: how far that may be off

    def __post_init__(self) -> None:
        if abs(self.stages.total() - self.e2e_s) > ROUNDING_S:
            raise ValueError(
                f"the stages sum to {self.stages.total():.6f} s, and `e2e_s` is {self.e2e_s:.6f} s"
            )


class TrialRequest(Message[TrialResult], tag="trial"):
    """Make a trial of an example of a batch. codec: its canonical text, where a placement has one; of `scout` its selector.
    delivery: of what crosses, its canonical text. link: all but `edge`. rate: the link's, for who may know it: (monotonic
    seconds, bits per second from then on; None: not limited)."""

    placement: Literal["split", "store", "cloud", "scout", "edge"]
    batch: Count
    example: Count
    repeat: Count = 0
    reuse: Literal["all", "prefill", "none"] = "all"
    replay: bool = False
    codec: str = ""
    delivery: str = WHOLE
    link: Link | None = None
    rate: tuple[tuple[float, float | None], ...] = ()


class Cost(Part):
    """What a connection cost from its request on, its end included: see `TrialResult`."""

    wire_bytes: Count
    retransmits: Count


class HangUp(Message[Cost]):
    """Close the latest trial's connection, which `lingers`."""


class Stock(Message[None]):
    """Make what this trial, of placement `store`, will find stored: before its link's trace begins. It keeps what it reuses."""

    trial: TrialRequest


class Outcome(Part):
    """What the cache behind an answer says of the gold one: nothing where it is a shape's. kl: from the full cache's
    distributions, where there are any."""

    tokens_kept: Count
    nll: Nats | None
    kl: Nats | None = None
    payload_digest: Name = ""
    kept_digest: Name = ""
    choice_overlap: Annotated[float, Meta(ge=0, le=1)] | None = (
        None  #: of a scout's choice and this side's own
    )


class Examine(Message[Outcome]):
    """Say what became of a client's request, whose clock has stopped. selector: of a `scout`'s, the codec by which it chose."""

    request: Count
    gold: str
    client: Name = ""
    selector: Name = ""


class Parts(Part):
    """How a ware is made part by part, each of which is sent as soon as it is: (tokens prefilled, seconds that took since those
    before) in turn, nothing where it is stored; seconds of encoding each chunk. whole: what is sent of a part is chosen by the
    whole context; asks: and by the question, so that it is encoded within the request wherever the prefill lies. choices: levels
    of which each chunk is sent at one, stored all, one level's chunks behind the other's; none: all are `level`."""

    tokens: Count
    layers: Count
    level: Name
    prefill: tuple[tuple[Count, Seconds], ...]
    encode_s: tuple[Seconds, ...]
    whole: bool = False
    asks: bool = False
    choices: tuple[Name, ...] = ()


class Passes(Part):
    """What a pass takes that makes a token for each of several requests: (their number, seconds). alike: each of them was
    answered as it is alone."""

    seconds: tuple[tuple[Count, Seconds], ...]
    alike: bool


class Together(Message[Passes]):
    """Decode a client's latest request over and over in passes of 1, 2, 4, … and `most` of its like."""

    request: Count
    most: Count
    client: Name = ""


class Ware(Part):
    """A request that was made beforehand: what is sent, and what making it took. path: of the file that has the chunks of its
    context, one behind the other, of such lengths.
    """

    placement: Name
    path: str
    lengths: tuple[Count, ...]
    prefix: Name
    question: str
    stop: Name
    max_new_tokens: Count
    choices: tuple[str, ...] = ()
    codec: Name = ""
    delivery: Name = WHOLE
    prefill_s: Seconds = 0.0
    select_s: Seconds = 0.0
    encode_s: Seconds = 0.0
    parts: Parts | None = None

    @property
    def payload_bytes(self) -> int:
        """All of its chunks."""
        return sum(self.lengths)


class Keep(Message[Ware]):
    """Write what a trial that was made has sent to a file of that path, so that it can be sent again by who has no model."""

    trial: TrialRequest
    path: str


class Replayed(Part):
    """How a request of a ware is answered: what that takes, in seconds, and what is said. stage: what is done with what came;
    token_s: of each token behind the first; held: tokens before these; memory: bytes of its cache in 16 bits; parts_s: of each
    chunk that is rebuilt as it comes, `rebuild_s` being what is left then; passes: see `Passes`; model: a word for what computes
    it, of which alone a pass may make tokens for several; reads_s: of reading the question through each chunk but the last, where
    that is done as they come, `first_s` being what is left then; levels_s: where a chunk comes at one of several levels,
    `parts_s` of each level that a request of it names."""

    stage: Literal["decode", "prefill"]
    rebuild_s: Seconds
    first_s: Seconds
    token_s: tuple[Seconds, ...]
    held: Count
    memory: Count
    text: str
    tokens: Count
    first_token: Count = 0
    parts_s: tuple[Seconds, ...] = ()
    passes: tuple[tuple[Count, Seconds], ...] = ()
    model: str = ""
    reads_s: tuple[Seconds, ...] = ()
    levels_s: tuple[tuple[Seconds, ...], ...] = ()
