"""The script of an array of jobs, as an `sbatch` would have it run: each task by its variables, one preempted, then the merge."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.kill_resume import leftovers
from testbed.experiment.results import RunDirectory
from tests.command import command

#: Runs at once what Slurm would run when there is room. The first task is ended as for one of higher priority once it has a row
#: (with SIGTERM, of which there is a grace period), and requeued, that is, run again.
SBATCH = """\
#!{python}
import os, signal, subprocess, sys, time
from pathlib import Path

given = dict(argument.partition("=")[::2] for argument in sys.argv[1:])
if "--wrap" in given:
    assert given["--dependency"] == "afterany:17"
    with open(given["--output"], "a") as log:
        subprocess.run(["sh", "-c", given["--wrap"]], stdout=log, stderr=log)
    sys.exit()
assert "--requeue" in given and given["--open-mode"] == "append"
first, last = map(int, given["--array"].split("-"))
script = Path(__file__).with_name("task.sh")
script.write_text(sys.stdin.read())
for number in [first, *range(first, last + 1)]:
    with open(given["--output"].replace("%a", str(number)), "a") as log:
        task = subprocess.Popen(["sh", script], env={{**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}}, stdout=log, stderr=log)
        if not Path(__file__).with_name("preempted").exists():
            rows = Path("out/shards/1-of-2/trials.jsonl")
            while task.poll() is None and not (rows.exists() and rows.read_text()):
                time.sleep(0.02)
            task.send_signal(signal.SIGTERM)
            Path(__file__).with_name("preempted").write_text(str(task.wait()))
        task.wait()
print("17;cluster")
"""
SCENARIO = """\
name: tiny
profiles: ["rate=50mbit,delay=1ms"]
placements: [split]
codecs: [fp16, int8, int4, q2c@0.25+int4]
tasks: [needle]
context_tokens: 300
examples: 2
threads: 1
max_new_tokens: 6
emulator: userspace
"""


@pytest.mark.netns
@pytest.mark.slow
@pytest.mark.usefixtures("own_state")
def test_an_array_of_which_a_task_is_preempted_ends_in_one_whole_run(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(leftovers())
    (tmp_path / "tiny.yaml").write_text(f"{SCENARIO}model: {tiny_model('llama')}\n")
    printed = command("run", "tiny.yaml", "--array", "2", "--out", "out", "--accept-uncalibrated")
    assert printed.status == 0, printed.errors
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(SBATCH.format(python=sys.executable))
    sbatch.chmod(0o755)
    environment = {**os.environ, "PATH": f"{sbatch.parent}:{os.environ['PATH']}"}
    submitted = subprocess.run(["sh"], input=printed.out, env=environment, capture_output=True, text=True)
    assert submitted.returncode == 0, submitted.stderr
    said = {log.name: log.read_text() for log in (tmp_path / "out" / "shards").glob("*.log")}
    assert sbatch.with_name("preempted").read_text() == "130", said
    assert "interrupted; continue with" in said["1-of-2.log"]
    whole = RunDirectory.open(tmp_path / "out")
    rows = list(whole.rows())
    assert len(rows) == len({row["trial"] for row in rows}) == whole.manifest()["trials"] == 8, said
    assert not any(row["error"] for row in rows)
    assert set(whole.manifest()["merged"]["shards"]) == {"1/2", "2/2"}
    assert json.loads((tmp_path / "out" / "shards" / "1-of-2" / "manifest.json").read_text())["starts"][1:]
    assert set(leftovers()) == before
