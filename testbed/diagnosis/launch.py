"""A diagnosis in a process of its own: torch stays out of the one that asks."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed import files, programs
from testbed.errors import EndpointError, UsageError
from testbed.identity import of_user


def diagnosed(settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis under `Settings` of these values; `say` gets a line after each part of it.

    Raises UsageError for a wrong request and EndpointError where the process fails.
    """
    with subprocess.Popen(
        programs.module("testbed.diagnosis"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=programs.environment(),
        **of_user(),
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says why
            child.stdin.write(json.dumps(settings))
            child.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()
        complaint = ""
        for line in child.stderr:
            if line.startswith("error "):
                complaint = line.removeprefix("error ").strip()
            elif line.startswith(("example ", "K", "V", "none", *"0123456789")):
                say(line.rstrip())
            else:
                complaint = complaint or line.strip()
        output = child.stdout.read()
    if child.returncode == 2:
        raise UsageError(complaint)
    if child.returncode:
        raise EndpointError(f"the diagnosis ended with status {child.returncode}: {complaint[:300]}")
    found: dict[str, Any] = json.loads(output)
    return found


def write(path: Path, found: dict[str, Any]) -> None:
    """Write a diagnosis so that a reader sees the old file or the new one. Raises StorageError."""
    with files.storing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, json.dumps(found, indent=1).encode())
