"""Requests that are made before a load's clock starts: computed, sent and answered once, over loopback, by sides with models.

What of them crosses links later is kept in files; what computing them took is waited for there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from msgspec import structs

from testbed import files
from testbed.delivery.adaptive import Adaptive
from testbed.delivery.delivery import Delivery
from testbed.delivery.stream import Stream
from testbed.endpoints.protocol import (
    CLOUD,
    FullCache,
    Loaded,
    Outcome,
    Passes,
    Replayed,
    TrialResult,
    Ware,
)
from testbed.experiment.deployment import Batch, Pair
from testbed.experiment.edges import Edge
from testbed.experiment.results import RunDirectory
from testbed.experiment.scenario import Cell, Plan
from testbed.experiment.session import endpoint
from testbed.experiment.trial import Reference, Trial
from testbed.net.loopback import Loopback
from testbed.tasks.task import Task
from testbed.transport.tcp import Tcp

_FOLDER = ".wares-"
#: So often is each made: what took the middle of these times is what every request takes, which one slow start must not decide.
_TRIES = 3
#: What a ware depends on, besides its example: who computes it, but neither link nor load.
Key = tuple[int, int, str, str, str, Delivery]


@dataclass(frozen=True)
class Made:
    """A ware and its answer, each as the side that has no model is told it; the trial that made both, and what came of it."""

    number: int
    model: str
    trial: Trial
    reference: Reference
    ware: Ware
    answer: Replayed
    result: TrialResult
    outcome: Outcome
    scores: dict[str, float]
    alike: bool = True  #: decoded with others it was answered as it is alone


@dataclass
class Wares:
    """All of a plan, and what was said while they were made, by whose requests they are (`Edge.computed`)."""

    loaded: dict[str, dict[str, Loaded]] = field(default_factory=dict)
    batches: dict[str, list[Batch]] = field(default_factory=dict)
    bound: int = 0  #: bytes of the largest payload, and a little
    made: dict[Key, Made] = field(default_factory=dict)

    def of(self, batch: Batch, cell: Cell, edge: Edge) -> list[Made]:
        """A batch's, as an edge sends it in a cell, example by example."""
        own = next(each for each in self.batches[edge.computed] if each.index == batch.index)
        return [self.made[_key(own.index, number, cell, edge)] for number in range(len(own.examples))]

    def numbered(self, number: int) -> Made:
        """The one of that number."""
        return self._by_number[number]

    def passes(self) -> list[dict[str, Any]]:
        """For JSON: what a pass over several requests took, where that was measured: seconds by their number."""
        return [
            {
                "setting": f"{made.trial.cell.placement} {made.trial.cell.codec_text}".strip(),
                "delivery": str(made.trial.cell.delivery),
                "model": made.model,
                "example": made.trial.example.id,
                "tokens_held": made.answer.held,
                "pass_s": {str(count): seconds for count, seconds in made.answer.passes},
                "alike": made.alike,
            }
            for made in self.made.values()
            if made.answer.passes
        ]

    @cached_property
    def _by_number(self) -> dict[int, Made]:
        return {made.number: made for made in self.made.values()}


def _key(batch: int, number: int, cell: Cell, edge: Edge) -> Key:
    return batch, number, edge.computed, cell.placement, cell.codec_text, cell.delivery


@contextlib.contextmanager
def made(
    plan: Plan, directory: RunDirectory, ids: Callable[[Cell], str], say: Callable[[str], None]
) -> Iterator[Wares]:
    """Every ware of the plan, in files that go with the block. The sides that made them are gone by then. ids: cells' identities.

    Raises EndpointError where a side ends, or one cannot be made.
    """
    home = directory.path.absolute()
    for left in home.glob(f"{_FOLDER}*"):  # by a start that was killed
        shutil.rmtree(left, ignore_errors=True)
    wares, alike = Wares(), dict[str, list[Edge]]()
    for edge in plan.edges:
        alike.setdefault(edge.computed, []).append(edge)
    with tempfile.TemporaryDirectory(prefix=_FOLDER, dir=home) as folder:
        for edges in alike.values():
            own = replace(plan.of_edge(edges[0]), edges=tuple(edges))
            _make_all(own, directory, wares, Path(folder), ids, say)
        yield wares


