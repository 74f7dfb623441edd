"""What the rows can say, and how surely: estimates with intervals, paired comparisons, families of tests.

Everything is seeded: the same rows give the same numbers. The unit is the example, always.
"""

from testbed.stats.estimates import (
    CONFIDENCE,
    NOTHING,
    RESAMPLES,
    Estimate,
    mean,
    median,
    pareto_front,
    quantile,
    share_above,
)
from testbed.stats.paired import (
    Difference,
    McNemar,
    difference,
    holm,
    kept,
    mcnemar,
    signed_rank,
    smallest_detectable,
)

__all__ = [
    "CONFIDENCE",
    "NOTHING",
    "RESAMPLES",
    "Difference",
    "Estimate",
    "McNemar",
    "difference",
    "holm",
    "kept",
    "mcnemar",
    "mean",
    "median",
    "pareto_front",
    "quantile",
    "share_above",
    "signed_rank",
    "smallest_detectable",
]
