"""`testbed merge`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from testbed.cli.run import show_results

if TYPE_CHECKING:
    from testbed.experiment.merge import Merged, Missing

#: Examples that are named of a task; the others are counted.
_NAMED = 8


@click.command()
@click.argument("directories", metavar="DIR...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Where the run is to be [default: DIR, where that is one that has shards].",
)
@click.option("--partial", is_flag=True, help="Also where trials are missing, or a shard is still running.")
@click.option("--json", "want_json", is_flag=True, help="Print one JSON object, and draw nothing.")
def merge(directories: tuple[Path, ...], out: Path | None, partial: bool, want_json: bool) -> int:
    """Put the shards of a run together (`testbed run --shard`): in DIR/shards, or each DIR one.

    Says what is missing, and then writes nothing, with exit status 1, unless --partial.
    """
    from testbed.errors import UsageError
    from testbed.experiment.shards import FOLDER

    if out is None:
        if len(directories) > 1 or (directories[0].is_dir() and not (directories[0] / FOLDER).is_dir()):
            raise UsageError("say with --out DIR where the run is to be")
        (out,) = directories
    return put_together(directories, out, partial, want_json)


def put_together(directories: Sequence[Path], out: Path, partial: bool, want_json: bool = False) -> int:
    """Merge them, and say what is missing, or show what came out; the exit status."""
    from testbed.experiment.merge import merge as merging

    merged = merging(directories, out, partial)
    if want_json:
        click.echo(json.dumps(_record(merged), indent=2, default=str))
        return 1 if merged.path is None else 0
    for line in _lacks(merged):
        click.echo(f"testbed: {line}", err=True)
    if merged.path is None:
        click.echo(
            "testbed: nothing written; run what is missing again (finished trials are not repeated), or merge what is there "
            "with --partial",
            err=True,
        )
        return 1
    show_results(merged.path)
    return 0


def _record(merged: Merged) -> dict[str, Any]:
    """For JSON."""
    missing = [
        {
            **{key: getattr(lack, key) for key in ("shard", "path", "trials", "of", "failed")},
            "examples": [
                {"task": task, "example": example, "trials": trials}
                for (task, example), trials in lack.examples.items()
            ],
        }
        for lack in merged.missing
    ]
    return {
        "path": merged.path,
        "trials": merged.trials,
        "finished": merged.finished,
        "missing": missing,
        "running": merged.running,
        "notes": merged.notes,
    }


def _lacks(merged: Merged) -> Iterator[str]:
    """What is missing, and what else to know, a line each."""
    yield from merged.notes
    for shard in merged.running:
        yield f"shard {shard} is still running: rows may be missing that it is about to write"
    for lack in merged.missing:
        yield f"shard {lack.shard} {_state(lack)}: {_examples(lack)}"
    if merged.missing:
        yield f"{merged.finished:,} of {merged.trials:,} trials have their row"


def _state(lack: Missing) -> str:
    if lack.path is None:
        return f"is nowhere: all of its {lack.of:,} trials are missing"
    failed = f" ({lack.failed:,} failed)" if lack.failed else ""
    return f"({lack.path}): {lack.trials:,} of {lack.of:,} trials are missing{failed}"


def _examples(lack: Missing) -> str:
    """The examples by name, task by task."""
    tasks: dict[str, list[str]] = {}
    for task, example in lack.examples:
        tasks.setdefault(task, []).append(example)
    return "; ".join(
        f"{task}: {', '.join(names[:_NAMED])}"
        + (f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else "")
        for task, names in tasks.items()
    )
