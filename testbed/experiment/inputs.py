"""What a run reads by name and somebody may change, as it was when the run began: of traces and jitter tables a copy,
of all else a digest.

traces/<first digits of its SHA-256>-<name>        a copy, so that a run can be read, plotted and resumed though the file goes
manifest: traces        what the scenario says -> file, sha256, bytes
manifest: inputs        "task file …", "topology …", "jitter table …", "model …" -> SHA-256; rows of two are no one run's

Of a model's directory the digest is over its JSON files and, of each file of weights, its size and 64 KiB at 64 places, so that
many gigabytes are known in no time and another training is told apart. Of what comes from the hub it is the commit that is in
its cache, where there is one before the run begins.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from testbed import files
from testbed.errors import UsageError
from testbed.experiment.results import RunDirectory
from testbed.experiment.scenario import Plan
from testbed.load.arrivals import Arrivals
from testbed.models.sources import hub_commit, resolve
from testbed.net.profile.jitter import JitterTable
from testbed.net.profile.profile import Profile
from testbed.net.profile.trace import File
from testbed.speed.files import find as find_device
from testbed.tasks.hub import parse_hub
from testbed.tasks.rows import HUB

_TRACES = "traces"
_PLACES, _PIECE_BYTES = 64, 64 << 10


def described(plan: Plan) -> dict[str, str]:
    """What the plan's inputs are now: a digest by what is shown of each. Raises UsageError where one cannot be read."""
    paths = {}
    for task in plan.tasks:
        if (path := str(getattr(task, "path", ""))) and not path.startswith(HUB):
            paths[f"task file {path}"] = Path(path)
    if Path(plan.scenario.topology).is_file():
        paths[f"topology {plan.scenario.topology}"] = Path(plan.scenario.topology)
    computes = [plan.scenario.compute, *(edge.compute for edge in plan.edges if edge.compute)]
    for speed in (speed for compute in computes for speed in (compute.edge, compute.cloud)):
        if speed.device:
            paths[f"device profile {speed.device}"] = find_device(speed.device)
    for profile in _profiles(plan):
        for law in (profile.up.jitter_law, profile.down.jitter_law):
            if isinstance(law, JitterTable):
                paths[f"jitter table {law.path}"] = law.found()
    for load in plan.scenario.load:
        if isinstance(load, Arrivals):
            paths[f"arrivals {load.file}"] = Path(load.file)
    commits = {}
    # Hosts have models of their own, and programs none.
    here = plan.topology.kind == "namespaces" and plan.scenario.programs is None
    for name in plan.models if here else ():
        model = resolve(name)
        if model.path is not None:
            paths[f"model {name}"] = model.path
        else:
            commits[f"model {name}"] = hub_commit("models", model.location)
    for task in plan.tasks:
        if (path := str(getattr(task, "path", ""))).startswith(HUB):
            commits[f"task {path}"] = hub_commit("datasets", parse_hub(path.removeprefix(HUB))[0])
    digests = {name: _digest(path) for name, path in paths.items()}
    return digests | {name: commit for name, commit in commits.items() if commit}


def check_unchanged(before: object, plan: Plan) -> None:
    """Raises UsageError where an input is not what `before`, of the run's manifest, says of it. A run from before there were
    any says nothing.
    """
    now = described(plan)
    for name, digest in before.items() if isinstance(before, Mapping) else ():
        if now.get(name) != digest:
            raise UsageError(
                f"{name}: has changed since this run began, and rows of both would not be comparable; "
                "bring it back, or begin another run"
            )


def keep_traces(plan: Plan, directory: RunDirectory) -> dict[str, Any]:
    """Copies every trace and jitter table of the plan's links; the manifest's entry. Raises UsageError, with the file's name."""
    kept: dict[str, Any] = {}
    for file in _trace_files(plan):
        source = file.found()
        digest = _digest(source)
        if file.path in kept and kept[file.path]["sha256"] != digest:
            raise UsageError(
                f"{file.path}: names two different files in this scenario; give one of them by its whole path"
            )
        target = directory.path / _TRACES / f"{digest[:12]}-{source.name}"
        with files.storing(target):
            target.parent.mkdir(exist_ok=True)
        with files.replacing(target) as copy:
            shutil.copyfile(source, copy)
        about = {"file": f"{_TRACES}/{target.name}", "sha256": digest, "bytes": target.stat().st_size}
        kept[file.path] = about
    return kept


def check_traces(before: object, plan: Plan) -> None:
    """Raises UsageError where a trace or jitter table is not the one of which the manifest's entry says that a copy was kept."""
    for file in _trace_files(plan):
        about = before.get(file.path) if isinstance(before, Mapping) else None
        if not isinstance(about, Mapping) or about.get("sha256") != _digest(file.found()):
            raise UsageError(
                f"{file.path}: has changed since this run began; bring it back, or begin another run"
            )


def _trace_files(plan: Plan) -> list[File | JitterTable]:
    ways = [way for profile in _profiles(plan) for way in (profile.up, profile.down)]
    named = [part for way in ways for part in (way.trace and way.trace.source, way.jitter_law)]
    return list(dict.fromkeys(part for part in named if isinstance(part, File | JitterTable)))


def kept_traces(entry: Any, path: Path) -> dict[str, Path]:
    """What traces say -> the copy in the run directory *path*, by the manifest's *entry*. Raises UsageError where one is
    not what it was."""
    copies: dict[str, Path] = {}
    for written, about in (entry if isinstance(entry, Mapping) else {}).items():
        try:
            copy = path / _TRACES / Path(about["file"]).name
            intact = copy.is_file() and _digest(copy) == about["sha256"]
        except (LookupError, TypeError):
            raise UsageError(f"{path / 'manifest.json'}: traces: not what a run writes there") from None
        if not intact:
            raise UsageError(f"{copy}: is not the trace any more that the run began with")
        copies[written] = copy
    return copies


def _profiles(plan: Plan) -> list[Profile]:
    own = (edge.profile for edge in plan.edges if edge.profile is not None)
    return [*plan.profiles, *own, *(link.profile for link in plan.topology.links)]


def _digest(path: Path) -> str:
    whole = hashlib.sha256()
    try:
        if path.is_file():
            with files.open_named(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        for part in sorted(p for p in path.iterdir() if p.suffix in {".json", ".jinja", ".safetensors"}):
            if part.name == "source.json":  # whence and when it was converted, which changes nothing
                continue
            with files.open_named(part) as file:
                size = os.fstat(file.fileno()).st_size
                whole.update(f"{part.name} {size}\n".encode())
                if part.suffix != ".safetensors" or size <= _PLACES * _PIECE_BYTES:
                    whole.update(file.read())
                    continue
                for place in range(_PLACES):
                    file.seek(size * place // _PLACES)
                    whole.update(file.read(_PIECE_BYTES))
    except OSError as error:
        raise UsageError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    return whole.hexdigest()
