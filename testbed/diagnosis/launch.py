"""A diagnosis in a process of its own: torch stays out of the one that asks."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed import files, programs
from testbed.errors import EndpointError, UsageError
from testbed.hosts.host import host


def diagnosed(settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis under `Settings` of these values; `say` gets a line after each part of it.

    Raises UsageError for a wrong request and EndpointError where the process fails.
    """
    found: dict[str, Any] = {}
    complaint = ""
    with host("local").start(programs.module("testbed.diagnosis"), {}) as process:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            process.stdin.flush()
        for line in process.stdout:
            message = json.loads(line)
            if "part" in message:
                say(message["part"])
            found, complaint = message.get("found", found), message.get("error", complaint)
        status, complaint = process.status(None), complaint or process.last_words()
    if status == UsageError.exit_status:
        raise UsageError(complaint)
    if status:
        raise EndpointError(f"the diagnosis ended with status {status}: {complaint[:300]}")
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a diagnosis so that a reader sees the old file or the new one. Raises StorageError."""
    with files.storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(found, indent=1).encode())
