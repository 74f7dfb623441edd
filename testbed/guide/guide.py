"""The procedure on a model: a run without a network measures one codec after the other, and its rows answer each step."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testbed.analysis.claims import rules
from testbed.analysis.run import load
from testbed.codecs.spec import parse
from testbed.diagnosis import request
from testbed.errors import SpecError, UsageError
from testbed.experiment import inputs
from testbed.experiment.placement_free import off_link
from testbed.experiment.plan import make_plan
from testbed.experiment.progress import Watcher
from testbed.experiment.results import RunDirectory
from testbed.experiment.runner import Runner, begin
from testbed.experiment.scenario import Plan
from testbed.experiment.session import in_one_process
from testbed.guide.procedure import FORMS, HIGH, RATIOS, UNFIT, YES, Diagnosed, Question, Step, judge, steps
from testbed.models.sources import resolve
from testbed.net.loopback import LOOPBACK
from testbed.tasks.task import parse_task

_DIAGNOSIS = "diagnosis.json"


@dataclass(frozen=True)
class Subject:
    """What the procedure is to be followed with. `task`: as a scenario writes it; `diagnosed`: examples that rank the layers (as
    many more choose); `smaller`: how many times smaller is small enough (None: as small as holds).
    """

    model: str
    task: Any = "needle"
    context_tokens: int = 512
    examples: int = rules.LEAST
    diagnosed: int = 8
    smaller: float | None = None
    threads: int | None = None

    def directory(self) -> Path:
        """Where the same question finds its rows again."""
        model = re.sub(r"[^\w.-]+", "-", resolve(self.model).name).strip("-.")
        task = re.sub(r"[^\w.-]+", "-", parse_task(self.task).label).strip("-.")
        return Path("results") / f"guide-{model}-{task}-{self.context_tokens}"

    def settings(self) -> dict[str, Any]:
        """As a scenario."""
        model = resolve(self.model)
        return {
            "name": "guide",
            "description": "the deployment procedure, measured without a link",
            "model": self.model if Path(self.model).exists() else model.name,
            "tasks": [self.task],
            "context_tokens": self.context_tokens,
            "examples": self.examples,
            "codecs": ["int8", *FORMS.values(), *(f"q2c@{ratio:g}" for ratio in RATIOS)],
            "threads": self.threads,
            "timeout": "1h",
        }


def measured(
    subject: Subject, path: Path, watch: Watcher, say: Callable[[str], None], answered: Callable[[Step], None]
) -> tuple[list[Step], int]:
    """The steps, measured into the run directory `path`, and how many trials failed; what is there already is not repeated.

    `say`: gets the diagnosis' progress; `answered`: each step. Raises UsageError for a wrong request or a
    directory that other settings were measured into, EndpointError where a process fails, KeyboardInterrupt; the rows so far
    stay.
    """
    plan = unlinked(subject.settings(), "guide")
    directory = _open(path, plan)
    runner = Runner(plan, directory, watch, opening=in_one_process)
    answers: list[Step] = []

    def measure(question: Question, codecs: Sequence[str]) -> Step:
        for number, codec in enumerate(codecs, 1):
            runner.try_codec(parse(codec))
            step = judge(load(path), question, codecs[:number])
            if step.answer in (YES, UNFIT):
                break
        return step

    def diagnose(scale: str) -> Diagnosed:
        return _diagnosis(subject, scale, path, say)

    with runner.on():
        for step in steps(measure, diagnose, subject.smaller):
            answers.append(step)
            answered(step)
    return answers, runner.failures


def unlinked(settings: dict[str, Any], place: str) -> Plan:
    """The plan of these scenario settings, on no link. Raises UsageError naming `place`."""
    return off_link(make_plan({**settings, "profiles": ["delay=0ms"]}, place), LOOPBACK)


def _open(path: Path, plan: Plan) -> RunDirectory:
    """The directory, new or continued."""
    if not (path / "manifest.json").is_file():
        return begin(plan, path)
    directory, now = RunDirectory.open(path), plan.scenario.model_dump(mode="json")
    before = directory.settings()
    for key in ("name", "model", "tasks", "context_tokens", "seed", "prompt"):
        if before.get(key) != now[key]:
            raise UsageError(
                f"{path} was measured with {key} {before.get(key)}, not {now[key]}; choose another --out"
            )
    inputs.check_unchanged(directory.manifest().get("inputs"), plan)
    return directory


def _diagnosis(subject: Subject, scale: str, path: Path, say: Callable[[str], None]) -> Diagnosed:
    """The diagnosis that lies in the directory, where it was made for the same question; else a new one."""
    task = subject.task if isinstance(subject.task, dict) else {"task": subject.task}
    settings = {
        "model": subject.model,
        "task": task["task"],
        "parameters": {key: value for key, value in task.items() if key != "task"},
        "context_tokens": subject.context_tokens,
        "examples": subject.diagnosed,
        "scale": scale,
        "high": HIGH,
        "epsilon": rules.ALIKE,
        "threads": subject.threads,
    }
    diagnosis = _known(path / _DIAGNOSIS, {**settings, "model": resolve(subject.model).name})
    if diagnosis is None:
        diagnosis = request.diagnosed(settings, say)
        request.write(path / _DIAGNOSIS, diagnosis)
    return Diagnosed(
        diagnosis["protect"],
        diagnosis["verdict"].startswith("bottleneck"),
        diagnosis["verdict"],
        diagnosis["examples"],
    )


def _known(path: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    from testbed.codecs.diagnosed import load_diagnosis

    try:
        diagnosis = load_diagnosis(path)
    except SpecError:
        return None
    return diagnosis if all(diagnosis.get(key) == value for key, value in settings.items()) else None
