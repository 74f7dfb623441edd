"""What a run reads by name and somebody may change: files of tasks, of its topology and of jitter tables, its model. Rows of
two of them are no one run's. (Traces are copied instead, see `kept_traces`.)

In the manifest, `inputs` has for each what it was when the run began: of a file the SHA-256; of a model that lies in a
directory the SHA-256 over its JSON files and, of each file of weights, its size and 64 KiB at 64 places, so that a model of
many gigabytes is known in no time and another training of it is told apart.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from testbed import files
from testbed.errors import UsageError
from testbed.experiment.scenario import Plan
from testbed.models.sources import resolve
from testbed.net.profile.jitter import JitterTable
from testbed.tasks.rows import HUB

_PLACES, _PIECE_BYTES = 64, 64 << 10


def described(plan: Plan) -> dict[str, str]:
    """What the plan's inputs are now: a digest by what is shown of each. Raises UsageError where one cannot be read."""
    found = {}
    paths = [str(path) for task in plan.tasks if (path := getattr(task, "path", ""))]
    for path in dict.fromkeys(p for p in paths if not p.startswith(HUB)):
        found[f"task file {path}"] = _digest(Path(path))
    if Path(plan.scenario.topology).is_file():
        found[f"topology {plan.scenario.topology}"] = _digest(Path(plan.scenario.topology))
    for profile in [*plan.profiles, *(link.profile for link in plan.topology.links)]:
        for law in (profile.up.jitter_law, profile.down.jitter_law):
            if isinstance(law, JitterTable):
                found[f"jitter table {law.path}"] = _digest(Path(law.path))
    if (directory := resolve(plan.scenario.model).path) is not None:
        found[f"model {plan.scenario.model}"] = _digest(directory)
    return found


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


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    try:
        if path.is_file():
            with files.open_named(path) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        for part in sorted(p for p in path.iterdir() if p.suffix in {".json", ".jinja", ".safetensors"}):
            if part.name == "source.json":  # whence and when it was converted, which changes nothing
                continue
            with files.open_named(part) as file:
                size = os.fstat(file.fileno()).st_size
                found.update(f"{part.name} {size}\n".encode())
                whole = part.suffix != ".safetensors" or size <= _PLACES * _PIECE_BYTES
                places = [0] if whole else [size * n // _PLACES for n in range(_PLACES)]
                for place in places:
                    file.seek(place)
                    found.update(file.read() if whole else file.read(_PIECE_BYTES))
    except OSError as error:
        raise UsageError(f"{error.filename or path}: cannot be read: {error.strerror}") from error
    return found.hexdigest()
