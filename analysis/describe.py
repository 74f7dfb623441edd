"""A run in words: what was run, over which links, and what a reader must know about it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from testbed.analysis import hosts, settings
from testbed.analysis.run import Run
from testbed.units import format_fraction, positional

_NAMED = 12  #: so many settings that failed are named
_REASON = 90  #: characters of what an error says


def conditions(rows: pd.DataFrame) -> str:
    """A panel's link in words, such as ``↑ 30 ↓ 100 Mbit/s · 15 ms one way · 0.1% loss``."""
    if (rows["emulator"] == "none").all():
        return "no link"
    up, down = rows["rate_up_bps"].median(), rows["rate_down_bps"].median()
    rate = f"{_rate(up)} Mbit/s" if _same(up, down) else f"↑ {_rate(up)}  ↓ {_rate(down)} Mbit/s"
    if up != up and down != down:
        rate = "no rate limit"
    delays = [f"{rows[c].median() * 1e3:.3g}" for c in ("delay_up_s", "delay_down_s")]
    losses = [format_fraction(float(rows[c].median())) for c in ("loss_up", "loss_down")]
    delay = f"{delays[0]} ms one way" if delays[0] == delays[1] else f"↑ {delays[0]}  ↓ {delays[1]} ms"
    loss = f"{losses[0]} loss" if losses[0] == losses[1] else f"loss ↑ {losses[0]}  ↓ {losses[1]}"
    trusted = "" if bool(rows["calibrated"].all()) else " · out of tolerance"
    changes = "means of a trace: " if "trace_s" in rows and rows["trace_s"].notna().any() else ""
    return f"{changes}{rate} · {delay} · {'no loss' if losses == ['0%', '0%'] else loss}{trusted}"


def _same(a: float, b: float) -> bool:
    return a == b or (a != a and b != b)


def _rate(bits_per_second: float) -> str:
    return "∞" if bits_per_second != bits_per_second else positional(f"{bits_per_second / 1e6:.4g}")


def models(rows: pd.DataFrame) -> str:
    """The models, and the edge's where that is another, such as ``qwen2.5-coder-1.5b (edge: qwen2.5-coder-0.5b)``."""
    pairs = rows[["model", "edge_model"]].drop_duplicates().itertuples(index=False)
    named = (f"{model} (edge: {edge})" if edge else str(model) for model, edge in pairs if model)
    return ", ".join(dict.fromkeys(named))


def subject(rows: pd.DataFrame) -> str:
    """What was run, for a subtitle: model, tasks, examples, emulator."""
    tasks = rows.groupby("task", sort=False)["example"].nunique()
    sizes = f"n = {tasks.min()}" if tasks.min() == tasks.max() else f"n = {tasks.min()} to {tasks.max()}"
    emulators = ", ".join(str(e) for e in rows["emulator"].unique() if e not in ("", "none"))
    parts = [
        models(rows),
        *sorted(set(map(str, settings.replayed(rows))) - {""}),
        f"{' + '.join(map(str, tasks.index))}, {sizes} examples{' each' if len(tasks) > 1 else ''}",
    ]
    return " · ".join([p for p in parts if p] + ([f"{emulators} emulator"] if emulators else []))


def caveats(run: Run) -> list[str]:
    """What a reader must know about these rows, a sentence each: reuse, links out of tolerance, failures,
    gaps.
    """
    rows, sentences = run.rows, []
    if run.where:
        sentences.append(f"Only rows where {run.where}.")
    sentences += [*elsewhere(rows), *hosts.caveats(run)]
    reused = rows["reused"].str.split(",").explode().str.strip()
    shares = reused[reused.fillna("") != ""].value_counts() / max(1, len(rows))
    if len(shares):
        parts = ", ".join(f"{stage} ({share:.0%} of trials)" for stage, share in shares.items())
        sentences.append(
            f"Times taken over from an identical earlier trial: {parts}; transmission is always real."
        )
    if run.untimed:
        sentences.append(
            "Made without a link (placement-free), in one process: answers, likelihoods, bytes and kept tokens alone. Rows have "
            "no times, so figures and tables of times, and claims that rest on them, are left out."
        )
    elif (rows["emulator"] == "none").any():
        sentences.append(
            "Measured over loopback, without a link: latencies are this machine's compute alone."
        )
    off = uncalibrated(rows)
    if off:
        sentences.append(f"Links measured out of tolerance: {', '.join(off)}.")
    links = rows.loc[rows["reused"] != "", "profile"].nunique()
    if links > 1:
        sentences.append(
            f"Computing was measured once and taken over on {counted(links, 'link')}: what these show of it is one finding, not "
            "several."
        )
    if len(run.failed):
        sentences.append(f"{failures(run)}: infinite latencies, and no answers.")
    unsteady = int((~rows["compute_steady"]).sum())
    if unsteady:
        sentences.append(
            f"Compute was out of tolerance before or behind {unsteady:,} of {counted(len(rows), 'trial')}."
        )
    warned = int(((rows["warnings"] != "") & rows["calibrated"] & rows["compute_steady"]).sum())
    if warned:
        sentences.append(f"{counted(warned, 'trial')} with warnings.")
    sentences += _unlike(rows)
    loaded = int((rows["load"] != "sequential").sum())
    if loaded:
        sentences.append(
            f"{counted(loaded, 'request')} under a load, which wait for each other: intervals over examples do not know of it, "
            "those of the loads do."
        )
    if run.notes:
        sentences.append(f"Run directory: {'; '.join(run.notes)}.")
    return sentences