def _make_all(
    plan: Plan,
    directory: RunDirectory,
    wares: Wares,
    folder: Path,
    ids: Callable[[Cell], str],
    say: Callable[[str], None],
) -> None:
    """Those of a plan whose edges' requests are computed alike."""
    who = plan.edges[0].computed
    with Loopback() as network, contextlib.ExitStack() as stack:
        edge, cloud = (
            stack.enter_context(endpoint(role, network.host(role), directory, f"{role}-wares"))
            for role in ("edge", "cloud")
        )
        pair = Pair(_plain(plan), edge, cloud)
        say(f"loading {plan.scenario.models.edge} to make what will be sent")
        loaded = wares.loaded[who] = pair.load()
        batches = wares.batches[who] = pair.prepare()
        pair.serve(network.address("cloud"), loaded["edge"].kv_bytes_per_token)
        wares.bound = max(wares.bound, pair.bound)
        for batch in batches:
            say(f"making {len(batch.examples)} examples' requests of {plan.tasks[batch.task].label}")
            _make_batch(plan, pair, batch, wares, folder, ids)


def _plain(plan: Plan) -> Plan:
    """The plan as it crosses loopback: by TCP, whose congestion control is this machine's."""
    links = tuple(replace(link, congestion=None) for link in plan.topology.links)
    scenario = plan.scenario.model_copy(update={"transport": [Tcp()]})
    return replace(plan, scenario=scenario, topology=replace(plan.topology, links=links))


def _make_batch(
    plan: Plan, pair: Pair, batch: Batch, wares: Wares, folder: Path, ids: Callable[[Cell], str]
) -> None:
    cells = plan.cells(batch.task, batch.context_tokens)
    for number, prepared in enumerate(batch.examples):
        reference: Reference | None = None
        for cell in cells:
            for edge in plan.edges:
                own = replace(plan.at_edge(cell, edge), transport=Tcp())
                key = _key(batch.index, number, own, edge)
                if key in wares.made:
                    continue
                if reference is None:
                    reference = _reference(pair, batch, number, plan.tasks[batch.task])
                about = (batch.index, number, prepared.example, prepared.gold)
                trial = Trial(own, ids(cell), 0, *about)
                place = len(wares.made) + 1
                path = folder / f"{place}.payload"
                make = _make_levels if isinstance(own.delivery, Adaptive) else _make
                wares.made[key] = make(plan, edge, pair, trial, place, path, reference, wares)


def _reference(pair: Pair, batch: Batch, number: int, task: Task) -> Reference:
    full: FullCache = pair.reference(batch, number)
    example = batch.examples[number].example
    score = task.score(full.answer, example)["score"] if full.nll is not None else None
    return Reference(full.context_tokens, full.kv_bytes, full.answer, score, full.nll, full.nll)


