"""A run's directory and its rows: what is written, in which form, so that a crash leaves whole rows and nothing else.

results/<scenario>-<UTC time>/
    manifest.json       the resolved scenario, versions, kernel, emulator, seeds; `format` says how to read the rest
    calibration.json    what was asked of each link and what was measured
    compute.json        how long a fixed piece of compute took each side, before, between and after the trials
    counters.json       what the emulator counted while trials crossed the link
    examples.json       which examples there are to be run, and how many trials each has
    trials.jsonl        one JSON object a line and trial, appended and flushed
    spans.jsonl         when each stage of a trial was at work on which chunk: a line a trial, before its row
    trials.parquet  spans.parquet      the same, written at the end
    summary.csv  figures/  report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from testbed import files
from testbed.endpoints.protocol import Span
from testbed.errors import StorageError, UsageError
from testbed.experiment import columns, compute
from testbed.experiment.row import MEASURED, Row, in_turn
from testbed.units import exact_time

FORMAT = 9

SPANS = "spans.jsonl"
#: In a manifest: how many rows were kept as ``trials.parquet`` alone, on purpose.
PUBLISHED = "published"
#: What only locks it, where a directory cannot be locked itself: it is no part of a run. What a kill may leave before there is a
#: manifest: copies of traces, which have their digests in their names.
_LOCK, _BEFORE = ".lock", "traces"
#: What makes a line a row: the trial that it tells of.
_IDENTITY = ("trial", "task", "example", "placement")


def _slowdowns_came(row: dict[str, Any]) -> dict[str, Any]:
    """1 → 2: a `kl`, unknown before, and slowdowns, of which there were none."""
    return {"kl": None, "edge_slowdown": 1.0, "cloud_slowdown": 1.0, **row}


def _failures_measured_nothing(row: dict[str, Any]) -> dict[str, Any]:
    """2 → 3: what a failed trial measured was zeros, and is None; `decode_s` had in it what is `queue_s` now."""
    return row | dict.fromkeys(MEASURED) if row.get("error") else {"queue_s": 0.0, **row}


def _deliveries_came(row: dict[str, Any]) -> dict[str, Any]:
    """3 → 4: everything crossed whole."""
    return {"delivery": "whole", **row}


def _pipelines_came(row: dict[str, Any]) -> dict[str, Any]:
    """4 → 5: one stage came after the other, generated tokens were stretched as all else, and every side computed; what keeps a
    connection was called ``tcp+reuse``, and a transport was named where nothing crossed a link."""
    came = {f"{side}_decode_slowdown": row.get(f"{side}_slowdown", 1.0) for side in ("edge", "cloud")}
    measured = in_turn(row)
    known = dict.fromkeys(measured) if row.get("error") else measured
    row = {**known, **came, "edge_device": "", "cloud_device": "", **row}
    if row.get("placement") == "edge":
        return row | {"transport": ""}
    return row | {"transport": "tcp(connection=reuse)"} if row.get("transport") == "tcp+reuse" else row


def _clocks_came(row: dict[str, Any]) -> dict[str, Any]:
    """5 → 6: both sides had one clock."""
    return {"clock_offset_s": 0.0, "clock_error_s": 0.0, **row}


def _hosts_came(row: dict[str, Any]) -> dict[str, Any]:
    """6 → 7: nobody kept which machine a row is from."""
    return {"host": "", "cpu": "", **row}


def _loads_came(row: dict[str, Any]) -> dict[str, Any]:
    """7 → 8: nobody else asked."""
    queues = ("edge_queue_s", "link_queue_s", "busy_edge_queue_s", "busy_link_queue_s")
    came = dict.fromkeys(queues, None if row.get("error") else 0.0)
    return {
        **came,
        "load": "sequential",
        "serving": "fifo",
        "client": "",
        "warmup": False,
        "refused": False,
        **row,
    }


def _cells_came(row: dict[str, Any]) -> dict[str, Any]:
    """8 → 9: cells were shared out as their topology said, and nobody went over to another link."""
    return {"allocate": "", "handover": "", **row}


def _times_have_units(manifest: dict[str, Any]) -> dict[str, Any]:
    """A scenario's timeout, which was in bare seconds before units were asked for."""
    settings = manifest.get("settings")
    seconds = settings.get("timeout") if isinstance(settings, dict) else None
    if not isinstance(settings, dict) or not isinstance(seconds, int | float):
        return manifest
    return {**manifest, "settings": settings | {"timeout": exact_time(seconds)}}


