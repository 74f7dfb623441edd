"""``report.html``: a run on one page that needs nothing but a browser."""

from __future__ import annotations

import base64
import importlib
import inspect
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from testbed.analysis import adaptive, claims, comparisons, hosts, naive
from testbed.analysis.describe import caveats, computing, models, subject
from testbed.analysis.figures import FIGURES, draw_all
from testbed.analysis.report import data, vega
from testbed.analysis.run import Run
from testbed.analysis.settings import QUALITY_FLOOR, labelled
from testbed.analysis.summary import Panel, outcomes, summarise, table
from testbed.net.calibration.outcome import outcomes as calibrations

Column = tuple[str, str, int | None]
#: Columns of the table: name in the summary, heading, digits.
COLUMNS: tuple[Column, ...] = (
    ("profile", "link", None),
    ("placement", "placement", None),
    ("codec", "codec", None),
    ("task", "task", None),
    ("n", "n", 0),
    ("e2e_s", "latency (s)", 3),
    ("latency_ratio", "over the baseline ×", 2),
    ("ttft_s", "first token (s)", 3),
    ("transmit_s_mean", "transmit (s)", 3),
    ("score", "score", 3),
    ("delta_nll", "ΔNLL", 3),
    ("payload_bytes", "payload (B)", 0),
    ("ratio", "smaller ×", 2),
    ("failed", "failed", 0),
)
#: The page's sections: anchor, heading.
_CONTENTS = (
    ("answer", "what came out"),
    ("explore", "explore"),
    ("table", "every setting"),
    ("examples", "examples"),
    ("spans", "one request"),
    ("figures", "figures"),
    ("claims", "claims"),
    ("run", "how it was measured"),
    ("calibration", "the links"),
    ("glossary", "words"),
)
_GLOSSARY = (
    (
        "first token",
        "seconds from the request's start until the first token of the answer is known at the edge",
    ),
    ("latency", "the same, or until the last token, as it says"),
    ("quality", "the mean score of the answers by the task's metric, 0 to 1"),
    ("ΔNLL", "by how many nats a token the gold answer is less likely than given the full cache"),
    (
        "KL",
        "divergence of the next token's distribution from the full cache's, over the gold answer's tokens",
    ),
    ("payload", "bytes of the compressed cache, headers and scales included"),
    (
        "store, split, cloud, edge",
        "the cache lay at the edge before; the edge prefills first; the text crosses; nothing crosses",
    ),
    ("n", "examples behind a figure"),
    ("brackets", "95 % interval over examples"),
    ("not shown to be slower", "a tie: the paired difference from the fastest may be chance"),
)
_ENOUGH = 20  #: examples below which no order of settings on a link is taken for shown, as claims have it
_PAGE_BYTES = 2_000_000  #: at most, unless figures have to be unreadable for it
#: Colours of a figure's pixels on the page, and how large it is: as much as there is room for.
_LOOKS = ((64, 1.0), (24, 1.0), (12, 1.0), (12, 0.7), (8, 0.5))

_WIDE = 120  #: characters of a line of what the terminal prints
_OF_TIMES = {"e2e_s", "latency_ratio", "ttft_s", "transmit_s_mean"}
_WITH_INTERVAL = {"e2e_s", "latency_ratio", "ttft_s", "score", "delta_nll"}


def write(run: Run, figures: list[Path] | None = None) -> Path:
    """Write ``report.html`` with the figures inside, ``comparisons.csv`` and ``naive_error.csv`` beside it; returns the page's
    path.

    `figures`: files as `draw_all` returned them; None draws all. Raises UsageError for a run without finished
    trials.
    """
    run.require()
    if figures is None:
        figures = draw_all(run) if len(run.rows) > 1 else []
    drawn = [p for p in figures if p.suffix == ".png"]
    comparisons.write(run)
    naive.write(run)
    page = render(run, drawn)
    return run.write("report.html", lambda to: to.write_text(page, encoding="utf-8"))


