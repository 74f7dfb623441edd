"""Writes a run whose requests are pipelines: stores, streams, adaptive senders over links that hold and one that changes.

Nothing here is a measurement. A request's chunks go through edge, link and cloud, each doing one thing at a time; the link
sends as its rate says. Stages are billed by the project's own rule.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from testbed.endpoints.protocol import CLOUD, EDGE, LINK, Span
from testbed.endpoints.spans import billed, bound, busy, hidden
from testbed.experiment.results import FORMAT
from testbed.experiment.row import STAGES, Row, naive
from testbed.net.profile.profile import parse_profile
from tests.analysis.make_run import rewrite

LEVELS = ("int8", "int4", "q2c@0.25+int4", "text", "skip")
ADAPTIVE = f"adaptive(levels=[{', '.join(LEVELS)}], deadline=1500ms, policy={{}})"
#: (placement, codec, delivery)
SETTINGS = (
    ("cloud", "", "whole"),
    ("edge", "", "whole"),
    ("split", "int4", "whole"),
    ("store", "fp16", "whole"),
    ("store", "int8", "whole"),
    ("store", "int4", "whole"),
    ("store", "q2c@0.25+int4", "whole"),
    ("split", "int4", "stream(by=tokens)"),
    ("store", "int4", "stream(by=tokens)"),
    ("store", "int4", "meet"),
)
ADAPTING = (
    ("cloud", "", "whole"),
    *(
        ("store", "", ADAPTIVE.format(policy))
        for policy in ("oracle", "ewma(alpha=0.5)", "mpc(horizon=4)", "fixed", "fixed(level=1)")
    ),
    ("store", "int8", "stream(by=tokens)"),
)
RATES = (
    "rate=5mbit,delay=25ms",
    "rate=12mbit,delay=25ms",
    "rate=30mbit,delay=25ms",
    "rate=100mbit,delay=25ms",
)
CHANGING = "trace=step:24mbit*500ms+4mbit*500ms,delay=25ms"
#: codec -> share of the fp16 cache's bytes, how often an answer is right
SHARES = {
    "fp16": (1.0, 0.8),
    "int8": (0.53, 0.8),
    "int4": (0.28, 0.79),
    "q2c@0.25+int4": (0.072, 0.6),
    "text": (0.0001, 0.8),
    "skip": (0.0, 0.2),
}
TOKENS, KV_BYTES, TEXT_BYTES, BLOCK = 1024, 12_000_000, 4000, 256
EDGE_S, CLOUD_S = 2.4, 0.6  #: a prefill of all tokens


@dataclass
class Pace:
    """How long things take in one request, with its noise, and its link."""

    noise: float
    finish: Callable[[float, float], float]  #: (from when on, bytes) -> when they have been sent
    delay_s: float


def make_pipeline(
    path: Path,
    profiles: tuple[str, ...] = RATES,
    settings: tuple[tuple[str, str, str], ...] = SETTINGS,
    examples: int = 8,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write manifest, rows and spans; `overrides` are `Row` fields that every row gets."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    rows, lines = [], []
    for profile in profiles:
        for setting in settings:
            for example in range(examples):
                row, spans = _request(rng, profile, *setting, example)
                rows.append(dataclasses.asdict(dataclasses.replace(row, **overrides)))
                lines.append({"trial": row.trial, "spans": spans})
    manifest = {
        "format": FORMAT,
        "name": "pipeline",
        "profiles": {p: {"text": parse_profile(p).text(), "source": ""} for p in profiles},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "calibration.json").write_text("{}")
    (path / "spans.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rewrite(path, rows)
    return path


def _request(
    rng: np.random.Generator, profile: str, placement: str, codec: str, delivery: str, example: int
) -> tuple[Row, list[dict[str, Any]]]:
    conditions = parse_profile(profile)
    changes, at = conditions.changes, 0.3 * example
    schedule = conditions.up.schedule("up", 0.0)
    rate = conditions.up.mean_rate_bps("up") or 1e9

    def finish(begin: float, size: float) -> float:
        if schedule is None or not changes:
            return begin + size * 8 * 1.05 / rate
        return float(schedule.finish(begin + at, size * 1.05) - at)

    pace = Pace(float(rng.lognormal(0, 0.05)), finish, conditions.up.delay_s)
    levels, sizes = _chunks(placement, codec, delivery, example, rate)
    spans = _spans(pace, placement, delivery, levels, sizes)
    own, worked = ({n: getattr(side, n) for n in STAGES} for side in (billed(spans), busy(spans)))
    whole, payload = sum(own.values()), int(sum(sizes))
    easy = np.random.default_rng(example).random()
    right = float(np.mean([SHARES[level or codec or "text"][1] for level in levels])) if levels else 0.8
    runs = ",".join(
        f"{k}*{n}" if n > 1 else k for k, n in ((k, len(list(g))) for k, g in groupby(levels)) if k
    )
    adaptive = delivery.startswith("adaptive")
    row = Row(
        trial=f"{profile}/{placement}/{codec}/{delivery}/{example}",
        cell=f"{profile}/{placement}/{codec}/{delivery}",
        repeat=0,
        started_at="2025-01-01T12:00:00Z",
        model="smollm2-135m",
        task="needle",
        example=f"needle-{example}",
        context_tokens=TOKENS,
        placement=placement,
        codec=codec,
        delivery=delivery,
        profile=profile,
        link="wan",
        emulator="userspace",
        transport="" if placement == "edge" else "tcp",
        congestion="" if placement == "edge" else "cubic",
        rate_up_bps=rate,
        rate_down_bps=rate,
        delay_up_s=pace.delay_s,
        delay_down_s=pace.delay_s,
        trace_s=at if changes and placement != "edge" else None,
        **own,
        **{f"busy_{name}": seconds for name, seconds in worked.items()},
        overlap_s=hidden(spans),
        bound_s=bound(spans, pace.delay_s),
        naive_s=naive(payload, rate),
        ttft_s=whole - own["generate_s"],
        e2e_s=whole,
        kv_bytes=KV_BYTES,
        payload_bytes=payload,
        wire_bytes=int(1.06 * payload) + 3000,
        retransmits=0,
        tokens_kept=TOKENS,
        answer_tokens=4,
        bits_per_element=16 * payload / KV_BYTES if placement in ("split", "store") else 0.0,
        chunks=len(sizes),
        levels=runs,
        deadline_s=1.5 if adaptive else None,
        met=whole - own["generate_s"] <= 1.5 if adaptive else None,
        tokens_left_out=BLOCK * levels.count("skip"),
        store_prefill_s=EDGE_S if placement == "store" else None,
        store_encode_s=0.1 if placement == "store" else None,
        questions_per_context=10 if placement == "store" else 1,
        amortized_s=whole + (0.1 * (EDGE_S + 0.1) if placement == "store" else 0.0),
        edge_slowdown=4.0,
        score=float(easy < right),
        em=float(easy < right),
        f1=float(easy < right),
        reference_score=float(easy < 0.8),
        nll=0.4 + easy + (0.0 if right >= 0.8 else 0.1),
        reference_nll=0.4 + easy,
        kl=0.0,
    )
    return row, [_written(span) for span in spans]


def _written(span: Span) -> dict[str, Any]:
    """As a line of spans.jsonl has it."""
    stage, start, end, chunk, side, level, size = span
    known = {"chunk": chunk, "stage": stage, "start_s": start, "end_s": end, "side": side}
    return {**known, "level": level, "bytes": size}


def _chunks(
    placement: str, codec: str, delivery: str, example: int, rate: float
) -> tuple[list[str], list[float]]:
    """The level and the bytes of each chunk that crosses."""
    if placement == "edge":
        return [], []
    if placement == "cloud":
        return [""], [TEXT_BYTES]
    if delivery == "whole":
        return [""], [KV_BYTES * SHARES[codec][0]]
    count = TOKENS // BLOCK
    if delivery == "meet":  # by when as many have come as the cloud has not prefilled
        of, whole = 32, KV_BYTES * SHARES[codec][0]
        sent = whole * 8 * 1.05 / rate
        crossing = max(1, round(of * CLOUD_S / (CLOUD_S + sent)))
        return [codec] * crossing, [whole / of] * crossing
    if not delivery.startswith("adaptive"):
        return [codec] * count, [KV_BYTES * SHARES[codec][0] / count] * count
    ladder = (
        [int("level=1" in delivery)] * count
        if "fixed" in delivery
        else [1, 1, 2 + example % 2, 1 + example % 4]
    )
    if "oracle" in delivery:
        ladder = [1, 1, 2, 2]
    levels = [LEVELS[n] for n in ladder]
    return levels, [KV_BYTES * SHARES[level][0] / count for level in levels]


def _spans(pace: Pace, placement: str, delivery: str, levels: list[str], sizes: list[float]) -> list[Span]:
    """Those of a pipeline whose edge, link and cloud each do one thing at a time."""
    spans: list[Span] = []
    edge = link = cloud = 0.0
    count = max(1, len(sizes))
    if placement == "edge":
        spans.append(Span("prefill", 0.0, EDGE_S * pace.noise))
        cloud = spans[-1].end
    for chunk, (level, size) in enumerate(zip(levels, sizes, strict=True)):
        if placement == "split":
            spans.append(Span("prefill", edge, edge + EDGE_S * pace.noise / count, chunk))
            edge = spans[-1].end
        if placement != "cloud":
            spans.append(Span("encode", edge, edge + 0.05 * pace.noise / count, chunk))
            edge = spans[-1].end
        if chunk == 0:
            spans.append(Span("connect", edge, edge + 2 * pace.delay_s + 0.001, 0, LINK))
            link = spans[-1].end
        begin = max(edge, link)
        link = pace.finish(begin, size)
        spans.append(Span("transmit", begin, link + pace.delay_s, chunk, LINK, level, int(size)))
        taken = "prefill" if placement == "cloud" or level == "text" else "decode"
        takes = CLOUD_S / count if taken == "prefill" else 0.04 / max(count, 4)
        begin = max(cloud, link + pace.delay_s)
        spans.append(Span(taken, begin, begin + takes * pace.noise, chunk, CLOUD))
        cloud = spans[-1].end
    if delivery == "meet":  # the cloud's own half, from the front
        own = CLOUD_S * (1 - count / 32) * pace.noise
        spans.append(Span("prefill", 2 * pace.delay_s, 2 * pace.delay_s + own, count, CLOUD, "text"))
        cloud = max(cloud, spans[-1].end)
    first = cloud + 0.05 * pace.noise + (0.0 if placement == "edge" else pace.delay_s)
    where = EDGE if placement == "edge" else CLOUD
    answer = [("first_token", cloud, first), ("generate", first, first + 0.12 * pace.noise)]
    return [*spans, *(Span(stage, start, end, 0, where) for stage, start, end in answer)]
