"""Does a run's directory agree with itself? Rows against their own arithmetic, their questions' gold answers, their spans and
their plan; tables and figures against the rows (`derived`).

What cannot be looked at, because the run kept nothing to look at it by, is a note and no deviation.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from testbed import files
from testbed.analysis import derived
from testbed.endpoints.protocol import ROUNDING_S, Span
from testbed.endpoints.spans import billed, busy
from testbed.errors import TestbedError, UsageError
from testbed.experiment import expected, inputs
from testbed.experiment.provenance import QUESTIONS
from testbed.experiment.readers import EXAMPLES
from testbed.experiment.results import SPANS, RunDirectory
from testbed.experiment.row import BUSY, SENDING, STAGES, naive
from testbed.tasks.task import Example, Task, parse_task

_RELATIVE = 1e-9  #: what is computed from a row's own numbers, which JSON has in full
_SPAN_S = 1e-6  #: to which a line has a span's ends
_SCORES = ("score", "em", "f1")


@dataclass(frozen=True)
class Checked:
    """What was found. `deviations`: a line each; `notes`: what was not looked at, and why; `counts`: what was, by its name."""

    deviations: tuple[str, ...]
    notes: tuple[str, ...]
    counts: dict[str, int]


def check(path: Path) -> Checked:
    """The run in `path`, looked through. Raises UsageError where it is none."""
    directory = RunDirectory.open(path)
    rows, lost = directory.all_rows()
    notes, counts = list(lost), Counter({"rows": len(rows)})
    deviations = [
        *_unique(rows),
        *(f"{_name(row)}: {said}" for row in rows for said in _arithmetic(row)),
        *_planned(directory, rows, notes),
        *_answers(directory, rows, notes, counts),
        *_spans(directory, rows, notes, counts),
        *_kept(directory),
        *derived.check(directory, rows, notes, counts),
    ]
    return Checked(tuple(deviations), tuple(notes), dict(counts))


def _name(row: Mapping[str, Any]) -> str:
    return f"trial {row['trial']}"


def _unique(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One finished row a trial, each by the name that follows from what was asked."""
    for trial, times in Counter(row["trial"] for row in rows if not row.get("error")).items():
        if times > 1:
            yield f"trial {trial}: has {times} finished rows"
    for row in rows:
        if row["load"] != "sequential" or row["placement"] == "program":
            continue  # these count their requests
        text = f"{row.get('cell')}/{row['example']}/{row.get('repeat')}"
        if (named := hashlib.blake2b(text.encode(), digest_size=8).hexdigest()) != row["trial"]:
            yield f"{_name(row)}: its cell, example and repeat are those of trial {named}"


def _arithmetic(row: Mapping[str, Any]) -> Iterator[str]:
    """What columns say of each other."""
    if row.get("error"):
        return
    stages = [seconds for stage in STAGES if (seconds := row.get(stage)) is not None]
    whole = row.get("e2e_s")
    if whole is not None and len(stages) == len(STAGES):
        yield from _differs("its stages' sum", sum(stages), "e2e_s", whole, ROUNDING_S)
    if None not in (whole, row.get("generate_s"), row.get("ttft_s")) and row["placement"] != "program":
        yield from _differs("e2e_s − generate_s", whole - row["generate_s"], "ttft_s", row["ttft_s"])
    sent, rate = row.get("payload_bytes"), row.get("rate_up_bps")
    if sent is not None and rate and row.get("naive_s") is not None:
        yield from _differs(
            "payload_bytes × 8 / rate_up_bps", naive(sent, rate) or 0.0, "naive_s", row["naive_s"]
        )
    if (bits := row.get("bits_per_element")) is not None and row.get("kv_bytes") and sent is not None:
        crossed = sent if row["placement"] in SENDING else 0
        yield from _differs(
            "payload bits over elements", crossed * 16 / row["kv_bytes"], "bits_per_element", bits
        )
    if (stored := row.get("store_prefill_s")) is not None and whole is not None:
        share = (stored + row["store_encode_s"]) / row["questions_per_context"]
        yield from _differs("e2e_s and the store's share", whole + share, "amortized_s", row["amortized_s"])
    for column in (*_SCORES, "reference_score", "verified_score"):
        if (value := row.get(column)) is not None and not 0 <= value <= 1:
            yield f"{column} is {value:g}, and scores are 0 to 1"


def _differs(
    what: str, value: float, column: str, written: float | None, within: float = 0.0
) -> Iterator[str]:
    if written is None or not math.isclose(value, written, rel_tol=_RELATIVE, abs_tol=max(within, 1e-12)):
        yield f"{what} is {value:.6g}, {column} {'empty' if written is None else f'{written:.6g}'}"


def _planned(directory: RunDirectory, rows: list[dict[str, Any]], notes: list[str]) -> Iterator[str]:
    """Rows are of examples that were to be made, and not more than were to be."""
    try:
        plan = expected.read(directory)
    except UsageError as error:
        yield str(error)
        return
    if not plan:
        return
    to_make = {(each.task, example): each.trials for each in plan for example in each.examples}
    made = Counter((row["task"], row["example"]) for row in rows if not row.get("error"))
    tried = {(row["task"], row["example"]) for row in rows}
    for task, example in sorted(tried - to_make.keys()):
        yield f"example {example} of {task}: has rows, and {expected.NAME} does not name it"
    for key in sorted(made.keys() & to_make.keys()):
        if made[key] > to_make[key]:
            yield f"example {key[1]} of {key[0]}: has {made[key]} finished rows, and was to have {to_make[key]}"
    missing = sum(max(0, trials - made[key]) for key, trials in to_make.items())
    if missing:
        notes.append(f"{missing:,} trials of {sum(to_make.values()):,} have no finished row")


