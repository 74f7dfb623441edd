"""Kill a run with SIGKILL again and again, clean up, resume, and count: nothing left behind, every trial exactly once.

    sudo .venv/bin/python -m benchmarks.kill_resume [--kills 20] [--pipeline [RUN …] [--stop | --interrupt]] [--json]

The model is a tiny random one; the namespaces, links, sockets and processes are real. What the host's own network looks like
(``ip addr``, ``ip route``, ``iptables-save``, ``sysctl -a``) is compared before and after.

--pipeline: runs of every placement, delivery and transport on a link of 4 Mbit/s, so that most of a trial is transmission. In
turn the whole run is killed, its edge, and its cloud; with --stop, edge and cloud are stopped (SIGSTOP) instead, and the run has
to end by itself; with --interrupt, the run has SIGINT and SIGTERM in turn, and has to leave nothing before anything is cleaned.
Their links and machine are not measured first.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.command import hear_signals

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

_PIPELINE = """\
name: killed
emulator: userspace
profiles: ["rate=4mbit,delay=5ms"]
tasks: [needle]
context_tokens: 300
threads: 1
max_new_tokens: 4
"""
_ADAPTIVE = "adaptive(levels=[int8, int4, text, skip], deadline=5s, chunk=64, policy=ewma)"
_BY_PARTS = "whole, stream(chunk=64), 'stream(by=layers, chunk=1)', meet(chunk=64)"
#: Each delivery by each transport that takes it, for each placement.
PIPELINE = {
    "tcp": f"""{_PIPELINE}
placements: [split, store, cloud, edge]
codecs: [int8]
transport: [tcp, tcp(connection=reuse)]
delivery: [{_BY_PARTS}, "{_ADAPTIVE}"]
examples: 3
""",
    "quic": f"""{_PIPELINE}
placements: [split, store, cloud, edge]
codecs: [planes]
transport: [quic, tcp]
delivery: [{_BY_PARTS}, progressive(planes=2), "{_ADAPTIVE}"]
examples: 3
""",
    "datagram": f"""{_PIPELINE}
placements: [split, store, cloud, edge]
codecs: [planes]
transport: [datagram, datagram(connection=reuse)]
delivery: [whole, stream(chunk=64), progressive(planes=2), "{_ADAPTIVE}"]
examples: 5
""",
    "scout": f"""{_PIPELINE}
placements: [scout, store]
codecs: [random@0.5, window@0.5]
transport: [tcp, quic]
delivery: [whole, stream(chunk=64)]
examples: 5
""",
}
VICTIMS = ("run", "edge", "cloud")
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
#: How long a run whose endpoint is gone or stands still may take to end.
_ENDS_S = 60.0

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


def testbed(*arguments: str, measured: bool = True) -> subprocess.Popen[str]:
    """Start the command line in a process of its own. measured: it measures its links first."""
    return subprocess.Popen(
        [sys.executable, "-m", "testbed" if measured else "tests.runs", *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_signals,
        process_group=0,  # all of which a terminal's Ctrl-C interrupts
    )


def torture(
    kills: int,
    seed: int,
    directory: Path,
    model: Path,
    scenario: str = SCENARIO,
    victims: Sequence[str] = VICTIMS[:1],
    fates: Sequence[signal.Signals] = (signal.SIGKILL,),
    measured: bool = True,
) -> dict[str, Any]:
    """Send a run or one of its endpoints a signal, `kills` times at random moments, victims and signals in turn, then let it end.
    Returns what was found."""
    generator = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    path, out = directory / "killed.yaml", directory / "run"
    path.write_text(scenario + f"model: {model}\n")
    before, mine = host_state(), set(leftovers())
    untidy: list[list[str]] = []
    killed_at: list[int] = []
    ends: list[dict[str, Any]] = []
    for number in range(kills):
        victim, fate = victims[number % len(victims)], fates[number % len(fates)]
        process = _start(path, out, measured)
        try:
            _let_run(process, out, generator, amid=victim != "run" or fate in INTERRUPTS)
            ends.append(_end(process, victim, fate))
        except BaseException:
            process.terminate()
            raise
        killed_at.append(_rows(out))
        if fate in INTERRUPTS:
            untidy.append(sorted(set(settled(mine)) - mine))
        subprocess.run([sys.executable, "-m", "testbed", "clean"], cwd=ROOT, check=True, capture_output=True)
        untidy.append(sorted(set(settled(mine)) - mine))
    last = _start(path, out, measured)
    _, errors = last.communicate()
    rows = [json.loads(line) for line in (out / "trials.jsonl").read_text().split("\n") if line]
    times = Counter(row["trial"] for row in rows if not row["error"])
    after = host_state()
    changed = {name: difference(before[name], after[name]) for name in before if before[name] != after[name]}
    return {
        "kills": {victim: sum(end["victim"] == victim for end in ends) for victim in victims},
        "ended_before_the_kill": sum(end["before"] for end in ends),
        "longest_until_ended_s": max((end["took_s"] for end in ends), default=0.0),
        "said": sorted({end["said"] for end in ends if end["said"]})[:6],
        "rows_when_killed": killed_at,
        "exit_statuses": sorted({end["status"] for end in ends}),
        "left_behind_after_clean": [items for items in untidy if items],
        "final_exit_status": last.returncode,
        "final_errors": errors[-500:] if last.returncode else "",
        "trials": len(times),
        "expected": json.loads((out / "manifest.json").read_text())["trials"],
        "repeated": [trial for trial, n in times.items() if n > 1],
        "failed": sum(bool(row["error"]) for row in rows),
        "failed_and_not_made_again": sorted({row["trial"] for row in rows if row["error"]} - set(times)),
        "host_changed": changed,
    }


def _end(process: subprocess.Popen[str], victim: str, fate: signal.Signals) -> dict[str, Any]:
    """Send the run or its endpoint that signal, and wait until the run has ended; how long that took, how, what it said."""
    pid = process.pid if victim == "run" else _endpoint(process.pid, victim)
    before, started, said = process.poll() is not None, time.monotonic(), ""
    if pid is not None and not before:
        (os.killpg if fate == signal.SIGINT else os.kill)(pid, fate)
    try:
        said = process.communicate(timeout=_ENDS_S)[1]
    except subprocess.TimeoutExpired:
        said = f"has not ended in {_ENDS_S:g} s"
        process.kill()
        process.communicate()
    took_s = time.monotonic() - started
    words = re.findall(r"the (?:edge|cloud) process.*?\)|has not ended.*", said) or said.splitlines()[-1:]
    said = re.sub(r"\d[\d.]*", "N", words[0]) if words and process.returncode != -signal.SIGKILL else ""
    about = {"victim": victim, "before": before, "took_s": round(took_s, 2), "status": process.returncode}
    return {**about, "said": said}


def _endpoint(pid: int, side: str) -> int | None:
    """That side's process among what a process has started; None: there is none."""
    waiting = [pid]
    while waiting:
        each = waiting.pop()
        try:
            words = Path(f"/proc/{each}/cmdline").read_bytes().split(b"\0")
            children = [task.read_text().split() for task in Path(f"/proc/{each}/task").glob("*/children")]
        except OSError:
            continue
        if f"testbed.endpoints.{side}".encode() in words:
            return each
        waiting += [int(child) for own in children for child in own]
    return None


