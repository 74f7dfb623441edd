"""Kill a run with SIGKILL again and again, clean up, resume, and count: nothing left behind, every trial exactly once.

    sudo .venv/bin/python -m benchmarks.kill_resume [--kills 20] [--json]

The model is a tiny random one; the namespaces, links, sockets and processes are real. What the host's own network looks like
(``ip addr``, ``ip route``, ``iptables-save``, ``sysctl -a``) is compared before and after.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

SCENARIO = """\
name: killed
profiles: ["rate=20mbit,delay=2ms", "rate=50mbit,delay=1ms"]
placements: [split, cloud, edge]
codecs: [fp16, int8, q2c@0.25+int4]
tasks: [needle]
context_tokens: 300
examples: 6
threads: 1
max_new_tokens: 4
"""

#: Counters and clocks that move by themselves, and what the kernel keeps about sizes of its own caches.
_RESTLESS = re.compile(
    r"^(fs\.(dentry-state|inode-nr|inode-state|file-nr|quota)|kernel\.(random|ns_last_pid|pty\.nr|sched_domain)"
    r"|net\.netfilter\.nf_conntrack_count|vm\.stat)"
)


def host_state() -> dict[str, str]:
    """What of the host must not change."""
    commands = {
        "ip addr": ["ip", "-o", "addr"],
        "ip route": ["ip", "route", "show", "table", "all"],
        "iptables-save": ["iptables-save"],
        "sysctl -a": ["sysctl", "-a"],
    }
    state = {}
    for name, command in commands.items():
        if shutil.which(command[0]) is None:
            continue
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        lines = [re.sub(r"valid_lft \S+|preferred_lft \S+", "", line) for line in text.splitlines()]
        state[name] = "\n".join(
            line for line in lines if not _RESTLESS.match(line) and not line.startswith("#")
        )
    return state


def leftovers() -> list[str]:
    """Namespaces, mounts, interfaces and processes that look like the testbed's (processes: of this Python environment, and of
    the directory of states that TESTBED_STATE names)."""
    found = (
        [f"namespace {p.name}" for p in Path("/run/netns").glob("tb-*")]
        if Path("/run/netns").is_dir()
        else []
    )
    found += [
        f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if "/tb-" in line
    ]
    found += [
        f"interface {p.name}"
        for p in Path("/sys/class/net").iterdir()
        if re.match(r"l\d+(a|b|ta|tb)$", p.name)
    ]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            given = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        state = os.environ.get("TESTBED_STATE")
        ours = words[0] == os.fsencode(sys.executable)
        ours = ours and (state is None or os.fsencode(f"TESTBED_STATE={state}") in given)
        if ours and any(b"testbed.endpoints" in word or b"testbed/net/" in word for word in words):
            found.append(f"process {process.name} {b' '.join(words).decode(errors='replace')[:80]}")
    return found


def testbed(*arguments: str) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "testbed", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def torture(kills: int, seed: int, directory: Path, model: Path, scenario: str = SCENARIO) -> dict[str, Any]:
    """Kill a run `kills` times at random moments, then let it end. Returns what was found."""
    generator = random.Random(seed)
    path = directory / "killed.yaml"
    path.write_text(scenario + f"model: {model}\n")
    out = directory / "run"
    before = host_state()
    untidy: list[list[str]] = []
    killed_at: list[int] = []
    ended = 0
    mine = set(leftovers())
    for _ in range(kills):
        process = _start(path, out)
        _let_run(process, out, generator)
        ended += process.poll() is not None
        process.kill()
        process.communicate()
        killed_at.append(_rows(out))
        subprocess.run([sys.executable, "-m", "testbed", "clean"], cwd=ROOT, check=True, capture_output=True)
        untidy.append(sorted(set(settled(mine)) - mine))
    last = _start(path, out)
    _, errors = last.communicate()
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().split("\n") if line]
    times = Counter(row["trial"] for row in rows)
    after = host_state()
    changed = {name: _difference(before[name], after[name]) for name in before if before[name] != after[name]}
    return {
        "kills": kills,
        "ended_before_the_kill": ended,
        "rows_when_killed": killed_at,
        "left_behind_after_clean": [items for items in untidy if items],
        "final_exit_status": last.returncode,
        "final_errors": errors[-500:] if last.returncode else "",
        "trials": len(rows),
        "expected": 6 * 2 * 5,
        "repeated": [trial for trial, n in times.items() if n > 1],
        "failed": sum(bool(row["error"]) for row in rows),
        "host_changed": changed,
    }


def _start(scenario: Path, out: Path) -> subprocess.Popen[str]:
    """Begin the run, or continue it. On a busy machine links may be out of tolerance, which is not what this is about."""
    if (out / "manifest.json").exists():
        return testbed("run", "--resume", str(out), "--accept-uncalibrated")
    shutil.rmtree(out, ignore_errors=True)
    return testbed("run", str(scenario), "--out", str(out), "--accept-uncalibrated")


def _let_run(process: subprocess.Popen[str], out: Path, generator: random.Random) -> None:
    """Until a random moment: of the set-up (by the clock), or of the trials (a few rows on, and a little more)."""
    kind = generator.random()
    if kind < 0.2:
        rows, patience = 0, generator.uniform(0.0, 1.0)
    elif kind < 0.5:
        rows, patience = 0, generator.uniform(1.0, 14.0)
    else:
        rows, patience = generator.randint(1, 3), 120.0
    target, deadline = _rows(out) + rows if rows else math.inf, time.monotonic() + patience
    while time.monotonic() < deadline and _rows(out) < target and process.poll() is None:
        time.sleep(0.01)
    if rows:
        time.sleep(generator.uniform(0.0, 0.3))


def settled(mine: set[str]) -> list[str]:
    """`leftovers` once the kernel has had a moment to reap what was killed."""
    for _ in range(20):
        found = leftovers()
        if not set(found) - mine:
            break
        time.sleep(0.1)
    return found


def _rows(out: Path) -> int:
    path = out / "trials.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _difference(before: str, after: str) -> list[str]:
    return sorted(set(before.splitlines()) ^ set(after.splitlines()))[:20]


def main() -> int:
    """Print what was found; exit status 1 where anything was left, repeated, missing or changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    from tests.tiny_models import tiny_model_directory

    with tempfile.TemporaryDirectory() as name:
        model = tiny_model_directory("llama", Path(name) / "model")
        result = torture(arguments.kills, arguments.seed, Path(name), model)
    good = not result["left_behind_after_clean"] and not result["repeated"] and not result["host_changed"]
    good = good and result["trials"] == result["expected"] and result["final_exit_status"] == 0
    if arguments.json:
        print(json.dumps(result, indent=2))
    else:
        for key, value in result.items():
            print(f"{key:<26} {value}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
