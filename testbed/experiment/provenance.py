"""Whence a run's rows are: which code, which weights, which state of the machine, which questions.

manifest: provenance.weights    model -> file -> bytes, SHA-256 of the whole file; of a model that lies on this machine
manifest: provenance.starts     for each start of the run: the code's version, digest and commit; the machine's load, governors
                                and sysctls, those of the edge's node besides
questions.jsonl                 a line an example: task, example, question, gold answers, choices
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import testbed
from testbed import __version__, files
from testbed.errors import TestbedError, UsageError
from testbed.experiment.deployment import Batch
from testbed.experiment.results import RunDirectory, utc_now
from testbed.experiment.scenario import Plan
from testbed.experiment.trial import task_label
from testbed.hosts.host import Host
from testbed.hosts.survey import copy_of_testbed
from testbed.models.sources import resolve

QUESTIONS = "questions.jsonl"
#: Those that change what TCP, queues and timers do.
_SYSCTLS = (
    "kernel/sched_rt_runtime_us",
    "net/core/default_qdisc",
    "net/core/netdev_max_backlog",
    "net/core/rmem_max",
    "net/core/wmem_max",
    "net/ipv4/tcp_congestion_control",
    "net/ipv4/tcp_ecn",
    "net/ipv4/tcp_moderate_rcvbuf",
    "net/ipv4/tcp_mtu_probing",
    "net/ipv4/tcp_no_metrics_save",
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_sack",
    "net/ipv4/tcp_slow_start_after_idle",
    "net/ipv4/tcp_timestamps",
    "net/ipv4/tcp_window_scaling",
    "net/ipv4/tcp_wmem",
    "vm/swappiness",
)
_GIT_S = 10.0
_PIECE_BYTES = 1 << 20


def recorded(before: object, plan: Plan, host: Host | None) -> dict[str, Any]:
    """The manifest's entry, which was `before` when the run was last started. host: the edge's node, where that is one."""
    known = before if isinstance(before, Mapping) else {}
    starts = kept if isinstance(kept := known.get("starts"), list) else []
    now = {"at": utc_now(), "code": code(), **machine(), "node_sysctls": _inside(host)}
    return {"weights": known.get("weights") or weights(plan), "starts": [*starts, now]}


def code() -> dict[str, Any]:
    """The testbed's version and a digest of its source; `commit` and `dirty` where it is a git checkout's own."""
    package = Path(testbed.__file__).parent
    return {
        "version": __version__,
        "source": copy_of_testbed(str(package)).get("digest"),
        **_checkout(package),
    }


def _checkout(package: Path) -> dict[str, Any]:
    """The commit, and whether what lies there is another thing; empty where the package is no part of a checkout."""
    # An installed copy may lie within somebody's checkout, of which it is no part.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return {}
    commit = _git(package, "rev-parse", "HEAD")
    changed = _git(package, "status", "--porcelain", "--", ".", ":(top)analysis")
    return (
        {}
        if commit is None or changed is None
        else {"commit": commit.strip(), "dirty": bool(changed.strip())}
    )


def _git(where: Path, *arguments: str) -> str | None:
    """What git says; None where it refuses, or there is none."""
    # The checkout may be another user's than root's, and its own configuration may name programs to run.
    trusted = ("-c", "safe.directory=*", "-c", "core.fsmonitor=false")
    try:
        said = subprocess.run(
            ["git", *trusted, *arguments],
            cwd=where,
            capture_output=True,
            text=True,
            timeout=_GIT_S,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return said.stdout if said.returncode == 0 else None


def weights(plan: Plan) -> dict[str, dict[str, dict[str, Any]]]:
    """The files of each model that the plan loads on this machine; of one of the hub, the manifest's `inputs` has the commit."""
    if plan.topology.kind != "namespaces" or plan.scenario.programs is not None:
        return {}
    known = {}
    for name in dict.fromkeys((plan.scenario.models.edge, plan.scenario.models.cloud)):
        if (path := resolve(name).path) is not None:
            known[name] = {part.name: _hashed(part) for part in _parts(path)}
    return known


def _parts(path: Path) -> Iterable[Path]:
    if path.is_file():
        return (path,)
    kinds = {".json", ".jinja", ".safetensors", ".model", ".bin"}
    return sorted(part for part in path.iterdir() if part.suffix in kinds and part.name != "source.json")


def _hashed(path: Path) -> dict[str, Any]:
    try:
        with files.open_named(path) as file:
            return {
                "bytes": os.fstat(file.fileno()).st_size,
                "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
            }
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error


def machine() -> dict[str, Any]:
    """The machine as it is now: load over 1, 5 and 15 minutes, the processors' frequency governors, sysctls. What cannot be
    read is None, or missing."""
    return {
        "load": [round(value, 2) for value in os.getloadavg()],
        "governors": _governors(),
        "turbo": _turbo(),
        "sysctls": sysctls(),
    }


def _governors() -> list[str] | None:
    """Of all processors, each once; None: the kernel does not govern their frequency, as in most virtual machines."""
    found = {
        _read(path) for path in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq/scaling_governor")
    }
    return sorted(filter(None, found)) or None


def _turbo() -> bool | None:
    """Whether processors may go above their nominal frequency; None: unknown."""
    if (off := _read(Path("/sys/devices/system/cpu/intel_pstate/no_turbo"))) is not None:
        return off == "0"
    boost = _read(Path("/sys/devices/system/cpu/cpufreq/boost"))
    return None if boost is None else boost == "1"


def sysctls() -> dict[str, str]:
    """Those that matter, as this thread's network namespace has them."""
    found = {name.replace("/", "."): _read(Path("/proc/sys", name)) for name in _SYSCTLS}
    return {name: " ".join(value.split()) for name, value in found.items() if value is not None}


def _inside(host: Host | None) -> dict[str, str]:
    """The sysctls of a node's namespace; empty where it is none, or cannot be entered."""
    about = host.describe() if host is not None else {}
    if about.get("kind") != "namespace":
        return {}
    from testbed.hosts.namespaces import call_inside

    with contextlib.suppress(TestbedError, OSError):
        return call_inside(str(about["name"]), sysctls)
    return {}


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def keep_questions(directory: RunDirectory, plan: Plan, batches: Sequence[Batch]) -> None:
    """Write which questions are asked, with their gold answers. Raises StorageError."""
    lines = [
        {
            "task": task_label(plan, batch.task, batch.context_tokens),
            "example": prepared.example.id,
            "question": prepared.example.question,
            "answers": list(prepared.example.answers),
            "choices": list(prepared.example.choices),
            "gold": prepared.gold,
        }
        for batch in batches
        for prepared in batch.examples
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    files.replace(directory.path / QUESTIONS, text.encode("utf-8", "backslashreplace"))