def _start(scenario: Path, out: Path, measured: bool = True) -> subprocess.Popen[str]:
    """Begin the run, or continue it. On a busy machine links may be out of tolerance, which is not what this is about."""
    if (out / "manifest.json").exists():
        return testbed("run", "--resume", str(out), "--accept-uncalibrated", measured=measured)
    shutil.rmtree(out, ignore_errors=True)
    return testbed("run", str(scenario), "--out", str(out), "--accept-uncalibrated", measured=measured)


def _let_run(process: subprocess.Popen[str], out: Path, generator: random.Random, amid: bool = False) -> None:
    """Until a random moment: of the set-up (by the clock), or of the trials (a few rows on, and a little more). amid: of the
    trials."""
    kind = 1.0 if amid else generator.random()
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


def difference(before: str, after: str) -> list[str]:
    return sorted(set(before.splitlines()) ^ set(after.splitlines()))[:20]


def good(found: dict[str, Any]) -> bool:
    """Whether nothing was left, repeated, missing or changed."""
    wrong = ("left_behind_after_clean", "repeated", "failed_and_not_made_again", "host_changed")
    ended = found["trials"] == found["expected"] and found["final_exit_status"] == 0
    return ended and not any(found[name] for name in wrong) and found["longest_until_ended_s"] < _ENDS_S


def _asked_for(options: argparse.Namespace) -> tuple[Sequence[str], Sequence[signal.Signals]]:
    """Whom to send signals, and which."""
    if options.interrupt:
        return VICTIMS[:1], INTERRUPTS
    return (VICTIMS[1:], (signal.SIGSTOP,)) if options.stop else (VICTIMS, (signal.SIGKILL,))


def main() -> int:
    """Print what was found; exit status 1 where anything was left, repeated, missing or changed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipeline", nargs="*", choices=list(PIPELINE), help="these runs, or all of them")
    parser.add_argument("--stop", action="store_true", help="stop edge and cloud")
    parser.add_argument("--interrupt", action="store_true", help="interrupt the run")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from tests.tiny_models import tiny_model_directory

    results = {}
    with tempfile.TemporaryDirectory() as name:
        about = (options.kills, options.seed)
        model = tiny_model_directory("llama", Path(name) / "model")
        if options.pipeline is None:
            results[""] = torture(*about, Path(name) / "plain", model)
        else:
            victims, fates = _asked_for(options)
            for run in options.pipeline or PIPELINE:
                results[run] = torture(
                    *about, Path(name) / run, model, PIPELINE[run], victims, fates, measured=False
                )
    if options.json:
        print(json.dumps(results if options.pipeline is not None else results[""], indent=2))
    else:
        for run, result in results.items():
            for key, value in {**({"run": run} if run else {}), **result}.items():
                print(f"{key:<26} {value}")
            print()
    return 0 if all(map(good, results.values())) else 1


if __name__ == "__main__":
    sys.exit(main())
