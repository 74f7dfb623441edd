"""`testbed run`."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.cli import completion
from testbed.cli.parts import enter_rootless, require_root, rootless_flag, sweep_options
from testbed.cli.progress import Console
from testbed.errors import StorageError, TestbedError, UsageError

if TYPE_CHECKING:
    from testbed.experiment.runner import Runner
    from testbed.experiment.scenario import Plan
    from testbed.experiment.shard import Shard

INTERRUPTED = 130


@click.command()
@click.argument("scenario", required=False, shell_complete=completion.scenarios)
@click.option(
    "--resume",
    "resumed",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Continue a run where it ended, and repeat its failed trials.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The run's directory [default: results/NAME-TIME].",
)
@click.option(
    "--accept-uncalibrated",
    is_flag=True,
    help="Go on where a link is not what was asked for, or the machine too busy to compare; every row says so.",
)
@click.option(
    "--shard",
    metavar="I/N",
    help="Make the I-th of N parts of the run, into OUT/shards; `auto`: as a Slurm array says. See `testbed merge`.",
)
@click.option(
    "--array",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="Print a script that runs N shards as an array of Slurm's jobs, and merges them, into --out.",
)
@click.option(
    "--ray",
    "cluster",
    metavar="ADDRESS",
    help="Run in shards on a Ray cluster's machines: `auto`, an address, or `local`, one on this machine.",
)
@click.option(
    "--lanes", type=click.IntRange(1, 64), metavar="N", help="How many shards run at once with --ray local."
)
@click.option(
    "--shards",
    "shares",
    type=click.IntRange(1, 100_000),
    metavar="N",
    help="In how many shards --ray runs [one a lane].",
)
@sweep_options
@rootless_flag
def run(
    scenario: str | None,
    resumed: Path | None,
    out: Path | None,
    accept_uncalibrated: bool,
    shard: str | None,
    array: int | None,
    cluster: str | None,
    lanes: int | None,
    shares: int | None,
    rootless: bool,
    **changes: Any,
) -> int:
    """Run SCENARIO (a file, or the name of a shipped one): network, model, trials, plots."""
    if rootless and cluster is None:  # whose machines do so themselves
        enter_rootless()
    from testbed.experiment import runner, shards
    from testbed.experiment.environment import too_much
    from testbed.experiment.plan import load_plan, moved

    if (scenario is None) == (resumed is None):
        raise UsageError("name a scenario to run, or a directory with --resume, and not both")
    if array is not None:
        return _print_array(scenario, array, out, accept_uncalibrated, shard, changes)
    if cluster is not None:
        return _on_cluster(cluster, scenario, resumed, out, shard, changes)(
            lanes=lanes, count=shares, rootless=rootless, accept_uncalibrated=accept_uncalibrated
        )
    if lanes or shares:
        raise UsageError("--lanes and --shards are for --ray")
    show = Console()
    part = None if shard is None else _part(shard)
    if resumed is not None:
        resumed = _begun(resumed, part)
    if resumed is not None:
        if any(value for value in (*changes.values(), out)):
            raise UsageError("--resume continues a run as it was; leave the other options away")
        _make_way(runner.plan_of(resumed))
        started = runner.resume(resumed, show, accept_uncalibrated)
        for sentence in moved(started.directory.manifest().get("asked"), started.plan.scenario.models.edge):
            show.line(sentence)
    else:
        assert scenario is not None
        plan = load_plan(scenario, **changes)
        notes = [note for profile in plan.profiles for note in profile.remarks()]
        for remark in dict.fromkeys([*notes, *plan.left_out, *too_much(plan)]):
            click.echo(f"testbed: {remark}", err=True)
        _make_way(plan)
        if part is not None:
            if out is None:
                raise UsageError(
                    "--shard needs --out DIR: one directory that all shards share, or one of each machine"
                )
            return _execute(shards.prepare(plan, part, out, show, accept_uncalibrated), show)
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        started = runner.start(
            plan, out or Path("results") / f"{plan.scenario.name}-{stamp}", show, accept_uncalibrated
        )
    return _execute(started, show)


def _print_array(
    scenario: str | None,
    count: int,
    out: Path | None,
    accept_uncalibrated: bool,
    shard: str | None,
    changes: dict[str, Any],
) -> int:
    from testbed.cli import array
    from testbed.experiment.plan import load_plan
    from testbed.hosts import rootless

    if scenario is None or out is None or shard is not None:
        raise UsageError(
            "--array takes a scenario and --out DIR, which all shards share, and no --shard or --resume"
        )
    plan = load_plan(scenario, **changes)
    unprivileged = not plan.scenario.placement_free and (rootless.inside() or os.geteuid() != 0)
    more = array.options(accept_uncalibrated, changes)
    click.echo(array.script(plan, scenario, count, out, unprivileged, more, array.program()), nl=False)
    return 0


def _on_cluster(
    address: str,
    scenario: str | None,
    resumed: Path | None,
    out: Path | None,
    shard: str | None,
    changes: dict[str, Any],
) -> Callable[..., int]:
    """`run_on` that cluster, of a scenario or what is to be resumed. Raises UsageError."""
    from testbed.cli.cluster import run_on
    from testbed.experiment.plan import load_plan

    if shard is not None:
        raise UsageError("--ray makes all shards; leave --shard away")
    if resumed is not None and any(value for value in (*changes.values(), out)):
        raise UsageError("--resume continues a run as it was; leave the other options away")
    plan = load_plan(scenario, **changes) if scenario is not None else None
    return partial(run_on, address, plan, resumed or out)


def _part(text: str) -> Shard:
    from testbed.experiment.shard import parse

    return parse(text, os.environ)


def _begun(out: Path, shard: Shard | None) -> Path:
    """Where a run, or a shard of one, lies that is in `out`. Raises UsageError where it has not begun."""
    from testbed.experiment.shards import begun, found_in

    if shard is None:
        if found_in(out) and not (out / "manifest.json").exists():
            raise UsageError(
                f"{out} has shards: say which with --shard, or put them together with  testbed merge {out}"
            )
        return out
    return begun(out, shard).path


def _make_way(plan: Plan) -> None:
    """Networks of this machine are root's to build, and what dead runs left of them goes; hosts see to that themselves."""
    from testbed.net.fabric import removal

    if plan.topology.kind == "namespaces" and not plan.scenario.placement_free:
        require_root()
        removal.clean()


