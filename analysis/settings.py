"""What a run compares: its settings (placement and codec), measured profile by profile.

Figures and tables agree on these: how a setting is named, what is put together, what quality the full cache
has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from analysis import stats

#: A setting that reaches this share of the full cache's quality counts as having kept it.
QUALITY_FLOOR = 0.95


@dataclass(frozen=True)
class Metric:
    """A quality per row: its values, the label of its axis, and which way is better."""

    label: str
    values: Callable[[pd.DataFrame], pd.Series[float]]
    higher_is_better: bool
    bounds: tuple[float, float] | None = None


SCORE = Metric("mean score", lambda rows: rows["score"], True, (0.0, 1.0))
DELTA_NLL = Metric(
    "ΔNLL of the gold answer (nats/token)", lambda rows: rows["nll"] - rows["reference_nll"], False
)
KL = Metric("KL from the full cache (nats/token)", lambda rows: rows["kl"].astype(float), False)


@dataclass(frozen=True)
class Measured:
    """One setting on one profile: median latency (s), mean quality, median payload (bytes)."""

    label: str
    placement: str
    codec: str
    latency: stats.Estimate
    quality: stats.Estimate
    payload_bytes: float


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with two more columns: `setting` (what is compared) and `panel` (where it is compared).

    A setting is a codec, or a placement that needs none; transport and congestion control are named where
    the run varies them. A panel is a profile; model and emulator are named where the run varies them.
    """
    setting = rows["codec"].where(rows["placement"] == "split", rows["placement"])
    setting = setting.where(setting != "", rows["placement"])
    across = rows[rows["placement"] != "edge"]
    for column in ("transport", "congestion"):
        if across.loc[across[column] != "", column].nunique() > 1:
            setting = setting + rows[column].map(lambda v: f" · {v}" if v else "")
    panel = rows["profile"]
    for column in ("model", "emulator"):
        if rows.loc[rows[column] != "", column].nunique() > 1:
            panel = panel + rows[column].map(lambda v: f" · {v}" if v else "")
    return rows.assign(setting=setting, panel=panel)


def panels(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each panel's name and its rows, in the order in which the run met them."""
    for name, own in labelled(rows).groupby("panel", sort=False):
        yield str(name), own


def measure(rows: pd.DataFrame, metric: Metric = SCORE) -> list[Measured]:
    """The settings of one panel's rows (from `panels`), in the order in which the run met them."""
    found = []
    for label, own in rows.groupby("setting", sort=False):
        found.append(
            Measured(
                label=str(label),
                placement=str(own["placement"].iloc[0]),
                codec=str(own["codec"].iloc[0]),
                latency=stats.median(own["e2e_s"], clusters(own)),
                quality=stats.mean(metric.values(own), clusters(own), own["task"], bounds=metric.bounds),
                payload_bytes=float(own["payload_bytes"].median()),
            )
        )
    return found


def clusters(rows: pd.DataFrame) -> pd.Series[str]:
    """What is resampled: an example of a task, with all its rows."""
    return rows["task"] + "\0" + rows["example"]


def full_cache_quality(rows: pd.DataFrame) -> float:
    """Mean over tasks of the same examples' score with the full cache; where rows carry none, that of the
    fp16 codec; else NaN.
    """
    reference = stats.mean(rows["reference_score"], clusters(rows), rows["task"], resamples=1).value
    if reference == reference:
        return reference
    plain = rows[rows["codec"] == "fp16"]
    return stats.mean(plain["score"], clusters(plain), plain["task"], resamples=1).value


def kept_quality(rows: pd.DataFrame) -> tuple[stats.Estimate, bool]:
    """One setting's score over the full cache's on the same examples, and whether the cache arrived bit for bit, so that nothing
    can be lost whatever the interval says.
    """
    found = stats.ratio(
        rows["score"], rows["reference_score"], clusters(rows), rows["task"], bounds=SCORE.bounds
    )
    exact = str(rows["placement"].iloc[0]) != "split" or str(rows["codec"].iloc[0]) == "fp16"
    same = rows["nll"].notna() & (rows["nll"] == rows["reference_nll"])
    return found, bool(exact and same.all())


def shown_to_hold(rows: pd.DataFrame, floor: float = QUALITY_FLOOR) -> bool:
    """Whether one setting's quality holds by its interval's lower end, not by its estimate alone."""
    found, exact = kept_quality(rows)
    return exact or bool(found.low >= floor - 1e-12)


def fastest_that_holds(
    measured: list[Measured], full: float, floor: float = QUALITY_FLOOR
) -> Measured | None:
    """The setting with the lowest median latency whose mean score is at least `floor` of the full cache's;
    None if there is none.
    """
    holding = [m for m in measured if full > 0 and m.quality.value >= floor * full - 1e-12]
    return min(holding, key=lambda m: m.latency.value, default=None)
