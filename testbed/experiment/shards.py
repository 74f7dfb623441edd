"""Shards of a plan, each a run of its own in a directory of its own: begun, taken up again, found.

OUT/shards/3-of-16/     the third of sixteen: a run's directory like any other. Nothing but its own process writes into it.

`merge` puts them together. Whoever has many machines calls `run` on each of them, and needs to know no more.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from testbed.endpoints.protocol import Span
from testbed.errors import UsageError
from testbed.experiment import inputs
from testbed.experiment.progress import Watcher
from testbed.experiment.results import RunDirectory
from testbed.experiment.row import Row
from testbed.experiment.runner import Runner, begin, check_ready, shard_of, take_up
from testbed.experiment.scenario import Plan
from testbed.experiment.session import Opening, as_asked
from testbed.experiment.shard import Shard, of_folder

FOLDER = "shards"
#: In a run's manifest: that it was put together from shards, and from which.
MERGED = "merged"
OnRow = Callable[[Row, Sequence[Span]], None]


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a shard. trials: that it has; finished: of these, by now; failed: in this start, the last time they were
    made; settled: there was nothing left to do."""

    shard: Shard
    path: Path
    trials: int
    finished: int
    failed: int
    settled: bool

    @property
    def complete(self) -> bool:
        """Whether every trial has its row."""
        return self.finished >= self.trials


def run(
    plan: Plan,
    shard: Shard,
    directory: Path,
    *,
    on_row: OnRow | None = None,
    on_progress: Watcher | None = None,
    accept_uncalibrated: bool = False,
    opening: Opening = as_asked,
) -> ShardOutcome:
    """Make a shard's trials in `directory`/shards/…, those that have no finished row there yet.

    on_row: given every row of this start, with its spans, once both are on the disk. Raises UsageError where the directory is of
    another plan, or another process works on this shard; NetworkError, EndpointError, StorageError and KeyboardInterrupt as a
    run does: the rows so far stay.
    """
    runner = prepare(plan, shard, directory, on_progress or _unwatched, accept_uncalibrated)
    runner.on_row = on_row
    runner.opening = opening
    runner.execute()
    return outcome(runner)


def prepare(
    plan: Plan,
    shard: Shard,
    directory: Path,
    watch: Watcher,
    accept_uncalibrated: bool = False,
    elsewhere: bool = False,
) -> Runner:
    """A shard that is yet to be executed: begun anew, or taken up where it ended. elsewhere: it is executed there, and does not
    have to be executable here. Raises UsageError.
    """
    check_shares(plan, shard.count)
    check_place(directory)
    path = place(directory, shard)
    for other in found_in(directory):
        known = of_folder(other.name)
        if known is not None and known.count != shard.count:
            raise UsageError(
                f"{directory} has shards of {known.count}, and {shard} is one of {shard.count}; choose another --out"
            )
    if not (path / "manifest.json").exists():
        if not elsewhere:
            check_ready(plan)
        if (sibling := _begun(directory)) is not None:
            check_same(plan, sibling)
        runner = Runner(plan, begin(plan, path, shard), watch, accept_uncalibrated, shard=shard)
        runner.resumed = True
        return runner
    directory_of = begun(directory, shard)
    check_same(plan, directory_of)
    return take_up(plan, directory_of, watch, accept_uncalibrated, elsewhere)


def begun(directory: Path, shard: Shard) -> RunDirectory:
    """That shard of a run in `directory`, which has begun. Raises UsageError where it has not, or another lies in its place."""
    path = place(directory, shard)
    if not path.is_dir():
        raise UsageError(
            f"shard {shard} has not begun in {directory}: begin it with  testbed run SCENARIO --shard {shard} --out {directory}"
        )
    found = RunDirectory.open(path)
    if (other := shard_of(found)) != shard:
        raise UsageError(f"{path}: holds shard {other} and not {shard}; call it {other.folder} again")
    return found


def _begun(directory: Path) -> RunDirectory | None:
    """A shard of a run in `directory` that has begun. One that is damaged is whoever merges' affair."""
    for path in found_in(directory):
        with contextlib.suppress(UsageError):
            if (path / "manifest.json").exists():
                found = RunDirectory.open(path)
                found.settings()
                return found
    return None


def check_place(directory: Path) -> None:
    """Raises UsageError where shards, or what they come to, would lie in a run that was made in one piece."""
    if (directory / "manifest.json").exists() and MERGED not in RunDirectory.open(directory).manifest():
        raise UsageError(f"{directory} is a run of its own; choose another --out")


def check_shares(plan: Plan, count: int) -> None:
    """Raises UsageError where a plan is not to be made in so many shards."""
    if plan.scenario.programs is not None:
        raise UsageError(f"{count} shards: a run of programs is made in one piece")
    if plan.scenario.loaded:
        raise UsageError(
            f"{count} shards: a load is put on by one machine, since its requests meet there; make it in one piece"
        )


def outcome(runner: Runner) -> ShardOutcome:
    """What became of a shard whose runner has ended."""
    planned = runner.directory.manifest().get("trials")
    trials = planned if isinstance(planned, int) else runner.shard.trials(runner.plan)
    finished = len(runner.directory.finished())
    return ShardOutcome(
        runner.shard, runner.directory.path, trials, finished, runner.failures, runner.settled
    )


def place(directory: Path, shard: Shard) -> Path:
    """Where a shard of a run in `directory` lies."""
    return directory / FOLDER / shard.folder


def check_same(plan: Plan, directory: RunDirectory) -> None:
    """Raises UsageError where a run is not of this plan."""
    path = directory.path
    before, now = directory.settings(), plan.scenario.model_dump(mode="json")
    for key in dict.fromkeys([*before, *now]):
        if before.get(key) != now.get(key):
            was = (
                f"with {key} {_short(before[key])}"
                if key in before
                else f"by a testbed that knew no {key} yet"
            )
            raise UsageError(
                f"{path}: was begun {was}, and now it is {_short(now.get(key))}; "
                "choose another --out, or continue it as it was with --resume"
            )
    inputs.check_traces(directory.manifest().get("traces"), plan)


def found_in(directory: Path) -> list[Path]:
    """The directories called as shards are in ``directory/shards``, in their order."""
    inside = directory / FOLDER
    try:
        named = [(of_folder(path.name), path) for path in inside.iterdir()] if inside.is_dir() else []
    except OSError as error:
        raise UsageError(f"{inside}: cannot be read: {error.strerror}") from error
    return [path for shard, path in sorted((s, p) for s, p in named if s) if path.is_dir()]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def _unwatched(progress: object) -> None:
    """Nobody looks."""