def render(run: Run, figures: list[Path]) -> str:
    """The page as text."""
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        autoescape=True, loader=jinja2.FileSystemLoader(here), undefined=jinja2.StrictUndefined
    )
    judged, left_out = claims.judge([run])
    came_out = [] if run.untimed else outcomes(run)
    shown = [column for column in COLUMNS if not (run.untimed and column[0] in _OF_TIMES)]
    missing = [name for name in FIGURES if name not in {p.stem for p in figures}]
    page = environment.get_template("page.html")
    told: dict[str, Any] = {
        "title": str(run.manifest.get("name") or run.path.name),
        "description": str(run.scenario.get("description") or ""),
        "subject": subject(run.rows),
        "contents": _CONTENTS,
        "glossary": _GLOSSARY,
        "floor": f"{QUALITY_FLOOR:.0%}",
        "latency": run.latency,
        "answers": [_answer(panel) for panel in came_out],
        "doubts": [doubt for panel in came_out for doubt in _doubts(panel)],
        "facts": _facts(run),
        "caveats": _caveats(run),
        "missing": missing,
        "calibration": _calibration(run),
        "columns": [heading for _, heading, _ in shown],
        "lines": _lines(run, summarise(run), shown),
        "comparisons": "\n\n".join(
            filter(None, [comparisons.text(comparisons.against(run)), comparisons.latency_text(run)])
        ),
        "formula": naive.text(run),
        "hosts": hosts.text(run),
        "deadlines": adaptive.text(run),
        "headline": table(run, _WIDE),
        "claims": judged,
        "left_out": left_out,
        "data": data.as_json(data.of(run)),
        "script_vega": vega.bundle(),
        "scripts": [(here / name).read_text(encoding="utf-8") for name in ("explore.js", "table.js")],
        "style": (here / "page.css").read_text(encoding="utf-8"),
    }
    about = [(path.stem, _about(path.stem), _shown(path)) for path in figures]
    bare = page.render(figures=[(*each, "") for each in about], **told)
    pictures = _pictures(figures, _PAGE_BYTES - len(bare.encode()))
    return page.render(figures=[(*each, one) for each, one in zip(about, pictures, strict=True)], **told)


def _answer(panel: Panel) -> dict[str, str]:
    """A line of what came out on a link."""
    about = {"link": panel.name, "conditions": f"{panel.conditions} · {panel.reference}"}
    if panel.chosen is None:
        return about | {"setting": "none", "latency": panel.nothing, "n": "", "ties": ""}
    latency = panel.chosen.latency
    interval = (
        f" [{latency.low:.3f}, {latency.high:.3f}]" if math.isfinite(latency.low + latency.high) else ""
    )
    return about | {
        "setting": panel.chosen.label,
        "latency": f"{latency.value:.3f} s{interval}",
        "n": str(latency.n),
        "ties": ", ".join(panel.level),
    }


def _doubts(panel: Panel) -> list[str]:
    """What the figures of a link do not show, a sentence each."""
    if panel.chosen is None:
        return []
    doubts, n = [], panel.chosen.latency.n
    if panel.level:
        doubts.append(
            f"On {panel.name} it is not shown that {panel.chosen.label} is faster than {', '.join(panel.level)}."
        )
    if n < _ENOUGH:
        doubts.append(
            f"On {panel.name} each setting has {n} examples, below {_ENOUGH}: no order of settings is taken for shown."
        )
    return doubts


def _about(name: str) -> str:
    """What a figure shows, in a sentence."""
    module, function = FIGURES[name].split(":")
    text = inspect.getdoc(getattr(importlib.import_module(module), function)) or name
    return " ".join(text.split()).split(" Raises ")[0]


def _shown(path: Path) -> str:
    """What a figure's file says that it shows, of this run."""
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get("Description", path.stem))


def _pictures(figures: list[Path], room: int) -> list[str]:
    """Figures for the page, in base64: in so many colours, and so large, that together they are within `room` bytes."""
    for look in _LOOKS:
        made = [base64.b64encode(_picture(path, *look)).decode() for path in figures]
        if sum(map(len, made)) <= room:
            break
    return made