def _execute(started: Runner, show: Console) -> int:
    path = started.directory.path
    try:
        started.execute()
    except KeyboardInterrupt:
        show.close()
        click.echo(f"testbed: interrupted; continue with  testbed run --resume {path}", err=True)
        return INTERRUPTED
    except (TestbedError, OSError) as error:
        show.close()
        raise _resumable(started, error) from error
    show.close()
    shard = started.directory.manifest().get("shard")
    if shard is None and started.settled:
        click.echo(f"{path} is finished: every trial has its row; draw it again with  testbed plot {path}")
        return 0
    if shard is None:
        show_results(path)
    else:
        click.echo(
            f"shard     {shard}: {'every trial has its row' if started.settled else path / 'trials.jsonl'}"
        )
    if started.failures:
        click.echo(
            f"testbed: {_failed(started)}; repeat them with  testbed run --resume {path}",
            err=True,
        )
        return 1
    return 0


def _failed(started: Runner) -> str:
    """How many trials failed, of which settings and why; the number alone where no trial was finished."""
    from testbed.analysis.describe import failures
    from testbed.analysis.run import load

    run = load(started.directory.path)
    return failures(run) if len(run.failed) else f"{started.failures} trials failed; their rows say why"


def _resumable(started: Runner, error: Exception) -> Exception:
    """What ended a run, with where its rows are and how it goes on."""
    path, message = started.directory.path, str(error)
    if isinstance(error, OSError):
        message = f"{error.filename or path}: {error.strerror or error}"
    try:
        rows = not isinstance(error, UsageError) and any(started.directory.rows())
    except (TestbedError, OSError):
        rows = False
    if rows:
        message += f"; rows so far are in {path}; continue with  testbed run --resume {path}"
    return (type(error) if isinstance(error, TestbedError) else StorageError)(message)


def show_results(path: Path) -> None:
    """Draw a finished run and say what came out: files in one line, notes, and the result last. Where there is too little to
    draw, say so: the rows are there all the same.
    """
    from testbed.analysis import layout, loads, programs, report, summary
    from testbed.analysis.figures import draw_all
    from testbed.analysis.run import load

    run, written = load(path), [path / "trials.jsonl"]
    try:
        if programs.is_one(run):
            text = programs.text(run.require(), layout.terminal_width())
            written.append(programs.write(run))
            written += draw_all(run) if len(run.rows) > 1 else []
            click.echo(f"{files_line(path, written)}\n\n{text}")
            return
        text = summary.table(run, layout.terminal_width())
        written += [summary.write(run), *filter(None, [loads.write(run)])]
        figures = draw_all(run)
        written += [report.write(run, figures), path / "comparisons.csv", *figures]
        written += filter(Path.exists, [path / "naive_error.csv"])
    except UsageError as error:
        click.echo(f"testbed: nothing to draw: {error}", err=True)
        text = ""
    click.echo(files_line(path, written))
    if text:
        click.echo("\n" + text)


def files_line(directory: Path, written: list[Path]) -> str:
    """What was written into a run's directory, in a line: figures by their number."""
    figures = [path for path in written if path.parent.name == "figures"]
    names = [path.name for path in written if path not in figures]
    if figures:
        count = len({path.stem for path in figures})
        kinds = " and ".join(sorted({path.suffix[1:].upper() for path in figures}, reverse=True))
        names.append(f"figures/ ({count}, {kinds})")
    return f"{directory}: {', '.join(names)}"