#: By format, what makes a row of it one of the next. A resumed run has rows of several formats under one manifest, so each leaves
#: alone what is of its result's format already; so do those of manifests.
_MIGRATIONS = {
    1: _slowdowns_came,
    2: _failures_measured_nothing,
    3: _deliveries_came,
    4: _pipelines_came,
    5: _clocks_came,
    6: _hosts_came,
    7: _loads_came,
    8: _cells_came,
}
_MANIFESTS = (_times_have_units,)
#: Formats that this version reads.
READABLE = (*_MIGRATIONS, FORMAT)


def as_now(row: dict[str, Any]) -> dict[str, Any]:
    """A row of any format that is read, as this one has it."""
    for migrate in _MIGRATIONS.values():
        row = migrate(row)
    return row


def check_format(version: object, path: Path) -> None:
    """Raises UsageError where a run directory's format is none that this version reads."""
    if version not in READABLE:
        formats = " and ".join(map(str, READABLE))
        newer = isinstance(version, int) and version > FORMAT
        remedy = "; a newer testbed wrote it: read it with that one" if newer else ""
        raise UsageError(
            f"{path}: written in format {version!r}; this version reads the formats {formats}{remedy}"
        )


def _span(span: Span) -> dict[str, Any]:
    """As a line has it: seconds from the request's start, to the microsecond."""
    return {
        "chunk": span.chunk,
        "stage": span.stage,
        "start_s": round(span.start, 6),
        "end_s": round(span.end, 6),
        "side": span.side,
        "level": span.level,
        "bytes": span.bytes,
    }


def utc_now() -> str:
    """The time as rows have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _parsed(text: str) -> Any:
    """JSON's value. Half a surrogate pair, which JSON can spell and no file, font or terminal takes, becomes a question mark."""
    value = json.loads(text)
    if "\\ud" in text.lower():
        value = json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    return value


