"""What a diagnosis is asked for, and the process of its own that it is asked in: torch stays out of the one that asks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from testbed import files, programs
from testbed.errors import EndpointError, UsageError
from testbed.hosts.host import host, lines


@dataclass(frozen=True)
class Request:
    """bits: of the coarse quantization. scale: its scales, as `mixed` has them. high: bits of what is protected. measure: "nll"
    or "score", whose loss must stay within `epsilon` (nats a token, or points of the score). `examples` rank the layers, and as
    many others choose the set. rule: "smallest", the smallest set that holds, or "published", the layers that alone cost more
    than 3 % of the score (`published`), which asks `examples` alone. prompt: as a run has it.
    """

    model: str
    task: str = "needle"
    context_tokens: int = 512
    bits: int = 4
    scale: str = "group"
    high: int = 8
    examples: int = 8
    epsilon: float = 0.05
    measure: str = "nll"
    seed: int = 1
    threads: int | None = None
    rule: str = "smallest"
    prompt: str = "auto"
    parameters: dict[str, Any] = field(default_factory=dict)  #: of the task


def diagnosed(settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis under a `Request` of these values; `say` gets a line after each part of it.

    Raises UsageError for a wrong request and EndpointError where the process fails.
    """
    diagnosis: dict[str, Any] = {}
    complaint = ""
    with host("local").start(programs.module("testbed.diagnosis"), {}) as process:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        for line in lines(process, "the diagnosis"):
            message = json.loads(line)
            if "part" in message:
                say(message["part"])
            diagnosis, complaint = message.get("found", diagnosis), message.get("error", complaint)
        status, complaint = process.status(None), complaint or process.last_words()
    if status == UsageError.exit_status:
        raise UsageError(complaint)
    if status:
        raise EndpointError(f"the diagnosis ended with status {status}: {complaint[:300]}")
    return diagnosis


def write(path: Path, diagnosis: dict[str, Any]) -> None:
    """Write a diagnosis so that a reader sees the old file or the new one. Raises StorageError."""
    with files.storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(diagnosis, indent=1).encode())
