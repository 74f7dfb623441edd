"""`testbed run --array`: the shards of a run as an array of Slurm's jobs, and their merge behind them, as a shell script."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from testbed.errors import UsageError

if TYPE_CHECKING:
    from testbed.experiment.scenario import Plan

#: Beside what computes: the link's relay, and who asks.
_BESIDES = 2
#: Processors of a task where the scenario leaves the threads to the machine.
_UNSAID = 4

_SCRIPT = """\
#!/bin/sh
# {count} shards of {name} as an array of jobs, and their merge behind them.
# Submit:  sh FILE        some of them again:  sh FILE 3,7        (what is finished is not repeated)
{notes}set -e
cd {cwd}
mkdir -p {shards}
array=$(sbatch --parsable --job-name={name} --array="${{1:-1-{count}}}" {resources} \\
    --requeue --open-mode=append --output={log} <<'END'
#!/bin/sh
exec {run}
END
)
# Where something is missing it says so, and writes nothing.
sbatch --job-name={name}-merge --dependency="afterany:${{array%%;*}}" --output={merge_log} --wrap={merge}
"""


def script(
    plan: Plan, scenario: str, count: int, out: Path, rootless: bool, more: list[str], program: str
) -> str:
    """The script. more: further options of each shard's run; program: that runs `testbed`. Raises UsageError where there are
    fewer examples than shards."""
    from testbed.experiment.shard import Shard
    from testbed.experiment.shards import FOLDER, check_shares

    check_shares(plan, count)
    if not Shard(count, count).trials(plan):
        raise UsageError(f"--array {count}: there are fewer examples than that to be dealt out")
    run = [scenario, "--out", str(out), *more, *(["--rootless"] if rootless else [])]
    log = out / FOLDER
    return _SCRIPT.format(
        count=count,
        name=plan.scenario.name,
        notes="".join(f"# {note}\n" for note in _notes(plan)),
        cwd=shlex.quote(str(Path.cwd())),
        shards=shlex.quote(str(log)),
        resources=" ".join(_resources(plan)),
        log=shlex.quote(f"{log}/%a-of-{count}.log"),
        run=f'{program} run --shard "$SLURM_ARRAY_TASK_ID/{count}" {shlex.join(run)}',
        merge_log=shlex.quote(f"{log}/merge.log"),
        merge=shlex.quote(f"{program} merge {shlex.quote(str(out))}"),
    )


def program() -> str:
    """How this testbed is called, from anywhere."""
    called = Path(sys.argv[0])
    if called.name == "testbed" and called.exists():
        return shlex.quote(str(called.absolute()))
    return shlex.join([sys.executable, "-m", "testbed"])


def options(accept_uncalibrated: bool, changes: dict[str, Any]) -> list[str]:
    """What was given besides, as it is given."""
    given = [f"--set={text}" for text in changes.get("assignments") or ()]
    given += [f"--codec={text}" for text in changes.get("codecs") or ()]
    given += [f"--link={name}={text}" for name, text in (changes.get("links") or {}).items()]
    given += [f"--{key}={changes[key]}" for key in ("examples", "emulator") if changes.get(key)]
    given += ["--placement-free"] if changes.get("placement_free") else []
    return given + (["--accept-uncalibrated"] if accept_uncalibrated else [])


def _resources(plan: Plan) -> list[str]:
    """What a task asks for. Where chunks overlap, both sides compute at a time."""
    from testbed.delivery.delivery import Pipelined

    scenario = plan.scenario
    sides = 2 if any(isinstance(delivery, Pipelined) for delivery in scenario.delivery) else 1
    cpus = _UNSAID if scenario.threads is None else sides * scenario.threads + _BESIDES
    gpu = any(word.startswith("cuda") for word in (scenario.device.edge, scenario.device.cloud))
    return [f"--cpus-per-task={cpus}", "--exclusive", *(["--gres=gpu:1"] if gpu else [])]


def _notes(plan: Plan) -> list[str]:
    notes = ["Each task has a node for itself (--exclusive): what else runs there disturbs its times."]
    if plan.scenario.threads is None:
        notes.append(
            "The scenario has no `threads`: nodes with other numbers of processors compute in other numbers of threads."
        )
    return notes
