"""What a run compares: its settings (placement, codec, delivery, transport), measured profile by profile.

Figures and tables agree on these: how a setting is named, what is put together, what quality the full cache
has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pandas as pd

from testbed import stats
from testbed.analysis.levels import counts, ladder
from testbed.experiment.row import SENDING

_BETWEEN = "\x1f"  #: task and example; not NUL, which numpy strips from the ends of strings
_OF_EXAMPLE = ["model", "task", "example"]
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
    """One setting on one profile: median latency (s) of all trials, those that failed being infinite; mean quality on
    the examples that the profile's settings have in common (`common`; NaN where this one is not compared); median
    payload (bytes).
    """

    label: str
    placement: str
    codec: str
    latency: stats.Estimate
    quality: stats.Estimate
    payload_bytes: float
    trials: int = 0
    failed: int = 0
    exact: bool = False  #: the answers are the full cache's by construction (`is_exact`)
    worst: Worst | None = None  #: of several tasks the one that keeps least
    scored: bool = True  #: some answer has a quality

    @property
    def sends(self) -> bool:
        """Whether a KV cache crosses the link."""
        return self.placement in SENDING

    @property
    def gap(self) -> str:
        """What is missing, in words: empty, or such as ``failed 4 of 4``, ``not compared: no common examples``."""
        if self.failed:
            return f"failed {self.failed} of {self.trials}"
        if math.isfinite(self.quality.value):
            return ""
        return "not compared: no common examples" if self.scored else "no score"


@dataclass(frozen=True)
class Worst:
    """The task on which a setting keeps the smallest share of the full cache's score, and that share."""

    task: str
    kept: stats.Estimate

    def text(self) -> str:
        """For people, such as ``passages 0.71``."""
        return f"{self.task} {self.kept.value:.2f}"


