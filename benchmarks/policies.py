"""Policies of adaptive delivery against recorded links: a simulation, in which nothing is sent.

    python -m benchmarks.policies [TRACE …] [--way up] [--delivery 'adaptive(levels=[int8, text], deadline=2s)'] …

A request's chunks cross a link that is its rate over time and a delay, one after the other; there are no headers, losses or
slow starts. Requests begin at evenly spaced moments of each trace (those in scenarios/traces unless others are named). Printed
are, for each policy, each fixed level and the oracle: how often the first token met the deadline, the mean level (0: the best)
of all chunks, and of the requests that met it, the bytes of a request, and the median time to the first token.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from testbed import kinds
from testbed.delivery.delivery import SKIP, TEXT
from testbed.delivery.policies.fixed import Fixed
from testbed.delivery.policies.margin import Margin
from testbed.delivery.policies.policy import POLICIES, Arrival, Policy, Rung, Sent, Situation
from testbed.delivery.policies.prediction import Link
from testbed.net.profile.future import future
from testbed.net.profile.profile import parse_profile
from testbed.net.profile.trace import WAYS
from testbed.units import format_size, parse_time

Rate = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Request:
    """What is to be sent, and to what end. chunks: a rung for each level."""

    levels: tuple[str, ...]
    chunks: tuple[tuple[Rung, ...], ...]
    deadline_s: float | None
    delay_s: float = 0.0
    rest_s: float = 0.0


@dataclass(frozen=True)
class Played:
    """How a request went. levels: as they were chosen."""

    levels: tuple[int, ...]
    first_token_s: float
    bytes: int
    met: bool

    @property
    def rank(self) -> float:
        return fmean(self.levels)


def play(policy: Policy, request: Request, rate: Rate, margin_s: float = 0.0) -> Played:
    """The next level is chosen when the link has sent the chunk before; that a chunk arrived is known a delay later."""
    link, delay = Link(rate), request.delay_s
    levels: list[int] = []
    sent: list[tuple[Sent, float, float]] = []  # with when it arrived, and when the cloud had done it
    now = cloud = 0.0
    for index, chunk in enumerate(request.chunks):
        after_text = index > 0 and request.levels[levels[-1]] == TEXT
        known = [(each, at, done) for each, at, done in sent if at + delay <= now]
        situation = Situation(
            now_s=now,
            deadline_s=request.deadline_s,
            levels=request.levels,
            chunks=request.chunks[index:],
            arrivals=tuple(Arrival(each.bytes, each.sent_s, at) for each, at, _ in known),
            under_way=tuple(each for each, at, _ in sent if at + delay > now),
            delay_s=delay,
            cloud_free_s=max((done for _, _, done in known), default=0.0),
            rest_s=request.rest_s,
            margin_s=margin_s,
            after_text=after_text,
            rate=rate if policy.foresees else None,
        )
        level = policy.choose(situation)
        rung = chunk[level]
        began = max(now, rung.ready_s)
        now = link.finish(began, rung.bytes)
        takes = rung.cloud_s + (0.0 if after_text else rung.pass_s)
        cloud = max(cloud, now + delay) + takes
        levels.append(level)
        sent.append((Sent(rung.bytes, began, takes), now + delay, cloud))
    first_token = cloud + request.rest_s
    met = request.deadline_s is None or first_token <= request.deadline_s + 1e-6
    return Played(tuple(levels), first_token, sum(each.bytes for each, _, _ in sent), met)


def rung(level: str, tokens: int, options: argparse.Namespace) -> Rung:
    """A chunk's at a level: bytes of a codec for a model of the given shape."""
    from testbed.codecs.layout import expected_bytes
    from testbed.codecs.spec import parse

    if level == SKIP:
        return Rung(0)
    if level == TEXT:
        return Rung(2 * tokens, cloud_s=tokens / options.prefill, pass_s=options.each_pass)
    shape = [(options.kv_heads, options.head_dim, options.head_dim, None)] * options.layers
    return Rung(expected_bytes(parse(level), shape, tokens), cloud_s=options.decode)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be; the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def compared(policies: dict[str, Policy], request: Request, links: Sequence[Rate]) -> list[list[str]]:
    """A row for each policy, over requests that begin at the beginning of each of the links' rates."""
    rows = [["policy", "met", "mean level", "of those met", "a request", "first token"]]
    for name, policy in policies.items():
        plays, margin = list[Played](), Margin()
        for rate in links:
            held_back = margin.seconds()
            plays.append(play(policy, request, rate, held_back))
            if request.deadline_s:
                margin.learn(plays[-1].first_token_s, request.deadline_s, held_back)
        met = [each for each in plays if each.met]
        rows.append(
            [
                name,
                f"{len(met)}/{len(plays)}",
                f"{fmean(each.rank for each in plays):.2f}",
                f"{fmean(each.rank for each in met):.2f}" if met else "-",
                format_size(fmean(each.bytes for each in plays)),
                f"{median(each.first_token_s for each in plays):.2f} s",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("traces", nargs="*", help="files, or profiles' texts (default: scenarios/traces)")
    parser.add_argument("--way", choices=WAYS, default="up")
    parser.add_argument(
        "--delivery", default="adaptive(levels=[int8, int4, q2c@0.25+int4, text, skip], deadline=2s)"
    )
    parser.add_argument("--delay", type=parse_time, default=0.025)
    parser.add_argument("--rest", type=parse_time, default=0.1, help="the question's first token")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--requests", type=int, default=30, help="of each trace")
    parser.add_argument("--layers", type=int, default=30, help="of the model, as SmolLM2-135M has them")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument(
        "--prefill", type=float, default=700.0, help="tokens a second that the cloud prefills"
    )
    parser.add_argument(
        "--each-pass", type=parse_time, default=0.0, help="that it takes more for a text that follows on none"
    )
    parser.add_argument("--decode", type=parse_time, default=0.005, help="of a codec's chunk at the cloud")
    options = parser.parse_args()
    delivery = kinds.parse(options.delivery, {"adaptive": "testbed.delivery.adaptive:Adaptive"}, "delivery")
    levels, parts = delivery.levels, delivery.parts(options.tokens, options.layers)
    chunks = tuple(tuple(rung(level, part.stop - part.start, options) for level in levels) for part in parts)
    request = Request(levels, chunks, delivery.deadline, options.delay, options.rest)
    policies: dict[str, Policy] = {name: kinds.load(POLICIES[name])() for name in POLICIES if name != "fixed"}
    policies |= {f"fixed: {level}": Fixed(i) for i, level in enumerate(levels)}
    print(f"a simulation: {options.tokens} tokens in {len(chunks)} chunks, {delivery}")
    for i, (level, (size, cloud_s, *_)) in enumerate(zip(levels, chunks[0], strict=True)):
        print(f"  level {i}: {level:<24} {format_size(size):>10} a chunk, {cloud_s:.3f} s at the cloud")
    shipped = sorted(str(path) for path in (Path(__file__).parents[1] / "scenarios/traces").glob("*.csv"))
    for trace in options.traces or shipped:
        profile = parse_profile(f"trace:{trace}" if Path(trace).is_file() else trace)
        schedule = profile.ways[options.way].schedule(options.way, 0.0)
        length = 60.0 if schedule is None else schedule.length_s
        begins = [length * i / options.requests for i in range(options.requests)]
        links = [future(profile, options.way, begin) for begin in begins]
        print(f"\n{trace}, {options.way}: {options.requests} requests")
        print(table(compared(policies, request, links)))


if __name__ == "__main__":
    main()
