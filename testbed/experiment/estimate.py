"""What a plan will cost, before anything runs: bytes from the codec's bit budget, seconds from the link and rough compute speeds.

The bytes are close (a few per cent: headers and scales are counted, entropy coders are not guessed at). The seconds are
a forecast for people:
compute speeds depend on the machine and are only assumed here, from the model's size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from testbed.codecs.layout import expected_bytes
from testbed.endpoints.tokens import token_bytes
from testbed.errors import UsageError
from testbed.experiment.machines import Machine
from testbed.experiment.scenario import Cell, Plan
from testbed.models.shapes import find_shape, is_shape
from testbed.models.sources import resolve

_TEXT_BYTES_PER_TOKEN = 4.5
_MSS_BYTES = 1448
_INITIAL_WINDOW = 10  #: segments, RFC 6928
QUESTION_TOKENS, ANSWER_TOKENS = 24, 8


@dataclass(frozen=True)
class Dimensions:
    """What of a model decides the size of its cache, and of a text as numbers."""

    layers: int
    kv_heads: int
    head_dim: int
    value_dim: int
    parameters: float
    vocabulary: int


def dimensions(model: str) -> Dimensions | None:
    """From the model's ``config.json``, without loading it; None where it is not at hand. Raises UsageError."""
    if is_shape(model):
        shape = find_shape(model)
        cache = (shape.layers, shape.kv_heads, shape.head_dim, shape.value_dim)
        return Dimensions(*cache, shape.parameters, shape.vocabulary)
    source = resolve(model)
    path = Path(source.path) / "config.json" if source.path is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return _described(json.loads(path.read_text(encoding="utf-8")))
    except (
        OSError,
        ValueError,
        RecursionError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
    ) as error:
        raise UsageError(
            f"{path}: not the configuration of a language model ({type(error).__name__}: {error})"
        ) from error


def _described(config: dict[str, Any]) -> Dimensions:
    config = config.get("text_config", config)
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    layers = config["num_hidden_layers"]
    head_dim = config.get("head_dim") or hidden // heads
    parameters = layers * hidden * (4 * hidden + 3 * config.get("intermediate_size", 4 * hidden))
    vocabulary = config.get("vocab_size", 32000)
    parameters += vocabulary * hidden
    kv_heads = config.get("num_key_value_heads") or heads
    return Dimensions(layers, kv_heads, head_dim, head_dim, parameters, vocabulary)


def transfer_s(payload: float, rate: float, rtt: float) -> float:
    """Seconds of so many bytes on a new TCP connection at a rate in bits per second: one round trip for the handshake, those that
    slow start spends to fill the link, serialisation, and one for what comes back.
    """
    window, sent, rounds = _INITIAL_WINDOW * _MSS_BYTES, 0.0, 0
    while rtt > 0 and sent + window < payload and window * 8 / rtt < rate:
        sent, window, rounds = sent + window, window * 2, rounds + 1
    serial_s = (payload - sent) * 8 / (rate * _MSS_BYTES / 1500)
    return rounds * rtt + serial_s + 2 * rtt


class Estimator:
    """Bytes and seconds of a plan's cells."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    @cached_property
    def model(self) -> Dimensions | None:
        """The cloud's. None where the model's configuration is not at hand."""
        return dimensions(self.plan.scenario.models.cloud)

    @cached_property
    def edge_model(self) -> Dimensions | None:
        """The edge's, which is the cloud's where both have one."""
        return self.model if self.plan.scenario.one_model else dimensions(self.plan.scenario.models.edge)

    def payload_bytes(self, cell: Cell) -> float:
        """What a request of this cell sends up, headers aside."""
        tokens = cell.context_tokens or 512
        if cell.placement == "edge":
            return 0.0
        if cell.placement == "scout":  # a number a token, and a bit
            return tokens * (token_bytes(self.model.vocabulary if self.model else 0) + 1 / 8)
        if cell.codec is None or self.model is None:
            return tokens * _TEXT_BYTES_PER_TOKEN
        layers = [(self.model.kv_heads, self.model.head_dim, self.model.value_dim, None)] * self.model.layers
        return float(expected_bytes(cell.codec, layers, tokens))

    def transmit_s(self, cell: Cell) -> float:
        """Serialisation at the (mean) rate, one round trip for the handshake, and those that slow start spends to fill the link;
        at most the request's timeout, which ends it."""
        steady = cell.profile.steady()
        up, down = steady.up, steady.down
        payload = self.payload_bytes(cell)
        if not payload or self.plan.scenario.placement_free:
            return 0.0
        mean, timeout = cell.profile.up.mean_rate_bps("up"), self.plan.scenario.timeout
        rate = 1e10 if mean is None else mean
        if rate * timeout < 8 * payload:
            return timeout
        return min(timeout, transfer_s(payload, rate, up.delay_s + down.delay_s))

    def compute_s(self, cell: Cell) -> float:
        """A trial's own compute, and its waits for what it takes over of an earlier one.

        An example's prefill is shared by its trials, on the edge without a wait unless the plan replays it.
        """
        if self.model is None or self.edge_model is None:
            return 0.5
        scenario, across = self.plan.scenario, cell.placement != "edge"
        edge = Machine.of(self.plan, "edge", self.edge_model.parameters)
        cloud = Machine.of(self.plan, "cloud", self.model.parameters)
        here, tokens = cloud if across else edge, cell.context_tokens or 512
        generating = here.generating_s(scenario.max_new_tokens or ANSWER_TOKENS, tokens)
        in_full = here.pass_s(QUESTION_TOKENS, tokens) + generating
        in_full += cloud.pass_s(tokens) if cell.placement in ("cloud", "scout") else 0.0
        replays = self.plan.replays(cell)
        if cell.placement != "cloud" and (replays or scenario.reuse == "none"):
            in_full += edge.pass_s(tokens)
        if replays or scenario.reuse != "all":
            return in_full
        shared = len(self.plan.profiles) * len(scenario.transport)
        # What is computed once is waited for on the other links up to the first token's acknowledgement.
        repeated = in_full - generating if across else 0.0
        return (in_full + repeated * (shared - 1)) / shared

    def seconds(self, cell: Cell) -> float:
        """One trial of this cell."""
        return self.transmit_s(cell) + self.compute_s(cell) + 0.05

    @property
    def lasts_s(self) -> float:
        """A load, what it takes to begin it included."""
        return self.plan.scenario.warmup + self.plan.scenario.duration + 2.0

    def summary(self) -> list[dict[str, Any]]:
        """One entry a cell: what it is, its payload and its time."""
        return [
            {
                "task": self.plan.scenario.tasks[cell.task]["task"],
                "context_tokens": cell.context_tokens,
                "placement": cell.placement,
                "codec": cell.codec_text,
                "delivery": str(cell.delivery),
                "transport": str(cell.transport),
                "profile": cell.profile.name,
                "payload_bytes": round(self.payload_bytes(cell)),
                "transmit_s": None if cell.profile.measured else self.transmit_s(cell),
                "load": str(cell.load),
                "serving": str(cell.serving),
                "allocate": str(cell.allocate or ""),
                "trial_s": self.lasts_s if cell.load.timed else self.seconds(cell),
                "trials": self.plan.scenario.repeats
                * (1 if cell.load.timed else self.plan.scenario.examples_of(cell.task)),
            }
            for batch in self.plan.batches()
            for cell in self.plan.cells(*batch)
        ]
