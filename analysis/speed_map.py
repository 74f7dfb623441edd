"""Which setting is fastest by the link's rate and by how much slower the edge computes than the cloud: as the latency model
has it, and where links were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import ndimage

from testbed.analysis import settings
from testbed.analysis.latency_model import Floats, LatencyModel, Link, link_of
from testbed.analysis.stage_sums import speed_ratio

_CELLS = (40, 30)  #: rates, speeds
_FINER = 6  #: so many in place of each, between them
_REACH = 3.0  #: rates so many times beyond the measured ones are in it
_SPEEDS = 4.0  #: and speeds of the edge
_LEAST, _MOST = 0.5, 16.0  #: but these at least


@dataclass(frozen=True)
class SpeedMap:
    """How much longer than the fastest of the others (logarithm; below 0: it is the fastest) each setting of `names` takes, by
    speed ratio and rate (bit/s): *behind*, [settings, speeds, rates]. `points`: each measured link's rate, what was fastest
    there, and what the model says is. `ratio`: at which all was measured; `middle`: the links' middle delay and loss.
    """

    names: list[str]
    rates: Floats
    speeds: Floats
    behind: Floats
    points: list[tuple[float, str, str]]
    ratio: float
    middle: Link

    @property
    def fastest_somewhere(self) -> list[str]:
        """The settings that are the fastest somewhere in the map, or were on a link."""
        won = [name for name, behind in zip(self.names, self.behind, strict=True) if (behind <= 0).any()]
        return list(dict.fromkeys([*won, *(measured for _, measured, _ in self.points)]))


def links_of(rows: pd.DataFrame) -> dict[str, Link]:
    """The links of these rows, by panel."""
    return {str(panel): link_of(own) for panel, own in rows.groupby("panel", sort=False)}


def speed_map(rows: pd.DataFrame, model: LatencyModel, names: list[str]) -> SpeedMap:
    """Of those of `names` that the model knows; `rows`: labelled, finished, of steady links that have a rate."""
    links, ratio = links_of(rows), speed_ratio(rows)
    wanted = ("delay_up_s", "delay_down_s", "loss_up")
    middles = {name: float(np.median([getattr(link, name) for link in links.values()])) for name in wanted}
    known = [link.rate_up_bps for link in links.values()]
    rates = np.geomspace(min(known) / _REACH, max(known) * _REACH, _CELLS[0])
    speeds = np.geomspace(min(_LEAST, ratio / _SPEEDS), max(_MOST, ratio * _SPEEDS), _CELLS[1])
    predicted = [name for name in names if name in model.medians(next(iter(links.values())))]
    taken = np.empty((len(predicted), len(speeds), len(rates)))
    for i, speed in enumerate(speeds):
        for j, rate in enumerate(rates):
            medians = model.medians(Link(float(rate), **middles), float(speed) / ratio)
            taken[:, i, j] = np.log([medians[name] for name in predicted])
    # Times are smooth between what was computed, which of them is the least is not.
    taken = ndimage.zoom(taken, (1, _FINER, _FINER), order=1, grid_mode=False)
    rates, speeds = (np.geomspace(axis[0], axis[-1], _FINER * len(axis)) for axis in (rates, speeds))
    others = [np.delete(taken, k, axis=0).min(axis=0, initial=math.inf) for k in range(len(predicted))]
    points = _points(rows, model, predicted, links)
    return SpeedMap(
        predicted, rates, speeds, taken - np.array(others), points, ratio, Link(math.nan, **middles)
    )


def _points(
    rows: pd.DataFrame, model: LatencyModel, names: list[str], links: dict[str, Link]
) -> list[tuple[float, str, str]]:
    points = []
    for panel, link in links.items():
        own = rows[(rows["panel"] == panel) & rows["setting"].isin(names)]
        if len(own):
            medians = settings.latencies(own).groupby(own["setting"], sort=False).median()
            best = min(names, key=model.medians(link).__getitem__)
            points.append((link.rate_up_bps, str(medians.idxmin()), best))
    return points
