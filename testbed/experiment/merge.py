"""Shards put together: one run's directory from those of its shards, wherever they were made.

They have to be of one plan, read the same inputs, and be made by the same versions. What is missing is told by shard and
example. Each keeps what was measured on its host: its links, its compute, what its emulator counted.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed import files
from testbed.errors import UsageError
from testbed.experiment import expected
from testbed.experiment.expected import Expected
from testbed.experiment.provenance import QUESTIONS
from testbed.experiment.results import FORMAT, SPANS, RunDirectory, utc_now
from testbed.experiment.shard import Shard, of_folder, parse
from testbed.experiment.shards import FOLDER, MERGED, check_place, found_in

#: Of manifests, what has to be alike; and what of each side's model, whose device is the host's affair.
_ALIKE = (
    "format", "settings", "prompt", "topology", "link", "profiles", "emulator", "inputs", "traces", "asked"
)  # fmt: skip
_OF_HOST = ("device", "threads", "speed")
#: Lists to which every start of a shard adds, by file.
_LISTS = {
    "calibration.json": "measurements",
    "compute.json": "starts",
    "counters.json": "starts",
    "traffic.json": "starts",
}


@dataclass(frozen=True)
class Missing:
    """What a shard lacks: trials without a finished row, of how many; failed: of these, those that were tried; by task and
    example how many. path: where it lies; None: it is nowhere."""

    shard: Shard
    path: Path | None
    trials: int
    of: int
    failed: int
    examples: dict[tuple[str, str], int]


@dataclass(frozen=True)
class Merged:
    """What shards came to. path: of the run that was written; None: none was, as something is missing. trials: that the plan
    has; finished: those that have a row. running: shards that somebody works on yet. notes: what to know besides."""

    path: Path | None
    trials: int
    finished: int
    missing: tuple[Missing, ...]
    running: tuple[Shard, ...]
    notes: tuple[str, ...]


@dataclass
class _Part:
    """A shard's directory, and what its rows say."""

    shard: Shard
    directory: RunDirectory
    manifest: dict[str, Any]
    expected: tuple[Expected, ...]
    running: bool
    finished: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    have: Counter[tuple[str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Its rows as this version writes them, one finished row a trial."""
        rows, _ = self.directory.all_rows()
        done: set[str] = set()
        for row in rows:
            if row["trial"] not in done:
                yield row
            if not row.get("error"):
                done.add(row["trial"])


def merge(sources: Sequence[Path], out: Path, partial: bool = False) -> Merged:
    """Put the shards in `sources` (their directories, or some that have them in ``shards``) together in `out`.

    Nothing is written where trials are missing or a shard is being worked on, but with `partial`. Raises UsageError where they
    are not shards of one plan, are damaged, or `out` is something else; StorageError.
    """
    parts = _parts(sources)
    _check_alike(parts)
    known = _known(parts)
    for part in parts:
        _count(part, known)
    missing = tuple(_missing(parts, known))
    of_all = sum(len(each.examples) * each.trials for each in known)
    merged = Merged(
        out,
        of_all,
        of_all - sum(lack.trials for lack in missing),
        missing,
        tuple(part.shard for part in parts if part.running),
        tuple(note for part in parts for note in part.notes),
    )
    if (missing or merged.running) and not partial:
        return Merged(None, of_all, merged.finished, missing, merged.running, merged.notes)
    directory = _opened(out)
    with directory.locked():
        _check_out(directory, parts)
        _write(directory, parts, known, of_all)
    return merged


def _parts(sources: Sequence[Path]) -> list[_Part]:
    """The shards that lie in these directories, in their order."""
    parts: dict[Shard, _Part] = {}
    for source in sources:
        if not source.is_dir():
            raise UsageError(
                f"{source} is not a directory; name one that has shards in {FOLDER}/, or a shard's own"
            )
        named = found_in(source) or [source]
        for path in named:
            if (part := _part(path)) is None:
                continue
            if (other := parts.get(part.shard)) is not None:
                if other.directory.path.samefile(path):
                    continue
                raise UsageError(
                    f"shard {part.shard} lies in {other.directory.path} and in {path}: leave one away"
                )
            parts[part.shard] = part
    if not parts:
        raise UsageError(f"no shard that has begun lies in {', '.join(map(str, sources))}")
    counts = sorted({shard.count for shard in parts})
    if len(counts) > 1:
        raise UsageError(
            f"shards of {' and of '.join(map(str, counts))} are not one whole: merge those of one count"
        )
    return [parts[shard] for shard in sorted(parts)]


def _part(path: Path) -> _Part | None:
    """The shard in a directory; None where it has not begun. Raises UsageError where it is another thing or damaged."""
    if of_folder(path.name) and not (path / "manifest.json").exists():
        return None
    directory = RunDirectory.open(path)
    manifest = directory.manifest()
    if not isinstance(written := manifest.get("shard"), str):
        raise UsageError(f"{path}: no shard of a run: its manifest names none, and it has none in {FOLDER}/")
    try:
        shard = parse(written, {})
    except UsageError as error:
        raise UsageError(f"{path / 'manifest.json'}: shard: {error}") from error
    return _Part(shard, directory, manifest, expected.read(directory), directory.busy())


def _check_alike(parts: Sequence[_Part]) -> None:
    """Raises UsageError, naming the first thing in which a shard is unlike the first one that has it."""
    seen: dict[str, tuple[Any, _Part]] = {}
    for part in parts:
        for name, value in _identity(part).items():
            first, of = seen.setdefault(name, (value, part))
            if first != value:
                raise UsageError(
                    f"shards {of.shard} and {part.shard} are not of one run: {name} is {_short(first)} in "
                    f"{of.directory.path}, {_short(value)} in {part.directory.path}"
                )


def _identity(part: _Part) -> dict[str, Any]:
    """What shards of one run have in common, by what it is called; what this one has of it."""
    manifest = part.manifest
    named: dict[str, Any] = {}
    for key in _ALIKE:
        value = manifest.get(key)
        if isinstance(value, dict):
            named |= {f"{key}: {name}": inner for name, inner in value.items()}
        elif value is not None:
            named[key] = value
    for side, about in _mapping(manifest, "endpoints").items():
        if isinstance(about, dict):
            named |= {f"the {side}'s {k}": v for k, v in about.items() if k not in _OF_HOST}
    packages = _mapping(_mapping(manifest, "host"), "packages")
    named |= {f"the version of {name}": version for name, version in packages.items()}
    named |= {f"the examples of {each.task}": each for each in part.expected}
    return named


def _known(parts: Sequence[_Part]) -> tuple[Expected, ...]:
    """What there is to be made, as a shard that has read its examples says."""
    known = next((part.expected for part in parts if part.expected), ())
    if not known:
        raise UsageError(f"none of {_counted(len(parts), 'shard')} has begun its trials yet")
    return known


def _count(part: _Part, known: Sequence[Expected]) -> None:
    """See which trials a shard has. Raises UsageError where some are not its own."""
    places = {(each.task, name): each.first + n for each in known for n, name in enumerate(each.examples)}
    rows, lost = part.directory.all_rows()
    if part.expected:  # before that nobody writes rows
        part.notes += [f"shard {part.shard}: {note}" for note in lost if rows or "missing" not in note]
    repeated = 0
    for row in rows:
        example, trial = (row["task"], row["example"]), row["trial"]
        if example not in places or not part.shard.has(places[example]):
            raise UsageError(
                f"{part.directory.path}: has a row of example {_short(example[1])} of {_short(example[0])}, which is none of "
                f"shard {part.shard}'s"
            )
        if row.get("error"):
            part.failed.add(trial)
        elif trial in part.finished:
            repeated += 1
        else:
            part.finished.add(trial)
            part.have[example] += 1
    part.failed -= part.finished
    if repeated:
        part.notes.append(f"shard {part.shard}: {_counted(repeated, 'repeated row')} left out")


def _missing(parts: Sequence[_Part], known: Sequence[Expected]) -> Iterator[Missing]:
    """What each shard of the whole lacks."""
    by_number = {part.shard.number: part for part in parts}
    count = parts[0].shard.count
    lacking: dict[int, dict[tuple[str, str], int]] = {}
    of: Counter[int] = Counter()
    for each in known:
        for number, name in enumerate(each.examples):
            shard = (each.first + number) % count + 1
            have = by_number[shard].have[each.task, name] if shard in by_number else 0
            of[shard] += each.trials
            if have < each.trials:
                lacking.setdefault(shard, {})[each.task, name] = each.trials - have
    for shard, examples in sorted(lacking.items()):
        part = by_number.get(shard)
        yield Missing(
            Shard(shard, count),
            part.directory.path if part else None,
            sum(examples.values()),
            of[shard],
            len(part.failed) if part else 0,
            examples,
        )


def _opened(out: Path) -> RunDirectory:
    """Where the run is to be. Raises UsageError where something else is."""
    if (out / "manifest.json").exists():
        check_place(out)
        return RunDirectory.open(out)
    if out.is_dir() and {path.name for path in out.iterdir()} <= {FOLDER, ".lock"}:
        return RunDirectory(out)
    return RunDirectory.create(out)


def _check_out(directory: RunDirectory, parts: Sequence[_Part]) -> None:
    """Raises UsageError where an earlier merge has rows that would be lost: it was continued by itself, or is of other shards."""
    finished = set().union(*(part.finished for part in parts))
    if own := directory.finished() - finished:
        raise UsageError(
            f"{directory.path}: has {_counted(len(own), 'finished trial')} that these shards do not have, since it was continued "
            "by itself or made of others; choose another --out"
        )


def _write(directory: RunDirectory, parts: Sequence[_Part], known: Sequence[Expected], trials: int) -> None:
    """Everything of the run; its manifest first, so that a merge that is killed is known for one and made anew."""
    directory.write("manifest.json", _manifest(parts, trials))
    first = next(part for part in parts if part.expected)
    for trace in first.directory.path.glob("traces/*"):
        with files.storing(directory.path / "traces"):
            (directory.path / "traces").mkdir(exist_ok=True)
            with files.replacing(directory.path / "traces" / trace.name) as copy:
                shutil.copyfile(trace, copy)
    directory.write(expected.NAME, first.directory.read(expected.NAME))
    if (questions := first.directory.path / QUESTIONS).exists():
        files.replace(directory.path / QUESTIONS, files.read(questions))
    for name, key in _LISTS.items():
        entries = [
            {**entry, "shard": str(part.shard), **({"judged": True} if name == "compute.json" else {})}
            for part in parts
            for entry in part.directory.entries(name, key)
            if isinstance(entry, dict)
        ]
        about = next((p.directory.read(name) for p in parts if (p.directory.path / name).exists()), {})
        if entries:
            directory.write(name, {**about, "format": FORMAT, key: entries})
    _write_lines(directory.path / SPANS, (line for part in parts for line in _spans(part)))
    rows = (json.dumps(row, ensure_ascii=False) + "\n" for part in parts for row in part.rows())
    _write_lines(directory.path / "trials.jsonl", rows)
    directory.write_parquet()


def _spans(part: _Part) -> Iterator[str]:
    path = part.directory.path / SPANS
    if path.exists():
        with files.reading(path) as lines:
            yield from (line for line in lines if line.endswith("\n"))


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        for line in lines:
            file.write(line.encode("utf-8", "backslashreplace"))


def _manifest(parts: Sequence[_Part], trials: int) -> dict[str, Any]:
    """The run's, from those of its shards: what is alike, which machines, and when each was started."""
    first = next(part for part in parts if part.expected).manifest
    hosts = [host for part in parts if (host := _mapping(part.manifest, "host"))]
    machines: dict[str, dict[str, Any]] = {}
    for part in parts:
        for name, about in _mapping(part.manifest, "machines").items():
            known = machines.setdefault(name, {**_mapping({"of": about}, "of"), "shards": []})
            known["shards"].append(str(part.shard))
    return {
        **{key: value for key, value in first.items() if key != "shard"},
        "format": FORMAT,
        "created": min(str(part.manifest.get("created", "")) for part in parts),
        "trials": trials,
        "starts": sorted(
            str(at) for part in parts for at in part.directory.entries("manifest.json", "starts")
        ),
        "host": {k: v for k, v in hosts[0].items() if all(host.get(k) == v for host in hosts)},
        "machines": machines,
        "provenance": {"shards": {str(part.shard): part.manifest.get("provenance") for part in parts}},
        MERGED: {
            "at": utc_now(),
            "shards": {str(part.shard): str(part.directory.path) for part in parts},
        },
        "command": sys.argv,
    }


def _mapping(value: dict[str, Any], key: str) -> dict[str, Any]:
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
