"""Kills workers, machines and drivers of a Ray cluster in mid-run: every trial has to have its row, once, when all is done.

    sudo .venv/bin/python -m benchmarks.cluster_kills SCENARIO [--kills 10] [--a-run 2] [--machines 3] [--seed 0] [--json]

A cluster of so many raylets, of a lane each, on this machine; `testbed run --ray` drives it. At random moments of each run so
many of its workers, raylets and drivers are killed (SIGKILL); a raylet is replaced, a driver's run resumed. At last the rows are
compared with those of a run without a cluster: answers, bytes, kept tokens. So is the host with itself before: addresses,
routes, rules, settings, and what the testbed left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.kill_resume import difference, host_state, leftovers
from testbed.experiment.cluster import LANE
from testbed.experiment.results import RunDirectory

KINDS = ("worker", "machine", "driver")
SAME = ("answer", "payload_bytes", "payload_digest", "kept_digest", "tokens_kept")
_PATIENCE_S = 600.0


class Machines:
    """Raylets of this machine, each with a lane."""

    def __init__(self, count: int) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        self._nodes = [self._node() for _ in range(count)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _node(self) -> Any:
        return self._cluster.add_node(num_cpus=1, resources={LANE: 1})

    def lose(self, number: int) -> None:
        """One dies, and another takes its place."""
        self._cluster.remove_node(self._nodes.pop(number % len(self._nodes)), allow_graceful=False)
        self._nodes.append(self._node())

    def close(self) -> None:
        self._cluster.shutdown()


def workers() -> list[int]:
    """The processes of Ray that make a shard for this benchmark: those that started the programs which do."""
    state = os.fsencode(f"TESTBED_STATE={os.environ['TESTBED_STATE']}")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            if b"--resume" in words and state in (process / "environ").read_bytes().split(b"\0"):
                parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if (Path("/proc") / str(parent) / "cmdline").read_bytes().startswith(b"ray::work"):
                    found.append(parent)
        except OSError:
            continue
    return found


def driver(*arguments: str) -> subprocess.Popen[str]:
    """`testbed run` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "testbed", "run", *arguments, "--accept-uncalibrated"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def made(out: Path) -> int:
    """How many rows the shards have."""
    return sum(file.read_bytes().count(b"\n") for file in out.glob("shards/*/trials.jsonl"))


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> bool:
    """Until it holds; False: the process ended before."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def killed(
    scenario: str,
    out: Path,
    machines: Machines,
    kinds: list[str],
    dice: random.Random,
    trials: int = 4,
    within_s: float = 3.0,
) -> Counter[str]:
    """Run it, with a kill of each of these kinds, one after the other, at random moments of its first so many trials; how many
    met a run."""
    place = ("--ray", machines.address)
    process, met = driver(scenario, "--out", str(out), *place), Counter[str]()
    moments = sorted(dice.randrange(trials) for _ in kinds)
    for kind, enough in zip(kinds, moments, strict=True):
        if not wait_for(lambda enough=enough: made(out) >= enough and bool(workers()), process):  # type: ignore[misc]
            break
        time.sleep(dice.uniform(0.0, within_s))
        if kind == "worker" and (there := workers()):
            os.kill(dice.choice(there), signal.SIGKILL)
        elif kind == "machine":
            machines.lose(dice.randrange(8))
        else:
            process.kill()
            process.wait()
            process = driver("--resume", str(out), *place)
        met[kind] += 1
    while (said := process.communicate(timeout=_PATIENCE_S)[1]) and process.returncode:
        if met["again"] > 2:
            raise SystemExit(f"the run does not end: {said[-2000:]}")
        met["again"] += 1
        process = driver("--resume", str(out), *place)
    return met


def rows(path: Path) -> dict[str, tuple[Any, ...]]:
    """What has to be alike, by trial. Raises SystemExit where one has two rows, or failed."""
    found = list(RunDirectory.open(path).rows())
    wrong = [row["trial"] for row in found if row["error"]]
    if wrong or len({row["trial"] for row in found}) < len(found):
        raise SystemExit(f"{path}: trials failed or came twice: {wrong[:5]}")
    return {row["trial"]: tuple(row[key] for key in SAME) for row in found}


def main() -> None:
    """Print what the kills came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("scenario")
    parser.add_argument("--kills", type=int, default=10, help="of each kind")
    parser.add_argument("--a-run", type=int, default=2, help="of each kind")
    parser.add_argument("--machines", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    with tempfile.TemporaryDirectory(prefix="tb-kills-") as directory:
        os.environ["TESTBED_STATE"] = str(Path(directory) / "state")
        (Path(directory) / "state").mkdir()
        alone = Path(directory) / "alone"
        driver(options.scenario, "--out", str(alone)).communicate()
        wanted, before, host = rows(alone), set(leftovers()), host_state()
        machines, met, runs = Machines(options.machines), Counter[str](), 0
        try:
            left = dict.fromkeys(KINDS, options.kills)
            while any(left.values()):
                kinds = [kind for kind in KINDS for _ in range(min(left[kind], options.a_run))]
                dice.shuffle(kinds)
                runs += 1
                out = Path(directory) / f"run-{runs}"
                came = killed(options.scenario, out, machines, kinds, dice, len(wanted) * 9 // 10)
                met += came
                left = {kind: max(0, options.kills - met[kind]) for kind in KINDS}
                if rows(out) != wanted:
                    raise SystemExit(f"{out}: rows are not those of the run without a cluster")
                print(f"run {runs}: {dict(came)}", file=sys.stderr)
        finally:
            machines.close()
        subprocess.run([sys.executable, "-m", "testbed", "clean"], check=True, stdout=subprocess.DEVNULL)
        gone = sorted(set(leftovers()) - before)
        for name, text in host_state().items():
            gone += [f"{name}: {line}" for line in difference(host.get(name, ""), text)]
    figures = {"trials": len(wanted), "runs": runs, "kills": dict(met), "left on the host": gone}
    if options.json:
        print(json.dumps(figures))
        return
    print(
        f"{runs} runs of {len(wanted)} trials on {options.machines} machines: every trial once, as without a cluster"
    )
    for kind in KINDS:
        print(f"  {kind:8} killed {met[kind]} times")
    print(
        f"  begun again by hand, since a shard was lost too often: {met['again']} times; left on the host: {gone or 'nothing'}"
    )


if __name__ == "__main__":
    main()
