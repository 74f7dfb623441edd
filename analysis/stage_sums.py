"""What requests take apart from their link: the edge's, the cloud's and the last stages' seconds, and how these overlap.

From them a request's time on another link follows, or with an edge of another speed:

    in turn   edge + link + cloud + last
    stream    n chunks through edge, link and cloud, each of which does one thing at a time: the flow line's makespan
              (edge + link + cloud) / n + (n - 1) / n · max(edge, link, cloud), + last
    meet      the cloud prefills from the front as the link brings the cache from the back, until they meet:
              prefill · link / (prefill + link), + last

The last stages are the first token's and the further tokens'. What an adaptive sender does on another link is not known, nor when
bit planes suffice: such settings have no sums. Nor have those that cross over QUIC or as datagrams: the link's seconds are
forecast by TCP's fit; nor those of which two hosts' clocks hide a stage that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

Floats = npt.NDArray[np.float64]

IN_TURN, STREAM, MEET = "in turn", "stream", "meet"
_KEYS = ["setting", "placement", "kind", "codec", "task", "example"]


def kind(delivery: str) -> str:
    """How a delivery's stages overlap; empty where that is not known."""
    name = delivery.partition("(")[0]
    return {"": IN_TURN, "whole": IN_TURN, STREAM: STREAM, MEET: MEET}.get(name, "")


def over_tcp(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which rows crossed over TCP, or crossed nothing: those that a fit of TCP tells something about."""
    return rows["transport"].map(lambda text: text.partition("(")[0] in ("", "tcp")).astype(bool)


@dataclass(frozen=True)
class Sums:
    """A line for each setting and example: columns ``edge``, ``cloud``, ``last`` (s; of the edge's own placement all last stages
    are the edge's), ``prefill`` (the cloud's of the whole text, s), ``payload_bytes`` (of a cache that is met half-way: all of
    it), ``chunks``, ``opened``.
    """

    table: pd.DataFrame

    @classmethod
    def of(cls, rows: pd.DataFrame, generation: bool) -> Sums:
        """Of labelled, finished rows; `generation`: whether latency ends with the last token."""
        own = rows.assign(kind=rows["delivery"].map(kind))
        own = own[(own["kind"] != "") & (over_tcp(own) | (own["placement"] == "edge"))]
        crossing = own["placement"] != "edge"
        # A prefill of text that was sent is the cloud's; half of what a pipeline met is too, and is modelled instead.
        text = own["placement"] == "cloud"
        prefill = own["busy_prefill_s"].where(own["kind"] != MEET, 0.0)
        first = (own["first_token_s"] - own["delay_down_s"].where(crossing, 0.0)).clip(lower=0.0)
        last = first + own["queue_s"] + (own["generate_s"] if generation else 0.0)
        own = own.assign(
            edge=own["busy_select_s"] + own["busy_encode_s"] + prefill.where(~text, 0.0),
            cloud=own["busy_decode_s"] + prefill.where(text, 0.0),
            last=last,
            opened=(own["connect_s"] > 0).astype(float),
        )
        figures = ["edge", "cloud", "last", "payload_bytes", "chunks", "opened"]
        # One value an example and setting: what it computes does not depend on the link.
        table = own.groupby(_KEYS, sort=False)[figures].median().reset_index()
        table = table.dropna(subset=["edge", "cloud", "last"])
        return cls(_met(table, own[text]).reset_index(drop=True))

    @property
    def crossing(self) -> Floats:
        """1 where something crosses the link."""
        return np.where(self.table["placement"] != "edge", 1.0, 0.0)

    def latencies(self, connect: Floats, transmit: Floats, one_way: float, slower: float = 1.0) -> Floats:
        """Seconds, line by line, without the way back: *connect*, *transmit* (way included) of each line, the edge *slower* by a
        factor than it was measured.
        """
        table = self.table
        columns = (
            table[name].to_numpy(dtype=np.float64) for name in ("edge", "cloud", "last", "prefill", "chunks")
        )
        edge, cloud, last, prefill, chunks = columns
        edge, link = edge * slower, np.maximum(0.0, transmit - one_way)
        last = np.where(self.crossing > 0, last, last * slower)
        count = np.maximum(1.0, chunks)
        longest = np.maximum(np.maximum(edge, link), cloud)
        line = (edge + link + cloud) / count + (count - 1) / count * longest
        with np.errstate(divide="ignore", invalid="ignore"):
            met = edge / count + cloud / count + np.nan_to_num(prefill * link / (prefill + link))
        kinds = table["kind"].to_numpy()
        across = np.select([kinds == STREAM, kinds == MEET], [line, met], edge + link + cloud)
        return np.asarray(np.where(self.crossing > 0, connect + one_way + across, edge + cloud) + last)


def _met(table: pd.DataFrame, text: pd.DataFrame) -> pd.DataFrame:
    """With ``prefill``, and of what was met half-way the bytes of all of it: those of the same codec sent otherwise. Lines that
    lack either are dropped.
    """
    of = ["task", "example"]
    prefill = text.groupby(of)["busy_prefill_s"].median().rename("prefill").reset_index()
    whole = (
        table[table["kind"] != MEET]
        .groupby(["codec", *of])["payload_bytes"]
        .max()
        .rename("whole")
        .reset_index()
    )
    table = table.merge(prefill, on=of, how="left").merge(whole, on=["codec", *of], how="left")
    met = table["kind"] == MEET
    table["payload_bytes"] = table["whole"].where(met, table["payload_bytes"])
    known = ~met | (table["prefill"].notna() & table["whole"].notna())
    return table[known].fillna({"prefill": 0.0}).drop(columns="whole")


def speed_ratio(rows: pd.DataFrame) -> float:
    """How many times longer the edge's prefill of a context takes than the cloud's: the median over examples that both prefilled;
    where none did, the factors by which either was slowed down.
    """
    of = ["model", "task", "example", "host"]
    plain = rows["delivery"].map(kind) != MEET
    edge = rows[plain & rows["placement"].isin(("edge", "split")) & (rows["busy_prefill_s"] > 0)]
    cloud = rows[(rows["placement"] == "cloud") & (rows["busy_prefill_s"] > 0)]
    times = [side.groupby(of)["busy_prefill_s"].median() for side in (edge, cloud)]
    ratios = (times[0] / times[1]).dropna()
    if len(ratios):
        return float(ratios.median())
    return float((rows["edge_slowdown"] / rows["cloud_slowdown"]).median())
