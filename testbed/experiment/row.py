"""A trial's row: its columns, and what they are where stages came one after the other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from testbed.endpoints.protocol import Outcome, Stages, TrialResult
from testbed.endpoints.spans import bound, busy, hidden

#: The stages of a request in the order in which they happen; their sum is `e2e_s`.
STAGES = Stages.__struct_fields__
#: The whole time that each of them was at work, which stages that overlap hide of one another included.
BUSY = tuple(f"busy_{stage}" for stage in STAGES)


@dataclass
class Row:
    """One trial. Seconds, bytes, bits per second, fractions. A stage that a placement does not have is 0; what a trial
    measures (`MEASURED`) is None where it failed.
    """

    trial: str  #: identity of this trial within the run: the same settings, example and repeat give the same value
    cell: str  #: identity of the settings; stable across runs
    repeat: int
    started_at: str  #: UTC, ISO 8601

    model: str
    task: str
    example: str
    context_tokens: int
    placement: str  #: split, store, cloud, scout or edge
    codec: str  #: canonical text; empty where no KV cache crosses the link
    delivery: str  #: how the payload crosses, canonical text
    profile: str  #: name of the link's conditions
    link: str
    emulator: str
    transport: str  #: what moved the payload, canonical text; empty where nothing crosses the link
    congestion: str

    rate_up_bps: float | None = None  #: None: unlimited
    rate_down_bps: float | None = None
    delay_up_s: float = 0.0
    delay_down_s: float = 0.0
    loss_up: float = 0.0
    loss_down: float = 0.0
    #: how far the profile's traces had come when the trial began; None: nothing changes
    trace_s: float | None = None

    #: the request comes up -> the edge is free for it: it serves one at a time; 0 where nobody else asks
    edge_queue_s: float | None = None
    prefill_s: float | None = None
    select_s: float | None = None
    encode_s: float | None = None
    link_queue_s: float | None = None  #: ready to be sent -> the edge's link is free for it
    #: opening the request's connection, until its first byte is handed over; 0 when one is reused
    connect_s: float | None = None
    transmit_s: float | None = None  #: first byte handed to the socket -> last byte received, on one clock
    #: last byte received -> this request's turn: the cloud answers one at a time
    queue_s: float | None = None
    decode_s: float | None = None
    first_token_s: float | None = None  #: cache rebuilt -> first token back at the edge
    generate_s: float | None = None  #: first -> last token, as they arrive at the edge
    ttft_s: float | None = None
    e2e_s: float | None = None
    #: mean time of a token behind the first, where it is computed; None: there is none
    token_s: float | None = None
    reused: str = ""  #: comma-separated stages taken from an identical earlier trial
    replayed: bool = False  #: those were waited for in real time; False: but for what no link could show

    #: of select_s, the question's pass behind the context: part of the prefill where an edge reads both at once
    question_s: float | None = None

    busy_edge_queue_s: float | None = None
    busy_prefill_s: float | None = None  #: of each stage the whole time at work (see `BUSY`)
    busy_select_s: float | None = None
    busy_encode_s: float | None = None
    busy_link_queue_s: float | None = None
    busy_connect_s: float | None = None
    busy_transmit_s: float | None = None
    busy_queue_s: float | None = None
    busy_decode_s: float | None = None
    busy_first_token_s: float | None = None
    busy_generate_s: float | None = None
    overlap_s: float | None = None  #: what of them the pipeline hid behind later stages
    #: makespan of the same chunks' stage times where edge, link and cloud each do one thing at a time and never wait in vain
    bound_s: float | None = None
    naive_s: float | None = (
        None  #: payload over the link's mean rate: the formula for `connect_s` and `transmit_s`
    )

    kv_bytes: int = 0
    payload_bytes: int | None = None
    shared_bytes: int = 0  #: what both sides must have had beforehand to read the payload: a coder's tables
    #: of the request's connection, both ways, headers of packets and what was sent again included
    wire_bytes: int | None = None
    retransmits: int | None = None
    tokens_kept: int | None = None
    answer_tokens: int | None = None  #: of the answer, without the end token; of a choice, those of its text
    bits_per_element: float | None = None
    chunks: int | None = None  #: that crossed
    levels: str = (
        ""  #: theirs, in the order sent, run by run: "int8*3,text,skip*2"; empty: all are the codec's
    )
    deadline_s: float | None = None  #: of the first token, from the request's start
    met: bool | None = None  #: it was there by then
    tokens_left_out: int | None = None  #: of the context, since they were skipped or did not come in time
    #: store: what its making took before the request, and how many questions share that
    questions_per_context: int = 1
    store_prefill_s: float | None = None
    store_encode_s: float | None = None
    amortized_s: float | None = None  #: `e2e_s` and this question's share of the making
    edge_model: str = ""  #: the edge's, where that is another than `model`, the cloud's
    choice_overlap: float | None = (
        None  #: of what it chose, the share that the cloud's own model would have chosen
    )
    #: progressive: bit planes that the answer was made from, whether the rest would have changed it, and what that saved and cost
    planes: int | None = None
    changed: bool | None = None
    saved_s: float | None = None
    verified_s: float | None = None
    verified_answer: str = ""  #: from all planes, and its score
    verified_score: float | None = None
    #: the edge's passes over many tokens, and its coding, were stretched by this factor; 1: as this host computes
    edge_slowdown: float = 1.0
    cloud_slowdown: float = 1.0
    edge_decode_slowdown: float | None = 1.0  #: and its generated tokens; None: it cannot generate any
    cloud_decode_slowdown: float | None = 1.0
    #: whose measured times were waited for, by its profile's name; empty: computed here
    edge_device: str = ""
    cloud_device: str = ""
    #: by which the cloud's clock was ahead of the edge's, on which all times of a row are, and how far that may be off
    clock_offset_s: float = 0.0
    clock_error_s: float = 0.0

    load: str = "sequential"  #: who asks when, canonical text
    serving: str = "fifo"  #: in which order the cloud answers, canonical text
    allocate: str = ""  #: how cells were shared out, canonical text; empty: as the topology says
    client: str = ""  #: who asked: an edge, or one of its clients
    arrived_at: float | None = None  #: when the request came up, seconds behind the load's start
    warmup: bool = False  #: in the first part of a load, which no figure counts
    refused: bool = False  #: the cloud had no room for it
    handover: str = (
        ""  #: links from and to which its edge went over meanwhile: "radio-a > radio-b"; several with commas
    )

    answer: str = ""
    score: float | None = None
    em: float | None = None
    f1: float | None = None
    reference_answer: str = ""
    reference_score: float | None = None
    nll: float | None = None
    reference_nll: float | None = None
    kl: float | None = None  #: mean KL divergence from the full cache's next-token distributions, nats
    payload_digest: str = ""  #: BLAKE2b of the payload: equal digests, equal bytes
    kept_digest: str = ""  #: BLAKE2b of the kept positions of every layer and head
    calibrated: bool = True  #: False: the link was measured out of tolerance and the run was told to go on
    #: False: this machine computed unsteadily, or unlike for both sides, when it was measured before the trial; as it is read,
    #: also when it was measured behind it (`RunDirectory.rows`)
    compute_steady: bool = True
    #: the machine (of two, the edge's and the cloud's), and its processor; empty: unknown
    host: str = ""
    cpu: str = ""
    #: of the edge's compute: a prefill in more may differ in its last bits, and what is made of it
    threads: int | None = None
    warnings: str = ""
    error: str = ""

    def fill(self, result: TrialResult, outcome: Outcome, scores: dict[str, float]) -> None:
        """Put in what the endpoints measured, and the answer's scores: their fields are called as the columns are."""
        measured = {
            **scores,
            **structs.asdict(result),
            **structs.asdict(result.stages),
            **structs.asdict(outcome),
        }
        for column in measured.keys() & set(COLUMNS):
            setattr(self, column, measured[column])
        self.answer, self.reused = result.answer.strip(), ",".join(result.reused)
        self.verified_answer = result.verified_answer.strip()
        self.ttft_s = result.e2e_s - result.stages.generate_s
        sent = result.payload_bytes if self.placement in SENDING else 0
        self.bits_per_element = sent * 8 / (self.kv_bytes / 2) if self.kv_bytes else 0.0
        for stage, seconds in structs.asdict(busy(result.spans)).items():
            setattr(self, f"busy_{stage}", seconds)
        self.overlap_s, self.bound_s = hidden(result.spans), bound(result.spans, self.delay_up_s)
        stored_s = result.store_prefill_s + result.store_encode_s
        self.amortized_s = result.e2e_s + stored_s / self.questions_per_context
        for column, value in in_turn(dataclasses.asdict(self)).items():
            if getattr(self, column) is None:
                setattr(self, column, value)
        self._leave_out_what_clocks_hide()

    def leave_out_times(self) -> None:
        """Without a link and another process there are none that would be a setting's."""
        for column in TIMES:
            setattr(self, column, None)
        self.reused, self.replayed, self.transport, self.congestion = "", False, "", ""

    def _leave_out_what_clocks_hide(self) -> None:
        """What lies between two clocks, and is told no better than to 5 % of it, is not told."""
        hidden_stages = []
        for stage in BETWEEN:
            value = getattr(self, stage)
            if value is not None and self.clock_error_s > _TOLD_WITHIN * value and value > 0:
                hidden_stages.append(stage)
                setattr(self, stage, None)
                setattr(self, f"busy_{stage}", None)
        if hidden_stages:
            self.overlap_s = None
            off = f"{1e3 * self.clock_error_s:.3g} ms"
            why = f"not told, as both sides' clocks are known to {off} only: {', '.join(hidden_stages)}"
            self.warnings = "; ".join(filter(None, [self.warnings, why]))


