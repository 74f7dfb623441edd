"""A diagnosis in a process of its own: torch stays out of the one that asks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testbed.errors import EndpointError, UsageError


def diagnosed(settings: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """The diagnosis under `Settings` of these values; `say` gets a line after each part of it.

    Raises UsageError for a wrong request and EndpointError where the process fails.
    """
    command = [sys.executable, "-m", "testbed.diagnosis"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin and child.stdout and child.stderr
        child.stdin.write(json.dumps(settings))
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
    """Write a diagnosis so that a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(found, indent=1))
    partial.replace(path)
