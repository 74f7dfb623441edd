"""What a request takes of the sender's radio, from its rows: no counter is asked, so it is a model and no measurement.

A phone's radio at work draws α · throughput + β (J. Huang et al., "A Close Examination of Performance and Power Characteristics
of 4G LTE Networks", MobiSys 2012, the data transfer power model), so that a request that sends B megabits in t seconds takes
α · B + β · t. What the radio goes on drawing behind a transfer (LTE: 11.6 s at 1.06 W) is the same for each setting, and is not
in it; nor is any compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Radio:
    """A radio's draw while it sends: α in mW per Mbit/s, β in mW."""

    alpha: float
    beta: float

    def joules(self, size: float | pd.Series, seconds: float | pd.Series) -> float | pd.Series:
        """Of `size` bytes sent in that time; NaN where either is."""
        return (self.alpha * size * 8 / 1e6 + self.beta * seconds) / 1e3


#: Sending, of an HTC phone of 2012. Its LTE sent at up to some 10 Mbit/s: of faster links this is an extrapolation.
RADIOS = {"lte": Radio(438.39, 1288.04), "wifi": Radio(283.17, 132.86)}


def per_request(rows: pd.DataFrame, radio: Radio) -> pd.Series:
    """Joules of each row: all of its `wire_bytes`, as if sent, over opening the connection and the transmission. NaN of a run
    without a link, and of a trial that failed.
    """
    seconds = rows["connect_s"].astype(float) + rows["busy_transmit_s"].astype(float)
    joules = radio.joules(rows["wire_bytes"].astype(float), seconds)
    assert isinstance(joules, pd.Series)
    return joules
