"""`testbed guide`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from testbed.cli.parts import as_json, open_run
from testbed.cli.progress import Console
from testbed.errors import UsageError


@click.command()
@click.argument("subjects", metavar="MODEL|RUN...", nargs=-1, required=True)
@click.option("--task", default="needle", show_default=True, help="A task, or '{task: qa, path: FILE}'.")
@click.option("--context-tokens", type=click.IntRange(8), default=512, show_default=True)
@click.option(
    "--examples", type=click.IntRange(2), default=50, show_default=True, help="A step; fewer decide nothing."
)
@click.option(
    "--diagnosed",
    type=click.IntRange(2),
    default=8,
    show_default=True,
    help="Examples that rank layers; as many more choose.",
)
@click.option(
    "--smaller", type=click.FloatRange(1), metavar="TIMES", help="End where so much smaller is shown."
)
@click.option("--threads", type=click.IntRange(1), help="Of the processor.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The rows' directory [default: results/guide-…].",
)
@as_json
def guide(subjects: tuple[str, ...], out: Path | None, **options: Any) -> Any:
    """Walk the published deployment procedure: INT8, INT4, diagnosis, mixed precision, Q2C.

    With MODEL each step is measured, without a network and without root, until one is not enough; a second call goes on from
    the rows that are there. With RUN... the rows of these runs answer.
    """
    from testbed.guide import procedure

    runs = [Path(subject) for subject in subjects if _is_run(Path(subject))]
    if len(runs) == len(subjects):
        answers, left_out = procedure.answered([open_run(path) for path in runs])
        models = {model: [step.to_dict() for step in steps] for model, steps in answers.items()}
        return {"models": models, "left_out": left_out}, procedure.text(answers, left_out), 0
    if len(subjects) > 1:
        raise UsageError("name one model to measure, or the directories of runs, and not both")
    return _measured(subjects[0], out, **options)


def _is_run(path: Path) -> bool:
    return (path / "trials.jsonl").is_file() or (path / "manifest.json").is_file()


def _measured(model: str, out: Path | None, task: str, **options: Any) -> tuple[dict[str, Any], str, int]:
    from testbed import strict_yaml
    from testbed.guide import procedure
    from testbed.guide.guide import Subject, measured

    subject = Subject(model, task=strict_yaml.parse(task, "--task"), **options)
    path = out or subject.directory()
    show = Console()
    count = 0

    def answered(step: procedure.Step) -> None:
        nonlocal count
        count += 1
        show.line("\n".join(procedure.described(count, step)))

    try:
        steps, failures = measured(subject, path, show, show.line, answered)
    except KeyboardInterrupt:
        show.line(f"the same command goes on from the rows in {path}")
        raise
    finally:
        show.close()
    value = {
        "models": {model: [step.to_dict() for step in steps]},
        "left_out": [],
        "directory": str(path),
        "failed": failures,
    }
    if failures:
        click.echo(
            f"testbed: {failures} trials failed; their rows say why, and the same command repeats them",
            err=True,
        )
    return value, f"{procedure.text({model: steps}, [])}\nrows in {path}", 1 if failures else 0
