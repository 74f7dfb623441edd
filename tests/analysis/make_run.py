"""Writes a run directory with plausible rows, as a source of known input for the figures' and tables' tests.

Nothing here is a measurement: latencies follow from bytes and rates, qualities from a table, both with
seeded noise.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from testbed.analysis import summary
from testbed.analysis.figures import draw_all
from testbed.analysis.run import load
from testbed.codecs.diagnosed import FORMAT as DIAGNOSIS_FORMAT
from testbed.experiment.results import FORMAT
from testbed.experiment.row import STAGES, Row, in_turn
from testbed.net.calibration.calibrate import Attempt, Calibration
from testbed.net.calibration.checks import delay_check, loss_check, rate_check
from testbed.net.calibration.outcome import Check, Curve
from testbed.net.calibration.probes import Arrived
from testbed.net.calibration.traces import curve_checks
from testbed.net.emulators.relay.userspace import Userspace
from testbed.net.profile.profile import Direction

#: profile -> rate up and down (bit/s), one-way delay (s), loss
PROFILES: dict[str, tuple[float, float, float, float]] = {
    "5g-good": (100e6, 300e6, 0.008, 0.0),
    "5g-mid": (30e6, 100e6, 0.015, 0.001),
    "5g-edge": (5e6, 15e6, 0.030, 0.01),
    "lte": (10e6, 30e6, 0.035, 0.005),
}
#: links that differ in one condition alone
SWEEP: dict[str, tuple[float, float, float, float]] = {
    f"rate={rate}mbit,delay={delay}ms": (rate * 1e6, rate * 1e6, delay / 1e3, 0.0)
    for rate in (5, 20, 80)
    for delay in (10, 40)
}
#: codec -> share of the fp16 cache's bytes, probability of a right answer, mean rise of the NLL
CODECS: dict[str, tuple[float, float, float]] = {
    "fp16": (1.0, 0.80, 0.0),
    "int8": (0.53, 0.80, 0.002),
    "int4": (0.28, 0.70, 0.12),
    "q2c@0.5+int8": (0.27, 0.78, 0.05),
    "q2c@0.25+int8": (0.135, 0.72, 0.2),
    "q2c@0.25+int4": (0.072, 0.60, 0.35),
    "snapkv@0.25+int8": (0.135, 0.55, 0.7),
    "h2o@0.25+int8": (0.135, 0.35, 1.3),
    "window@0.25+int8": (0.135, 0.25, 1.9),
    "random@0.25+int8": (0.135, 0.15, 2.6),
}
KV_BYTES = 480 * 2 * 30 * 3 * 64 * 2  # tokens, K and V, layers, heads, head size, bytes


def make_run(
    path: Path,
    profiles: tuple[str, ...] = tuple(PROFILES),
    codecs: tuple[str, ...] = tuple(CODECS),
    placements: tuple[str, ...] = ("split", "cloud", "edge"),
    tasks: tuple[str, ...] = ("passages", "needle"),
    examples: int = 20,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write manifest, calibration and trials; `overrides` are `Row` fields that every row gets."""
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True, exist_ok=True)
    settings = [("split", c) for c in codecs if "split" in placements] + [
        (p, "") for p in placements if p != "split"
    ]
    rows = [
        dataclasses.replace(_row(rng, profile, placement, codec, task, example), **overrides)
        for profile in profiles
        for placement, codec in settings
        for task in tasks
        for example in range(examples)
    ]
    manifest = {
        "format": FORMAT,
        "scenario": {"name": "synthetic", "model": "smollm2-135m"},
        "emulator": "userspace",
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    (path / "calibration.json").write_text("{}")
    rewrite(path, [dataclasses.asdict(row) for row in rows])
    return path


def write_calibration(
    path: Path, profiles: tuple[str, ...], off: tuple[str, ...] = (), trace: str = ""
) -> None:
    """Write what calibration would: links a little off, those of `off` at 90 % of their rate, one that follows a sine."""
    rng = np.random.default_rng(1)
    measurements = []
    for profile in profiles:
        attempts = []
        for _ in range(2 if profile in off else 1):
            checks = [c for way in ("up", "down") for c in _checks(rng, way, profile, profile in off)]
            curves = _curves(rng) if profile == trace else ()
            checks += [check for curve in curves for check in curve_checks(curve, Userspace)]
            attempts.append(Attempt(tuple(checks), {}, curves=curves))
        made = Calibration("wan", profile, "userspace", tuple(attempts))
        measurements.append({"profile": profile, "measured_at": "2025-01-01T12:00:00Z", **made.to_dict()})
    (path / "calibration.json").write_text(json.dumps({"format": FORMAT, "measurements": measurements}))


def _checks(rng: np.random.Generator, way: str, profile: str, off: bool) -> list[Check]:
    """Judged by the project's own rules, on packets that were never sent."""
    # A profile that is not one of these has no rate.
    up, down, delay, loss = (PROFILES | SWEEP).get(profile, (None, None, 0.02, 0.01))
    direction = Direction(rate_bps=up if way == "up" else down, delay_s=delay, loss=loss)
    n, size = 1000, 1500
    spacing = size * 8 / (direction.rate_bps or 1e6) / (0.9 if off else 1.0)
    times = [delay + i * spacing * (1 + float(rng.normal(0, 1e-5))) for i in range(n)]
    full = Arrived(n, 1.0, 0.0, list(range(n)), [0.0] * n, times)
    sent = [0.01 * i for i in range(n)]
    came = [i for i in range(n) if rng.random() >= loss]
    late = [sent[i] + delay + 51 * 8 / 1e9 + abs(float(rng.normal(0, 1e-4))) for i in came]
    sparse = Arrived(n, 10.0, 0.0, came, [sent[i] for i in came], late)
    return [
        rate_check(way, direction, full, size),
        delay_check(way, direction, sparse, 64),
        loss_check(way, direction, sparse),
    ]


def _curves(rng: np.random.Generator) -> tuple[Curve, ...]:
    asked = 250e3 + 150e3 * np.sin(np.arange(80) / 6)
    delivered = (asked + rng.normal(0, 1500, (2, 80))).astype(int).tolist()
    return tuple(
        Curve(way, 0.0, 0.1, tuple(asked.tolist()), tuple(d))
        for way, d in zip(("up", "down"), delivered, strict=True)
    )


def write_diagnosis(path: Path) -> Path:
    """Write what `testbed diagnose` would of a model of three layers."""
    one = {"mean": 0.1, "low": 0.05, "high": 0.2}
    places = [
        {"layer": layer, "kind": kind, "damage": {"kl": one}, "won": one}
        for layer in range(3)
        for kind in ("keys", "values")
    ]
    found = {
        "format": DIAGNOSIS_FORMAT,
        "protect": "K1",
        "verdict": "bottleneck: K1",
        "model": "tiny",
        "bits": 4,
        "task": "needle",
    }
    found |= {"context_tokens": 128, "examples": 2, "places": places, "all_quantized": {"kl": one}}
    path.write_text(json.dumps(found))
    return path


def losing(path: Path, rise: dict[str, float], n: int = 80, **row: Any) -> Path:
    """A run on one link with these codecs, whose NLL rises by so much on average, with noise between `n` examples."""
    make_run(path, ("5g-edge",), ("fp16",), tasks=("needle",), examples=n, reference_score=1.0)
    plain = [r for r in lines(path) if r["codec"] == "fp16"]
    rng = np.random.default_rng(1)
    rows = []
    for codec, mean in rise.items():
        for r in plain:
            nll = r["reference_nll"] + mean * float(rng.uniform(0.5, 1.5))
            rows.append(r | {"codec": codec, "nll": nll, "trial": f"{codec}/{r['example']}", **row})
    rewrite(path, rows)
    return path


def lines(run: Path) -> list[dict[str, Any]]:
    """The rows as they are written."""
    return [json.loads(line) for line in (run / "trials.jsonl").read_text().split("\n") if line]


def rewrite(run: Path, rows: list[dict[str, Any]]) -> None:
    """These rows, and no others."""
    (run / "trials.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def change(run: Path, how: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """Every row with what `how` makes of some of its columns."""
    rewrite(run, [row | how(row) for row in lines(run)])
    return run


def write_manifest(run: Path, **entries: Any) -> None:
    """These entries besides those that are there."""
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def _row(rng: np.random.Generator, profile: str, placement: str, codec: str, task: str, example: int) -> Row:
    up, down, delay, loss = (PROFILES | SWEEP)[profile]
    share, right, rise = CODECS.get(codec, (0.0, 0.8, 0.0))
    easy = np.random.default_rng([example, len(task)]).random()  # the same example is as hard for every codec
    jitter = float(rng.lognormal(0, 0.06))
    payload = int(KV_BYTES * share) if placement == "split" else 1900 if placement == "cloud" else 0
    stages = dict.fromkeys(STAGES, 0.0)
    if placement != "cloud":
        stages["prefill_s"] = 0.55 * jitter
    if placement != "edge":
        goodput = up if loss == 0 else min(up, 1460 * 8 * 1.2 / (2 * delay * loss**0.5))
        stages["connect_s"] = 2 * delay + 0.0004
        stages["transmit_s"] = delay + payload * 8 * 1.05 / goodput * float(rng.lognormal(0, 0.1))
        stages["decode_s"] = (0.01 + payload * 2e-9) * jitter if placement == "split" else 0.0
    if placement == "split":
        stages["select_s"] = 0.02 * jitter if "@" in codec else 0.0
        stages["encode_s"] = (0.015 + share * 0.03) * jitter if codec != "fp16" else 0.004
    stages["first_token_s"] = (0.06 if placement != "cloud" else 0.5) * jitter + (
        delay if placement != "edge" else 0
    )
    stages["generate_s"] = 0.03 * int(rng.integers(2, 9)) * jitter
    correct = easy < right + float(rng.normal(0, 0.05)) * (codec != "fp16")
    f1 = 1.0 if correct else round(float(rng.beta(0.6, 3)), 3)
    nll = 0.4 + easy
    row = Row(
        trial=f"{profile}/{placement}/{codec}/{task}/{example}",
        cell=f"{profile}/{placement}/{codec}/{task}",
        repeat=0,
        started_at="2025-01-01T12:00:00Z",
        model="smollm2-135m",
        task=task,
        example=f"{task}-{example}",
        context_tokens=480 - example,
        placement=placement,
        codec=codec,
        delivery="whole",
        profile=profile,
        link="wan",
        emulator="userspace",
        transport="tcp",
        congestion="cubic",
        rate_up_bps=up,
        rate_down_bps=down,
        delay_up_s=delay,
        delay_down_s=delay,
        loss_up=loss,
        loss_down=loss,
        **stages,
        ttft_s=sum(stages.values()) - stages["generate_s"],
        e2e_s=sum(stages.values()),
        reused="prefill" if example else "",
        kv_bytes=KV_BYTES,
        payload_bytes=payload,
        wire_bytes=int(payload * 1.05) + 3000,
        retransmits=int(rng.poisson(payload / 1460 * loss)),
        tokens_kept=480,
        bits_per_element=16 * share,
        answer="x",
        score=f1 if task == "passages" else float(correct),
        em=float(correct),
        f1=f1,
        reference_answer="x",
        reference_score=1.0 if easy < 0.8 else 0.2 * (task == "passages"),
        nll=nll + rise * float(rng.gamma(2, 0.5)) if codec else nll,
        kl=0.8 * rise * (0.5 + easy),
        reference_nll=nll,
    )
    return dataclasses.replace(row, **in_turn(dataclasses.asdict(row)))


def headline(run: Path) -> str:
    """The terminal's table."""
    return summary.table(load(run))


def draw(run: Path, names: list[str] | None = None) -> list[Path]:
    """The figures, written into the run's directory."""
    return draw_all(load(run), names)
