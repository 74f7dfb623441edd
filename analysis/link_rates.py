"""The rate of a link that changes, as its trace has it: from the run's directory, which keeps a copy of each trace."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from testbed import lookup
from testbed.analysis.run import Run
from testbed.errors import UsageError
from testbed.experiment.inputs import kept_traces
from testbed.net.profile.profile import parse_profile

Floats = npt.NDArray[np.float64]
_LEAST_S = 0.02  #: of a bin: deliveries come packet by packet


def rates(
    run: Run, profile: str, begin_s: float, length_s: float, bins: int = 150
) -> tuple[Floats, Floats] | None:
    """Of the way up, from `begin_s` of the trace on: the bins' edges (s, from 0) and their mean rates (bit/s). None where the
    link does not change, or its trace is not to be had.
    """
    known = run.manifest.get("profiles")
    entry = known.get(profile) if isinstance(known, dict) else None
    if not (length_s > 0 and isinstance(entry, dict)):
        return None
    try:
        with lookup.among(kept_traces(run.manifest.get("traces"), run.path.absolute())):
            schedule = parse_profile(str(entry.get("text"))).up.schedule("up", 0.0)
    except UsageError:
        return None
    if schedule is None or not schedule.gives_rate:
        return None
    edges = np.linspace(0.0, length_s, 1 + max(1, min(bins, int(length_s / _LEAST_S))))
    sent = [schedule.capacity(begin_s + a, begin_s + b) for a, b in pairwise(edges)]
    return edges, np.array(sent) * 8 / np.diff(edges)