def _picture(path: Path, colors: int, scale: float) -> bytes:
    from PIL import Image

    small = io.BytesIO()
    with Image.open(path) as image:
        plain = image.convert("RGB")
        if scale < 1:
            plain = plain.resize(
                (round(plain.width * scale), round(plain.height * scale)), Image.Resampling.LANCZOS
            )
        few = plain.quantize(colors, method=Image.Quantize.FASTOCTREE)
        few.convert("RGB").save(small, "WEBP", lossless=True, method=2, quality=20)
    return small.getvalue()


def _facts(run: Run) -> list[tuple[str, str]]:
    facts = [
        ("started", str(run.manifest.get("created") or "")),
        ("model", models(run.rows)),
        ("links", ", ".join(map(str, run.rows["profile"].unique()))),
        ("emulator", ", ".join(e for e in map(str, run.rows["emulator"].unique()) if e)),
        ("transport", ", ".join(t for t in map(str, run.rows["transport"].unique()) if t)),
        ("compute", computing(run)),
        ("trials", f"{len(run.rows)} finished, {len(run.failed)} failed"),
    ]
    host = run.manifest.get("host")
    for key, value in host.items() if isinstance(host, dict) else ():
        text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        if key == "memory_bytes" and isinstance(value, int):
            text = f"{value / 1e9:.1f} GB"
        facts.append((str(key).removesuffix("_bytes").replace("_", " "), text))
    return [(name, value) for name, value in facts if value]


def _caveats(run: Run) -> list[str]:
    sentences = caveats(run)
    sentences += _emulated(run.rows)
    warned = run.rows.loc[(run.rows["warnings"] != "") & run.rows["calibrated"], "warnings"]
    if len(warned):
        sentences.append(f"The first warning: {str(warned.iloc[0])[:200]}")
    if len(run.failed):
        first = str(run.failed["error"].iloc[0]).splitlines()[0][:200]
        sentences.append(f"The first failure: {first}")
    return sentences


def _emulated(rows: pd.DataFrame) -> list[str]:
    """What of a run's compute was not this machine's own."""
    columns = [f"{side}_{what}" for side in ("edge", "cloud") for what in ("slowdown", "decode_slowdown")]
    slowed, sentences = rows[(rows[columns] > 1).any(axis=1)], []
    if len(slowed):
        most = [slowed[columns[i : i + 2]].max().max() for i in (0, 2)]
        sentences.append(
            f"Compute is emulated in {len(slowed)} trials: stages stretched by up to "
            f"{float(most[0]):g} at the edge and {float(most[1]):g} in the cloud."
        )
    return sentences


def _calibration(run: Run) -> list[dict[str, Any]]:
    """Each profile's last measurement: asked, measured, verdict."""
    verdicts = {True: "ok", False: "OUT", None: "–"}
    return [
        {"profile": outcome.label, **check.line(), "ok": verdicts[check.ok]}
        for outcome in calibrations(run.calibration)
        for check in outcome.checks
    ]


def _lines(
    run: Run, summary: pd.DataFrame, columns: Sequence[Column]
) -> list[tuple[str, list[tuple[str, str]]]]:
    """For each line its setting, and of each column what is shown and what it sorts by."""
    named = labelled(run.attempts).groupby("cell")["setting"].first()
    return [
        (str(named[row["cell"]]), [_cell(row, name, digits) for name, _, digits in columns])
        for _, row in summary.iterrows()
    ]


def _cell(row: pd.Series[Any], name: str, digits: int | None) -> tuple[str, str]:
    value = row[name]
    if digits is None:
        return str(value) or "–", str(value)
    number = float(value)
    if number == math.inf:  # most of its trials failed
        return "none", "1e308"
    if not math.isfinite(number):
        return "–", ""
    shown = f"{number:,.{digits}f}"
    if name in _WITH_INTERVAL and math.isfinite(float(row[f"{name}_lo"])):
        shown += f" [{row[f'{name}_lo']:.{digits}f}, {row[f'{name}_hi']:.{digits}f}]"
    return shown, repr(number)
