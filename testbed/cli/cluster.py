"""`testbed run --ray`: a run in shards on the machines of a Ray cluster, put together in one directory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from testbed.cli.progress import Console

if TYPE_CHECKING:
    from testbed.experiment.cluster import ShardEnd
    from testbed.experiment.scenario import Plan


def run_on(
    address: str,
    plan: Plan | None,
    out: Path | None,
    *,
    lanes: int | None,
    count: int | None,
    rootless: bool,
    accept_uncalibrated: bool,
) -> int:
    """Make a plan's shards, or go on with those that are in `out`, and merge them. Raises as `cluster` does."""
    from testbed.experiment import cluster
    from testbed.experiment import lanes as here

    if plan is None:
        assert out is not None
        plan = _plan_in(out)
    cluster.check(plan)
    linked = not plan.scenario.placement_free
    for sentence in here.check(plan, lanes) if address == "local" and lanes and linked else ():
        click.echo(f"testbed: {sentence}", err=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    out = out or Path("results") / f"{plan.scenario.name}-{stamp}"
    options = ["--rootless"] if rootless else []
    show = Console()
    try:
        with cluster.connected(address, lanes) as there:
            shares = cluster.count_of(out, plan, there, count)
            ends = cluster.run(plan, out, shares, show, options, accept_uncalibrated=accept_uncalibrated)
    except KeyboardInterrupt:
        show.close()
        click.echo(
            f"testbed: interrupted; continue with  testbed run --resume {out} --ray {address}", err=True
        )
        return 130
    finally:
        show.close()
    return _end(ends, out, address)


def _end(ends: Sequence[ShardEnd], out: Path, address: str) -> int:
    from testbed.cli.merge import put_together

    for error, number in Counter(end.error for end in ends if end.error).items():
        first = next(end for end in ends if end.error == error)
        others = f" (and {number - 1} more)" if number > 1 else ""
        click.echo(
            f"testbed: shard {first.shard}{others} on {' then '.join(first.hosts) or 'no machine'}: {error}",
            err=True,
        )
    if any(end.error for end in ends):
        click.echo(
            f"testbed: rows so far are in {out}; continue with  testbed run --resume {out} --ray {address}",
            err=True,
        )
        return 1
    return put_together((out,), out, partial=False)


def _plan_in(out: Path) -> Plan:
    from testbed.errors import UsageError
    from testbed.experiment import runner, shards

    found = shards.found_in(out)
    if not found:
        raise UsageError(
            f"{out}: has no shards that --ray could go on with; leave --ray away, or begin with a scenario"
        )
    return runner.plan_of(found[0])
