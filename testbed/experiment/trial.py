"""One request of one cell, and the row that it leaves."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from testbed.experiment.compute import SIDES
from testbed.experiment.results import utc_now
from testbed.experiment.row import Row
from testbed.experiment.scenario import Cell, Plan
from testbed.speed.words import Speed
from testbed.tasks.task import Example


@dataclass(frozen=True)
class Trial:
    """What is asked, and where: the example is the `number`th of the edge's batch `batch`; `cell_id`: the cell's identity."""

    cell: Cell
    cell_id: str
    repeat: int
    batch: int
    number: int
    example: Example
    gold: str  #: the answer's text as the model should write it

    @property
    def id(self) -> str:
        """The same trial has the same one in every start of a run."""
        text = f"{self.cell_id}/{self.example.id}/{self.repeat}"
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True)
class Reference:
    """The full cache's answer to an example, scored. What went wrong with it is its `error`, which every trial of it meets.

    edge_nll: of the edge's own model, where that is another and a placement answers by it.
    """

    context_tokens: int = 0
    kv_bytes: int = 0
    answer: str = ""
    score: float | None = None
    nll: float | None = None
    edge_nll: float | None = None
    error: str = ""


def new_row(trial: Trial, plan: Plan, emulator: str, reference: Reference, calibrated: bool) -> Row:
    """The trial's row with all that is known before it runs."""
    scenario, cell = plan.scenario, trial.cell
    steady = cell.profile.steady()
    return Row(
        trial=trial.id,
        cell=trial.cell_id,
        repeat=trial.repeat,
        started_at=utc_now(),
        model=scenario.models.cloud,
        edge_model="" if scenario.one_model else scenario.models.edge,
        task=task_label(plan, cell.task, cell.context_tokens),
        example=trial.example.id,
        context_tokens=reference.context_tokens,
        placement=cell.placement,
        codec=cell.codec_text,
        delivery=str(cell.delivery),
        profile=cell.profile.name,
        link=plan.link,
        emulator=emulator,
        transport="" if cell.placement == "edge" else str(cell.transport),
        congestion="",
        rate_up_bps=cell.profile.up.mean_rate_bps("up"),
        rate_down_bps=cell.profile.down.mean_rate_bps("down"),
        delay_up_s=steady.up.delay_s,
        delay_down_s=steady.down.delay_s,
        loss_up=steady.up.loss,
        loss_down=steady.down.loss,
        kv_bytes=reference.kv_bytes,
        questions_per_context=scenario.questions_per_context,
        load=str(cell.load),
        serving=str(cell.serving),
        allocate=str(cell.allocate or ""),
        **_speeds(plan),
        reference_answer=reference.answer,
        reference_score=reference.score,
        reference_nll=reference.nll,
        calibrated=calibrated,
        warnings="" if calibrated else "link out of tolerance",
    )


def _speeds(plan: Plan) -> dict[str, Any]:
    """The columns of how both sides compute."""
    columns: dict[str, Any] = {}
    for side in SIDES:
        speed: Speed = getattr(plan.scenario.compute, side)
        columns |= {
            f"{side}_slowdown": speed.prefill,
            f"{side}_decode_slowdown": speed.decode,
            f"{side}_device": plan.devices[side].name if speed.device else "",
        }
    return columns


def task_label(plan: Plan, task: int, context_tokens: int | None) -> str:
    """A task as rows name it: with its parameters, and the context length where the scenario has several."""
    label = plan.tasks[task].label
    return f"{label}@{context_tokens or 'own'}" if len(plan.scenario.context_tokens) > 1 else label