def _make(
    plan: Plan,
    edge: Edge,
    pair: Pair,
    trial: Trial,
    number: int,
    path: Path,
    reference: Reference,
    wares: Wares,
) -> Made:
    tries = []
    for repeat in range(_TRIES):
        again = replace(trial, repeat=repeat)
        pair.stock(again)
        if plan.rehearses(again.cell):
            pair.rehearse(again)
        tries.append((pair.trial(again), again))
    result, chosen = sorted(tries, key=lambda each: each[0].e2e_s)[_TRIES // 2]
    latest = tries[-1][0].request  # whose cache the cloud still has; all tries have the same
    outcome = pair.outcome(latest, trial)
    passes = _passes(plan, pair, latest)
    ware = pair.keep(chosen, str(path))
    texts = trial.cell.placement == "cloud"
    if ware.parts is None:
        stages = result.stages
        ware = structs.replace(
            ware,
            prefill_s=0.0 if texts else stages.prefill_s,
            select_s=stages.select_s,
            encode_s=stages.encode_s,
        )
    answer = _answer(plan, result, texts, ware, outcome.tokens_kept)
    memory = answer.held * wares.loaded[edge.computed]["cloud"].kv_bytes_per_token
    answer = structs.replace(answer, memory=memory, passes=passes.seconds, model=edge.computed)
    scores: dict[str, Any] = {}
    if reference.nll is not None:
        scores = plan.tasks[trial.cell.task].score(result.answer, trial.example)
    return Made(
        number,
        plan.scenario.models.cloud,
        trial,
        reference,
        ware,
        answer,
        result,
        outcome,
        scores,
        passes.alike,
    )


def _make_levels(
    plan: Plan,
    edge: Edge,
    pair: Pair,
    trial: Trial,
    number: int,
    path: Path,
    reference: Reference,
    wares: Wares,
) -> Made:
    """A request whose parts' levels are chosen on the way: it is made at each of them, and all are stored. What is answered, and
    what is not of a part, is the best one's.
    """
    delivery = trial.cell.delivery
    assert isinstance(delivery, Adaptive)
    each: dict[str, Made] = {}
    for codec in delivery.codecs:
        cell = replace(trial.cell, codec=codec, delivery=Stream(chunk=delivery.chunk))
        part, again = path.with_suffix(f".{len(each)}"), replace(trial, cell=cell)
        each[str(codec)] = _make(plan, edge, pair, again, number, part, reference, wares)
    best = next(iter(each.values()))
    with files.writing(path) as file, files.storing(path):
        for made in each.values():
            own = Path(made.ware.path)
            with open(files.open_own(own, os.O_RDONLY), "rb") as source:
                shutil.copyfileobj(source, file)
            own.unlink()
    assert best.ware.parts is not None
    ware = structs.replace(
        best.ware,
        path=str(path),
        lengths=tuple(length for made in each.values() for length in made.ware.lengths),
        codec=trial.cell.codec_text,
        delivery=str(delivery),
        parts=structs.replace(best.ware.parts, encode_s=(), choices=tuple(each)),
    )
    nothing = (0.0,) * len(best.answer.parts_s)
    levels_s = tuple(each[level].answer.parts_s if level in each else nothing for level in delivery.levels)
    answer = structs.replace(best.answer, levels_s=levels_s)
    outcome = structs.replace(best.outcome, payload_digest="", kept_digest="")
    return replace(best, trial=trial, ware=ware, answer=answer, outcome=outcome)


def _passes(plan: Plan, pair: Pair, request: int) -> Passes:
    """What is measured of decoding several at once: nothing where nobody is served so, or a device's times say it."""
    most = max(serving.most for serving in plan.scenario.serving)
    device = plan.devices.get("cloud")
    if most == 1 or (device is not None and device.times.decode):
        return Passes((), True)
    return pair.together(request, most)


def _answer(plan: Plan, result: TrialResult, texts: bool, ware: Ware, held: int) -> Replayed:
    """What answering took. Of a context in parts each was rebuilt as it came; what is behind the last was done of all.
    Of layers, the question was read through each part as it was there."""
    stages, stage = result.stages, "prefill" if texts else "decode"
    rebuilt = [span.end - span.start for span in result.spans if span.stage == stage and span.side == CLOUD]
    parts = len(ware.lengths) if ware.parts is not None else 0
    reads = [
        span.end - span.start for span in result.spans if span.stage == "first_token" and span.side == CLOUD
    ]
    by_layers = len(reads) > 1
    tokens = max(0, result.answer_tokens - 1)
    return Replayed(
        stage="prefill" if texts else "decode",
        rebuild_s=sum(rebuilt[parts:]) if parts else stages.prefill_s if texts else stages.decode_s,
        first_s=reads[-1] if by_layers else stages.first_token_s,
        token_s=tuple(_token_s(plan, held, tokens, stages.generate_s)),
        held=held,
        memory=0,
        text=result.answer,
        tokens=result.answer_tokens,
        parts_s=tuple(rebuilt[:parts]),
        reads_s=tuple(reads[:-1]) if by_layers else (),
    )


def _token_s(plan: Plan, held: int, tokens: int, generate_s: float) -> list[float]:
    """Seconds of each token behind the first: of a device behind so many, or else alike."""
    device = plan.devices.get("cloud")
    if device is not None and device.times.decode:
        return [device.times.token_s(held + token) for token in range(tokens)]
    return [generate_s / tokens] * tokens