def write_json(path: Path, value: Any) -> None:
    """Write `value` so that a reader sees the old file or the new one, never half of either. Raises StorageError."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n"
    files.replace(path, text.encode("utf-8", "backslashreplace"))


def _line(entry: dict[str, Any]) -> bytes:
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _trial(line: bytes) -> str:
    try:
        return str(json.loads(line)["trial"])
    except (ValueError, RecursionError, TypeError, LookupError):
        return ""


@dataclass
class RunDirectory:
    """A directory under ``results/``. `create` makes one; `open` finds one that exists."""

    path: Path

    @classmethod
    def create(cls, path: Path) -> RunDirectory:
        """Make the directory (and its parents). Raises UsageError where it exists and is not empty."""
        cls(path).check_new()
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"cannot create the run directory {path}: {error.strerror}") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """One of any format that this version reads, damaged or not. Raises UsageError where `path` is none."""
        if not path.is_dir():
            raise UsageError(
                f"{path} is not a directory; name a run's directory, such as results/5g-20250101T120000Z"
            )
        if not any((path / name).is_file() for name in ("manifest.json", "trials.jsonl", "trials.parquet")):
            raise UsageError(f"{path} is not a run directory (it has neither manifest.json nor trials.jsonl)")
        run = cls(path)
        try:
            version = run.manifest().get("format", FORMAT)
        except UsageError:  # whoever needs more of it says so
            return run
        check_format(version, path)
        return run

    def check_new(self) -> None:
        """Raises UsageError where the directory, or another file of its name, exists and is not empty."""
        if self.path.exists() and (
            not self.path.is_dir() or any(p.name not in (_LOCK, _BEFORE) for p in self.path.iterdir())
        ):
            raise UsageError(
                f"{self.path} exists and is not empty; choose another --out, or continue it with --resume {self.path}"
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process at a time may work on a run directory, on whichever machine. Raises UsageError where another does."""
        with contextlib.ExitStack() as stack:
            try:
                self._lock(stack)
            except BlockingIOError as error:
                raise UsageError(f"{self.path}: another testbed process is working on this run") from error
            yield

    def busy(self) -> bool:
        """Whether a process works on the directory now. Raises OSError."""
        with contextlib.ExitStack() as stack:
            try:
                self._lock(stack)
            except BlockingIOError:
                return True
        return False

    def _lock(self, stack: contextlib.ExitStack) -> None:
        handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, handle)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.EISDIR):
                raise
            # NFS locks what is open for writing, which a directory cannot be (flock(2)).
            handle = files.open_own(self.path / _LOCK, os.O_RDWR | os.O_CREAT)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def write(self, name: str, value: Any) -> None:
        """Write ``name`` (a JSON file) atomically. Raises StorageError."""
        write_json(self.path / name, value)

    def manifest(self) -> dict[str, Any]:
        """The manifest as this version writes it; empty where there is none. Raises UsageError where it is not JSON."""
        manifest = self.read("manifest.json")
        for migrate in _MANIFESTS:
            manifest = migrate(manifest)
        return manifest

    def settings(self) -> dict[str, Any]:
        """The scenario's settings, as the manifest has them. Raises UsageError where it has none."""
        settings = self.manifest().get("settings")
        if not isinstance(settings, dict):
            raise UsageError(
                f"{self.path / 'manifest.json'}: has no `settings`, so what this run was to do is unknown"
            )
        return settings

    def entries(self, name: str, key: str) -> list[Any]:
        """What the file ``name`` has in its list ``key``; empty where there is no such list. Raises as `read` does."""
        entries = self.read(name).get(key)
        return entries if isinstance(entries, list) else []

    def read(self, name: str) -> dict[str, Any]:
        """The object in the file ``name``; empty where there is no such file. Raises UsageError where it holds none."""
        path = self.path / name
        if not path.exists():
            return {}
        try:
            value = _parsed(files.read(path).decode("utf-8"))
        except (OSError, ValueError, RecursionError, StorageError) as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        if not isinstance(value, dict):
            raise UsageError(f"{path} does not hold a JSON object")
        return value

    def append(self, row: Row, spans: Sequence[Span] = (), more: Mapping[str, Any] | None = None) -> None:
        """Append one row, behind its spans, and see it on the disk; a kill or a full disk leaves whole rows.

        `more`: columns of its own, behind those that all rows have. Raises StorageError.
        """
        if spans:
            self._append(SPANS, {"trial": row.trial, "spans": [_span(span) for span in spans]})
        self._append("trials.jsonl", {**dataclasses.asdict(row), **(more or {})})

    def append_all(self, rows: Sequence[tuple[Row, Sequence[Span]]]) -> None:
        """Append rows that are of use together, behind their spans, each kind at once. Raises StorageError."""
        spans = [{"trial": row.trial, "spans": [_span(s) for s in own]} for row, own in rows if own]
        for name, entries in ((SPANS, spans), ("trials.jsonl", [dataclasses.asdict(row) for row, _ in rows])):
            if entries:
                files.append(self.path / name, b"".join(map(_line, entries)))

    def keep_first(self, rows: int) -> None:
        """Cut off all rows behind so many, and the spans that are of none of those left. Raises StorageError."""
        path, spans = self.path / "trials.jsonl", self.path / SPANS
        if not path.exists():
            return
        kept = path.read_bytes().splitlines(keepends=True)[:rows]
        files.replace(path, b"".join(kept))
        known = {row["trial"] for row in self.rows()}
        if spans.exists():
            own = [line for line in spans.read_bytes().splitlines(keepends=True) if _trial(line) in known]
            files.replace(spans, b"".join(own))

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        files.append(self.path / name, _line(entry))

    def repair(self) -> int:
        """Cut off last lines that a kill left unfinished; returns how many bytes went."""
        gone = 0
        for path in (self.path / SPANS, self.path / "trials.jsonl"):
            if path.exists():
                with files.storing(path), open(files.open_own(path, os.O_RDWR), "r+b") as lines:
                    data = lines.read()
                    whole = data.rfind(b"\n") + 1
                    lines.truncate(whole)
                gone += len(data) - whole
        return gone

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows so far, as this version writes them; a cut-off last line, and any other that is no trial's row, is passed
        over. `compute_steady` is false, too, where the measurement behind a trial complained, which its row could not know.
        """
        path = self.path / "trials.jsonl"
        if not path.exists():
            return
        starts: tuple[compute.Start, ...] = ()
        with contextlib.suppress(UsageError):
            starts = compute.starts(self.entries("compute.json", "starts"))
        with files.reading(path) as lines:
            for line in lines:
                try:
                    row = _parsed(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in _IDENTITY):
                    if compute.complaints_behind(starts, str(row.get("started_at", ""))):
                        row["compute_steady"] = False
                    yield as_now(row)

    def all_rows(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The rows, those of ``trials.parquet`` where ``trials.jsonl`` is gone, and what is lost of them, in words."""
        path = self.path / "trials.jsonl"
        if path.is_file():
            rows = list(self.rows())
            with files.reading(path) as lines:
                lost = sum(1 for line in lines if line.strip()) - len(rows)
            many = "s" if lost > 1 else ""
            return rows, [f"{lost} unreadable line{many} of trials.jsonl passed over"] if lost else []
        rows = self.parquet_rows()
        with contextlib.suppress(UsageError):
            if len(rows) == self.manifest().get(PUBLISHED):
                return rows, []
        return rows, ["trials.jsonl is missing"]

    def parquet_rows(self) -> list[dict[str, Any]]:
        """The rows of ``trials.parquet`` as `rows` has them; empty where it cannot be read."""
        import pandas as pd

        try:
            table = pd.read_parquet(self.path / "trials.parquet")
        except (OSError, ValueError):
            return []
        return [as_now(row) for row in columns.plain(table)]

    def finished(self) -> set[str]:
        """The trials that have a row without an error: what is not to be run again."""
        return {row["trial"] for row in self.rows() if not row.get("error")}

    def write_parquet(self) -> None:
        """Write ``trials.parquet`` from the rows, typed by `Row`'s columns, and ``spans.parquet`` from the spans.

        Raises UsageError where a column holds values of several kinds, which no run writes.
        """
        import pandas as pd

        with self._typed("trials.jsonl"):
            frame = columns.typed(list(self.rows()))
        self._write_table("trials", frame)
        if (self.path / SPANS).exists():
            self._write_table("spans", pd.DataFrame(self._spans(), columns=["trial", *_span(Span("", 0, 0))]))

    def _write_table(self, name: str, frame: Any) -> None:
        with files.replacing(self.path / f"{name}.parquet") as temporary, self._typed(f"{name}.jsonl"):
            frame.to_parquet(temporary, index=False, schema=columns.schema(frame))

    @contextlib.contextmanager
    def _typed(self, source: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"{self.path / source}: rows that no run writes: {reason}") from error

    def _spans(self) -> Iterator[dict[str, Any]]:
        with files.reading(self.path / SPANS) as lines:
            for line in lines:
                with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
                    entry = _parsed(line)
                    yield from [{"trial": entry["trial"], **span} for span in entry["spans"]]