#: Stages that begin by one side's clock and end by the other's, and how much of one its error may be.
BETWEEN, _TOLD_WITHIN = ("transmit_s", "first_token_s"), 0.05
#: Placements of which a KV cache crosses the link.
SENDING = ("split", "store")

COLUMNS = tuple(f.name for f in dataclasses.fields(Row))
#: Seconds that a trial measures.
TIMES = (
    *STAGES,
    *BUSY,
    "ttft_s",
    "e2e_s",
    "token_s",
    "question_s",
    "overlap_s",
    "bound_s",
    "naive_s",
    "store_prefill_s",
    "store_encode_s",
    "amortized_s",
)
#: What a trial is made for: times, counts, scores.
MEASURED = (
    *STAGES,
    "ttft_s",
    "e2e_s",
    "token_s",
    "payload_bytes",
    "wire_bytes",
    "retransmits",
    "tokens_kept",
    "answer_tokens",
    "bits_per_element",
    *BUSY,
    "overlap_s",
    "bound_s",
    "naive_s",
    "chunks",
    "met",
    "tokens_left_out",
    "store_prefill_s",
    "store_encode_s",
    "amortized_s",
    "choice_overlap",
    "planes",
    "changed",
    "saved_s",
    "verified_s",
    "verified_score",
    "score",
    "em",
    "f1",
    "nll",
    "kl",
)


def naive(payload_bytes: Any, rate_bps: Any) -> float | None:
    """Seconds that so many bytes take by bytes over rate; None where there is no rate, or what is read is no number."""
    try:
        return 0.0 if payload_bytes == 0 else payload_bytes * 8 / rate_bps
    except (TypeError, ZeroDivisionError, OverflowError):
        return None


def in_turn(row: dict[str, Any]) -> dict[str, Any]:
    """What a row's columns of the pipeline are where its stages came one after the other and what crossed did so at once."""
    payload, whole = row.get("payload_bytes"), row.get("e2e_s")
    return {
        **{busy: row.get(stage) for busy, stage in zip(BUSY, STAGES, strict=True)},
        "overlap_s": 0.0,
        "bound_s": whole,
        "naive_s": naive(payload, row.get("rate_up_bps")),
        "chunks": 1 if payload else 0,
        "tokens_left_out": 0,
        "amortized_s": whole,
    }