def _unlike(rows: pd.DataFrame) -> list[str]:
    """What is compared though it is not alike."""
    sentences = []
    lengths = rows.loc[rows["context_tokens"] > 0].groupby("task")["context_tokens"].agg(["min", "max"])
    if (lengths["max"] > 1.5 * lengths["min"]).any():
        sentences.append(
            f"Contexts of {lengths['min'].min()} to {lengths['max'].max()} tokens are put together."
        )
    sizes = pd.Series(settings.clusters(rows)).groupby([rows["profile"], rows["placement"], rows["codec"]])
    counts = sizes.nunique()
    if len(counts) and counts.min() < counts.max():
        sentences.append(
            f"Settings have from {counts.min()} to {counts.max()} examples: compare them with care."
        )
    return sentences


def elsewhere(rows: pd.DataFrame) -> list[str]:
    """What of these rows was not measured here, a sentence each: devices' times that were waited for, stand-in values."""
    sentences = []
    for side in ("edge", "cloud"):
        for device, own in rows[rows[f"{side}_device"] != ""].groupby(f"{side}_device", sort=True):
            sentences.append(
                f"Replayed: the {side}'s compute takes as long as was measured for {device} ({counted(len(own), 'trial')})."
            )
    shapes = rows[rows["model"].str.startswith(settings.SHAPE)]
    for model, own in shapes.groupby("model", sort=True):
        sentences.append(
            f"{model}: a cache of that model's shape with stand-in values ({counted(len(own), 'trial')}), of which bytes and "
            "times alone count."
        )
    return sentences


def failures(run: Run) -> str:
    """How many trials failed, of which settings, those with most first, and of each what most of its errors say."""
    both = settings.labelled(run.attempts)
    counts = both.groupby("setting", sort=False)["failed"].agg(["sum", "size"])
    worst = counts[counts["sum"] > 0].sort_values("sum", ascending=False, kind="stable")
    reasons = settings.labelled(run.failed).groupby("setting", sort=False)["error"].agg(_usual)
    named = [
        f"{name} {int(n)} of {of}: {reasons.get(name, '')}"
        for name, (n, of) in zip(worst.index[:_NAMED], worst[:_NAMED].to_numpy(), strict=True)
    ]
    named += [f"and {len(worst) - _NAMED} settings more"] if len(worst) > _NAMED else []
    return f"{counted(len(run.failed), 'trial')} failed ({'; '.join(named)})"


def _usual(errors: pd.Series[str]) -> str:
    """The most frequent of these errors' first lines, as far as it tells one from another."""
    first = errors.astype(str).str.partition("\n")[0].str.strip()
    said = str(first.value_counts().index[0])
    return said if len(said) <= _REASON else said[: _REASON - 1] + "…"


def computing(run: Run) -> str:
    """How the machine computed during a run's last start, in a sentence; empty where nobody measured, or on several
    hosts (see `hosts`)."""
    if not run.compute or len({start.host for start in run.compute} - {""}) > 1:
        return ""
    first, *_ = measurements = run.compute[-1].measurements
    drifts = [m.edge.median_s / first.edge.median_s for m in measurements]
    drifts += [m.cloud.median_s / first.cloud.median_s for m in measurements]
    shares = [side.share for m in measurements for side in (m.edge, m.cloud) if side.share is not None]
    had = f", with a processor for {min(shares):.0%} of the time or more" if shares else ""
    off = sum(bool(m.complaints) for m in measurements)
    return (
        f"Compute, measured {counted(len(measurements), 'time')}: a prefill of {first.tokens} tokens took the edge "
        f"{first.edge.median_s:.3g} s and the cloud {first.cloud.median_s:.3g} s (ratio {first.ratio:.2f}), then "
        f"{min(drifts):.2f} to {max(drifts):.2f} times that{had}; {off or 'none'} out of tolerance."
    )


def uncalibrated(rows: pd.DataFrame) -> list[str]:
    """The profiles whose link was out of tolerance before trials of these rows, and in how many where not in all."""
    named = []
    for profile, own in rows.groupby("profile", sort=False):
        off = int((~own["calibrated"]).sum())
        if off:
            named.append(f"{profile}" + ("" if off == len(own) else f" (in {off:,} of {len(own):,} trials)"))
    return named


def counted(number: int, what: str) -> str:
    """So many of something: ``1 trial``, ``2,000 trials``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def plain(value: Any) -> Any:
    """The value for JSON: numbers that it cannot write are None."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return bool(value) if isinstance(value, np.bool_) else value


def megabytes(size: float) -> str:
    """Bytes for people: MB, or kB below 0.1 MB; a dash for none."""
    if not size > 0:
        return "-"
    return f"{size / 1e6:.2f} MB" if size >= 95_000 else f"{size / 1e3:.1f} kB"
