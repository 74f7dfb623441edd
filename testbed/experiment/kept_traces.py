"""Copies of the traces that a run follows, in its directory: it can be read, plotted and resumed though they change or go.

traces/<first digits of its SHA-256>-<name>        and in the manifest, by what the scenario says: file, sha256, bytes
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from testbed import files
from testbed.errors import UsageError
from testbed.experiment.results import RunDirectory
from testbed.experiment.scenario import Plan
from testbed.net.profile.profile import Profile
from testbed.net.profile.trace import File

FOLDER = "traces"


def keep(plan: Plan, directory: RunDirectory) -> dict[str, Any]:
    """Copies every file that the plan's links follow; the manifest's entry. Raises UsageError, with the file's name."""
    kept: dict[str, Any] = {}
    for file in _files([*plan.profiles, *(link.profile for link in plan.topology.links)]):
        source = file.found()
        digest, size = _digest(source)
        if file.path in kept and kept[file.path]["sha256"] != digest:
            raise UsageError(
                f"trace {file.path}: names two different files in this scenario; give one of them by its whole path"
            )
        target = directory.path / FOLDER / f"{digest[:12]}-{source.name}"
        with files.storing(target):
            target.parent.mkdir(exist_ok=True)
        with files.replacing(target) as copy:
            shutil.copyfile(source, copy)
        kept[file.path] = {"file": f"{FOLDER}/{target.name}", "sha256": digest, "bytes": size}
    return kept


def copies(entry: Any, path: Path) -> dict[str, Path]:
    """What traces say -> the copy in the run directory *path*, by the manifest's *entry*. Raises UsageError where one is
    not what it was."""
    found: dict[str, Path] = {}
    for written, about in (entry if isinstance(entry, Mapping) else {}).items():
        try:
            copy = path / FOLDER / Path(about["file"]).name
            intact = copy.is_file() and _digest(copy)[0] == about["sha256"]
        except (LookupError, TypeError):
            raise UsageError(f"{path / 'manifest.json'}: traces: not what a run writes there") from None
        if not intact:
            raise UsageError(f"{copy}: is not the trace any more that the run began with")
        found[written] = copy
    return found


def _files(profiles: Iterable[Profile]) -> Iterable[File]:
    traces = [way.trace for profile in profiles for way in (profile.up, profile.down)]
    return dict.fromkeys(t.source for t in traces if t is not None and isinstance(t.source, File))


def _digest(path: Path) -> tuple[str, int]:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
