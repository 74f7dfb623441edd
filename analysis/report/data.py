"""What the page's interactive figures and tables are drawn from: one object, which the page holds as JSON."""

from __future__ import annotations

import json
import math
from typing import Any

import pandas as pd

from testbed import files, stats
from testbed.analysis import settings, spans
from testbed.analysis.run import Run
from testbed.analysis.summary import summarise

#: Of a point: what may be an axis; name in the summary, heading, whether it is a time, whether more is better.
MEASURES = (
    ("ttft_s", "time to the first token (s)", True, False),
    ("e2e_s", "end-to-end latency (s)", True, False),
    ("score", "mean score", False, True),
    ("delta_nll", "ΔNLL (nats/token)", False, False),
    ("kl", "KL from the full cache (nats/token)", False, False),
)
_MOST_ROWS = 5000  #: answers that the page shows one by one
_MOST_TEXT = 300  #: characters of an answer or a question
_QUESTIONS = "questions.jsonl"


def of(run: Run) -> dict[str, Any]:
    """`measures`; `points`, one a link, task and setting; `answers`, one a trial; `questions`, by task and example; `spans`, of
    each link's and setting's request with the median latency."""
    shown = [each for each in MEASURES if not (run.untimed and each[2])]
    points, rows = _points(run), settings.labelled(run.attempts)
    shown = [each for each in shown if any(point[each[0]] is not None for point in points)]
    return {
        "measures": [{"name": n, "title": t, "time": time, "more": more} for n, t, time, more in shown],
        "points": points,
        "answers": _answers(rows),
        "questions": _questions(run),
        "spans": [] if run.untimed else _spans(run, rows),
    }


def as_json(data: dict[str, Any]) -> str:
    """As text that may stand in a page's `<script>`."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _points(run: Run) -> list[dict[str, Any]]:
    rows = settings.labelled(run.attempts)
    named = rows.groupby(["cell", "task"], sort=False)[["panel", "setting"]].first()
    points = []
    for line in summarise(run).to_dict("records"):
        own = rows[(rows["cell"] == line["cell"]) & (rows["task"] == line["task"])]
        answered = settings.finished(own)
        kl = stats.mean(settings.KL.values(answered), settings.clusters(answered))
        line |= {"kl": kl.value, "kl_lo": kl.low, "kl_hi": kl.high}
        panel, setting = named.loc[(line["cell"], line["task"])]
        point = {"link": panel, "task": line["task"], "setting": setting, "n": int(line["n"])}
        point |= {"failed": int(line["failed"]), "bytes": _number(line["payload_bytes"])}
        for name, *_ in MEASURES:
            point |= {name + end: _number(line[name + end]) for end in ("", "_lo", "_hi")}
        points.append(point)
    return points


def _number(value: Any) -> float | None:
    """With five digits; None for what is not finite."""
    return float(f"{float(value):.5g}") if math.isfinite(float(value)) else None


def _answers(rows: pd.DataFrame) -> list[list[Any]]:
    """Link, task, setting, example, score, seconds to the first token, answer, reference answer, error."""
    return [
        [
            row["panel"],
            row["task"],
            row["setting"],
            row["example"],
            _number(row["score"]),
            _number(row["ttft_s"]),
            str(row["answer"])[:_MOST_TEXT],
            str(row["reference_answer"])[:_MOST_TEXT],
            str(row["error"]).split("\n", 1)[0][:_MOST_TEXT],
        ]
        for row in rows.head(_MOST_ROWS).to_dict("records")
    ]


def _questions(run: Run) -> dict[str, list[str]]:
    """Question and gold answer of each task's examples, under both names with a unit separator between them; empty where the
    run's directory has none."""
    found: dict[str, list[str]] = {}
    try:
        with files.reading(run.path / _QUESTIONS) as lines:
            for line in lines:
                one = json.loads(line)
                texts = [str(one[key])[:_MOST_TEXT] for key in ("question", "gold")]
                found[f"{one['task']}\x1f{one['example']}"] = texts
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return found


def _spans(run: Run, rows: pd.DataFrame) -> list[list[Any]]:
    """Link, setting, example, and what was at work: stage, side, chunk, level, bytes, begin, end."""
    drawn, known = [], dict(list(spans.spans(run).groupby("trial", sort=False)))
    for (panel, setting), own in settings.finished(rows).groupby(["panel", "setting"], sort=False):
        row = own.loc[own["e2e_s"].sort_values(kind="stable").index[(len(own) - 1) // 2]]
        table = known.get(row["trial"])
        each = spans.of_stages(row) if table is None else table
        work = [
            [
                s["stage"],
                s["side"],
                s["chunk"],
                s["level"],
                s["bytes"],
                _number(s["start_s"]),
                _number(s["end_s"]),
            ]
            for s in each.to_dict("records")
        ]
        drawn.append([panel, setting, row["example"], work])
    return drawn