def labelled(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows with two more columns: `setting` (what is compared) and `panel` (where it is compared).

    A setting is a codec, behind its placement where that is not `split`, or a placement that needs none; transport,
    congestion control and how cells are shared out are named where the run varies them, and a delivery where it is not whole:
    without a codec, where it has levels of its own. A panel is a profile; model, emulator and whose compute was replayed are
    named where the run varies them, and always a load: what waits for others is not put together with what was alone.
    """
    chosen = (
        rows["delivery"].map({text: bool(ladder(text)) for text in rows["delivery"].unique()}).astype(bool)
    )
    codec = rows["codec"].where(~chosen, "")
    placement = rows["placement"].where((rows["placement"] != "split") | (codec == ""), "")
    setting = (placement + " " + codec).str.strip()
    across = rows[rows["placement"] != "edge"]
    # What a transport's parameters say of it already is not said again.
    alike = across[across["congestion"] != ""].groupby("transport")["congestion"].nunique()
    named = {
        "transport": across.loc[across["transport"] != "", "transport"].nunique(),
        "congestion": alike.max(),
        "allocate": rows["allocate"].nunique(),
    }
    for column, count in named.items():
        if count > 1:
            setting = setting + rows[column].map(lambda v: f" · {v}" if v else "")
    setting = setting + rows["delivery"].map(lambda v: "" if v in ("", "whole") else f" · {v}")
    panel = rows["profile"]
    for names, unsaid in ((rows["model"], False), (rows["emulator"], False), (replayed(rows), True)):
        if names[(names != "") | unsaid].nunique() > 1:
            panel = panel + names.map(lambda v: f" · {v}" if v else "")
    return rows.assign(setting=setting, panel=panel + under_load(rows).map(lambda v: f" · {v}" if v else ""))


def under_load(rows: pd.DataFrame) -> pd.Series[str]:
    """The load that requests met, and how the cloud served it, such as ``poisson(rate=2/s) · batch(max=8)``; empty of requests
    made one behind the other.
    """
    serving = rows["serving"].map(lambda v: "" if v == "fifo" else f" · {v}")
    return (rows["load"] + serving).where(rows["load"] != "sequential", "")


#: A model of this name is a cache of its shape with stand-in values: its bytes and times are real, its answers are none.
SHAPE = "shape:"


def no_quality(rows: pd.DataFrame) -> str:
    """Why nobody knows a quality of these rows, in words; empty where somebody does."""
    if rows["score"].notna().any():
        return ""
    shapes = len(rows) > 0 and bool(rows["model"].str.startswith(SHAPE).all())
    return "values stand in, so a shape has no score" if shapes else "no answer has a score"


def replayed(rows: pd.DataFrame) -> pd.Series[str]:
    """Whose compute was waited for instead of computing, such as ``edge as jetson-orin``; empty of what was computed here."""
    said = rows["model"].map(lambda v: "")
    for side in ("edge", "cloud"):
        own = rows[f"{side}_device"].map(lambda v, side=side: f"{side} as {v}" if v else "")
        said = said + own.where((said == "") | (own == ""), ", " + own)
    return said


def encoded(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows whose cache arrived as their codec made it, so that what is lost is the codec's: not those with chunks of several
    levels or that did not come, nor answers from the first bit planes. A store may select without the question, so its rows
    are there only where there are no others.
    """
    pairs = zip(rows["levels"], rows["codec"], strict=True)
    one = pd.Series([set(counts(levels)) <= {codec} for levels, codec in pairs], index=rows.index, dtype=bool)
    whole = (rows["codec"] != "") & one & ~(rows["tokens_left_out"] > 0) & rows["planes"].isna()
    for placement in SENDING:
        own = rows[whole & (rows["placement"] == placement)]
        if len(own):
            break
    return own


def panels(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each panel's name and its rows, in the order in which the run met them."""
    for name, own in labelled(rows).groupby("panel", sort=False):
        yield str(name), own


def finished(rows: pd.DataFrame) -> pd.DataFrame:
    """The trials that did not fail (of `Run.attempts`; of `Run.rows` all)."""
    return rows[~rows["failed"].astype(bool)] if "failed" in rows else rows


def common(rows: pd.DataFrame) -> pd.DataFrame:
    """The finished rows (from `panels`) of settings that can be compared, on the examples that all of these finished.

    A setting without a task that others finished, or with less than half of the examples, is not compared: a mean over
    other tasks or fewer examples is another quantity. Where no example is left, those with the fewest go first.
    """
    done = finished(rows)
    done = done.assign(_of=clusters(done))
    have = {str(s): set(own["_of"]) for s, own in done.groupby("setting", sort=False)}
    everything = set().union(*have.values())
    size = {name: len(own) for name, own in have.items() if _tasks(own) == _tasks(everything)}
    kept = sorted((n for n in size if 2 * size[n] >= len(everything)), key=size.__getitem__)
    while kept and _tasks(shared := set.intersection(*(have[n] for n in kept))) != _tasks(everything):
        kept.pop(0)
    if not kept:
        kept = [max(size, key=size.__getitem__)] if size else []
        shared = have[kept[0]] if kept else set()
    return done[done["setting"].isin(kept) & done["_of"].isin(shared)].drop(columns="_of")


def _tasks(examples: set[str]) -> set[str]:
    return {example.split(_BETWEEN)[0] for example in examples}


def measured(rows: pd.DataFrame, metric: Metric = SCORE) -> list[Measured]:
    """The settings of one panel's rows (from `panels`), in the order in which the run met them."""
    came_to = []
    compared = common(rows)
    quality_of = dict(iter(compared.groupby("setting", sort=False)))
    for label, own in rows.groupby("setting", sort=False):
        alike = quality_of.get(label, compared.iloc[:0])
        done = finished(own)
        came_to.append(
            Measured(
                label=str(label),
                placement=str(own["placement"].iloc[0]),
                codec=str(own["codec"].iloc[0]),
                latency=stats.median(latencies(own), clusters(own)),
                quality=stats.mean(
                    metric.values(alike), clusters(alike), alike["task"], bounds=metric.bounds
                ),
                payload_bytes=float(done["payload_bytes"].median()),
                trials=len(own),
                failed=len(own) - len(done),
                exact=is_exact(done),
                worst=worst_task(alike),
                scored=bool(metric.values(done).notna().any()),
            )
        )
    return came_to


def latencies(rows: pd.DataFrame) -> pd.Series[float]:
    """The rows' latency as `Run.latency` says; infinite where a trial failed."""
    return rows["latency_s" if "latency_s" in rows else "e2e_s"]


def worst_task(rows: pd.DataFrame) -> Worst | None:
    """Of one setting's finished rows the task that keeps least; None of a single task, or without scores."""
    if rows["task"].nunique() < 2:
        return None
    shares = [
        Worst(str(task), stats.kept(own["score"], own["reference_score"], own["example"]))
        for task, own in rows.groupby("task", sort=False)
    ]
    known = [share for share in shares if math.isfinite(share.kept.value)]
    return min(known, key=lambda share: share.kept.value, default=None)


def clusters(rows: pd.DataFrame) -> pd.Series[str]:
    """What is resampled: an example of a task, with all its rows."""
    return rows["task"] + _BETWEEN + rows["example"]


def at_home(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of which pairs may be made: of an example that met several hosts those of the one with most of its rows, and those
    of which nobody knows the host."""
    named = rows[rows["host"] != ""] if "host" in rows else rows.assign(host="")
    if named["host"].nunique() < 2:
        return rows
    counts = named.groupby([*_OF_EXAMPLE, "host"], sort=False).size().reset_index(name="rows")
    homes = counts.sort_values("rows", ascending=False, kind="stable").drop_duplicates(_OF_EXAMPLE)
    home = rows[_OF_EXAMPLE].merge(homes, on=_OF_EXAMPLE, how="left")["host"].set_axis(rows.index)
    return rows[(rows["host"] == "") | (rows["host"] == home)]


def full_cache_quality(rows: pd.DataFrame) -> float:
    """Mean over tasks of the full cache's score on the examples that are compared (`common`); where rows carry none,
    that of the fp16 codec; else NaN.
    """
    rows = common(rows) if "setting" in rows else rows
    reference = stats.mean(rows["reference_score"], clusters(rows), rows["task"], resamples=1).value
    if reference == reference:
        return reference
    plain = rows[rows["codec"] == "fp16"]
    return stats.mean(plain["score"], clusters(plain), plain["task"], resamples=1).value


#: NLLs (nats a token) that are apart by no more are one computation in another order of summation.
_SAME_NLL = 1e-3


def is_exact(rows: pd.DataFrame) -> bool:
    """Whether one setting's finished rows answer as the full cache does by construction, whatever an interval of scores says:
    the text was sent or nothing was (the same model in the same format reads the same text), or the cache arrived bit for bit.
    Likelihoods that are another computation's say that it is not so.
    """
    if rows.empty or ("one_format" in rows and not rows["one_format"].all()):
        return False
    apart = (rows["nll"] - rows["reference_nll"]).abs()
    placement = str(rows["placement"].iloc[0])
    if placement == "edge" and (rows["edge_model"] != "").any():
        return False  # another model's answers, however near they come
    if placement in ("cloud", "edge"):
        return not bool((apart > _SAME_NLL).any())
    whole = placement in SENDING and not (rows["tokens_left_out"] > 0).any()
    return whole and str(rows["codec"].iloc[0]) == "fp16" and bool((apart <= _SAME_NLL).all())


def kept_quality(rows: pd.DataFrame) -> tuple[stats.Estimate, bool]:
    """One setting's score over the full cache's on the same examples (`stats.kept`), and whether it is the full cache's
    by construction (`is_exact`).
    """
    kept = stats.kept(rows["score"], rows["reference_score"], clusters(rows), rows["task"])
    return kept, is_exact(rows)


def shown_to_hold(rows: pd.DataFrame, floor: float = QUALITY_FLOOR) -> bool:
    """Whether one setting's quality holds by its interval's lower end, not by its estimate alone."""
    kept, exact = kept_quality(finished(rows))
    return exact or bool(kept.low >= floor - 1e-12)


def holding(measured: list[Measured], full: float, floor: float = QUALITY_FLOOR) -> list[Measured]:
    """The settings that answer in most trials and whose mean score is at least `floor` of the full cache's, or is
    the full cache's by construction; from the fastest on.
    """
    able = [m for m in measured if math.isfinite(m.latency.value) and math.isfinite(m.quality.value)]
    held = [m for m in able if full > 0 and (m.exact or m.quality.value >= floor * full - 1e-12)]
    return sorted(held, key=lambda m: m.latency.value)


def fastest_that_holds(
    measured: list[Measured], full: float, floor: float = QUALITY_FLOOR
) -> Measured | None:
    """The first of `holding`; None if there is none."""
    return next(iter(holding(measured, full, floor)), None)