def _answers(
    directory: RunDirectory, rows: list[dict[str, Any]], notes: list[str], counts: Counter[str]
) -> Iterator[str]:
    """Every answer scored again, by its task's metric against its gold answers."""
    asked = _questions(directory)
    if asked is None:
        notes.append(f"not scored again: the run has no {QUESTIONS}")
        return
    tasks, unread = _tasks(directory)
    notes += [f"not scored again: {why}" for why in unread]
    for row in rows:
        task = tasks.get(str(row["task"]).partition("@")[0]) or tasks.get(row["task"])
        example = asked.get((row["task"], row["example"]))
        if example is None:
            yield f"{_name(row)}: {QUESTIONS} has no example {row['example']} of {row['task']}"
            continue
        if task is None:
            continue
        answers = dict.fromkeys(_SCORES, row["answer"])
        answers |= {"reference_score": row["reference_answer"], "verified_score": row["verified_answer"]}
        for column, answer in answers.items():
            if (written := row.get(column)) is None or (column in _SCORES and row.get("error")):
                continue
            counts["scores"] += 1
            again = task.score(answer, example)[column if column in _SCORES else "score"]
            for said in _differs("its answer's score", again, column, written):
                yield f"{_name(row)}: {said}"


def _questions(directory: RunDirectory) -> dict[tuple[str, str], Example] | None:
    """Task and example -> what was asked; None where the run did not keep it."""
    path = directory.path / QUESTIONS
    if not path.is_file():
        return None
    asked = {}
    with files.reading(path) as lines:
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                example = Example(
                    entry["example"], "", entry["question"], tuple(entry["answers"]), tuple(entry["choices"])
                )
                asked[entry["task"], entry["example"]] = example
            except (ValueError, RecursionError, TypeError, LookupError):
                raise UsageError(f"{path}:{number}: not a question as a run writes it") from None
    return asked


def _tasks(directory: RunDirectory) -> tuple[dict[str, Task], list[str]]:
    """By the name that rows have, and why some cannot be had."""
    known, unread = {}, []
    written = directory.settings().get("tasks")
    for each in written if isinstance(written, list) else ():
        # How many of its examples are asked for is no parameter of a task.
        alone = {k: v for k, v in each.items() if k != EXAMPLES} if isinstance(each, dict) else each
        try:
            task = parse_task(alone)
            known[task.label] = task
        except UsageError as error:
            unread.append(str(error))
    return known, unread


def _spans(
    directory: RunDirectory, rows: list[dict[str, Any]], notes: list[str], counts: Counter[str]
) -> Iterator[str]:
    """The stages that follow from a row's spans are the row's."""
    path = directory.path / SPANS
    if not path.is_file():
        notes.append(f"stages not derived again: the run has no {SPANS}")
        return
    by_trial: dict[str, list[Span]] = {}
    with files.reading(path) as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                by_trial[entry["trial"]] = [
                    Span(each["stage"], each["start_s"], each["end_s"]) for each in entry["spans"]
                ]
            except (ValueError, RecursionError, TypeError, LookupError):
                continue  # what a kill cut off; what belongs to a row is missed below
    for row in rows:
        # A trial that was made again has one line's spans; what comes behind an answer from the first planes is in them, too.
        if row.get("error") or row.get("e2e_s") is None or row.get("planes") is not None:
            continue
        if (own := by_trial.get(row["trial"])) is None:
            if row["placement"] != "program":
                yield f"{_name(row)}: has no spans"
            continue
        counts["spans"] += len(own)
        within = _SPAN_S * (len(own) + 1) + ROUNDING_S
        try:
            again = {**structs.asdict(billed(own))}
            again |= {f"busy_{stage}": seconds for stage, seconds in structs.asdict(busy(own)).items()}
        except ValueError as error:
            yield f"{_name(row)}: its spans: {error}"
            continue
        for column in (*STAGES, *BUSY):
            if row.get(column) is not None:
                for said in _differs("by its spans", again[column], column, row[column], within):
                    yield f"{_name(row)}: {column} {said}"


def _kept(directory: RunDirectory) -> Iterator[str]:
    """The traces that the run keeps are those that it followed."""
    try:
        inputs.kept_traces(directory.manifest().get("traces"), directory.path)
    except TestbedError as error:
        yield str(error)


def text(checked: Checked) -> str:
    """For people: a line a deviation, then what was looked at."""
    looked = ", ".join(f"{count:,} {name}" for name, count in checked.counts.items() if count)
    found = len(checked.deviations)
    verdict = f"{found:,} deviation{'' if found == 1 else 's'}" if found else "no deviation"
    return "\n".join(
        [*checked.deviations, *(f"note: {note}" for note in checked.notes), f"{verdict} in {looked}"]
    )
