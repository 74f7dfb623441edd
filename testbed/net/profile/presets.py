"""Links that experiments usually want, each with the source of its numbers.

The figures are rounded representatives, not any one network: published means and medians, moderate where
sources disagree. Delays are half of a measured round trip; jitter and loss, where a source gives none, are
small values of our choice and say so.
"""

from __future__ import annotations

from testbed.net.profile.conditions import Direction, Profile


def _way(mbit: float, delay_ms: float, jitter_ms: float = 0.0, loss: float = 0.0) -> Direction:
    return Direction(rate_bps=mbit * 1e6, delay_s=delay_ms / 1e3, jitter_s=jitter_ms / 1e3, loss=loss)


_ALL = (
    Profile(
        "5g-good",
        up=_way(100, 10, 1),
        down=_way(200, 10, 1),
        source=(
            "down: mean outdoor 5G download of 210 Mbit/s (Cellsmart global survey, 2023). up: below the "
            "roughly 130 Mbit/s that Xu et al., 'Understanding Operational 5G', SIGCOMM 2020, report for "
            "a lightly loaded sub-6 GHz cell. round trip: 20 ms, which the best 5 % of mobile users see "
            "('Third-Party Assessment of Mobile Performance in the 5G Era', arXiv:2507.18834, 2025). "
            "jitter: our choice"
        ),
    ),
    Profile(
        "5g-mid",
        up=_way(50, 15, 2, 0.0001),
        down=_way(100, 15, 2, 0.0001),
        source=(
            "rates: the user experienced data rates that ITU-R M.2410-0 (2017) asks of IMT-2020 in dense "
            "urban use, 100 Mbit/s down and 50 Mbit/s up; surveys' mean upload is lower, 31 Mbit/s "
            "(Cellsmart, 2022). round trip: 30 ms, between the best cells' 20 ms (arXiv:2507.18834) and "
            "LTE's 50 ms. jitter, loss 0.01 %: our choice"
        ),
    ),
    Profile(
        "5g-edge",
        up=_way(12, 25, 5, 0.001),
        down=_way(50, 25, 5, 0.001),
        source=(
            "cell edge and low band: mean 5G speeds of three US carriers in Opensignal's 5G User "
            "Experience Report of January 2021, mostly low-band spectrum: 47-58 Mbit/s down, 8-14 Mbit/s "
            "up. round trip: LTE's (see lte), since such 5G brings no better one. jitter, loss 0.1 %: our "
            "choice"
        ),
    ),
    Profile(
        "lte",
        up=_way(20, 25, 5, 0.0005),
        down=_way(55, 25, 5, 0.0005),
        source=(
            "rates: mean 4G speeds that follow from Cellsmart's survey of 2022 (5G 242 Mbit/s down and 31 "
            "Mbit/s up, said to be 330 % and 55 % above 4G). round trip: 50 ms, within the 44-66 ms of US "
            "networks in Opensignal's State of Mobile Networks USA, May 2019. jitter, loss 0.05 %: our "
            "choice"
        ),
    ),
    Profile(
        "wifi",
        up=_way(100, 5, 2, 0.001),
        down=_way(100, 5, 2, 0.001),
        source=(
            "round trip: 10 ms, the median hop latency of a well-tuned access point in Pei et al., 'WiFi "
            "can be the weakest link of round trip network latency in the wild', INFOCOM 2016 (untuned "
            "ones: 20 ms and more). rate: a round figure for a shared 802.11ac channel, our choice. "
            "jitter, loss 0.1 %: our choice"
        ),
    ),
    Profile(
        "leo",
        up=_way(15, 25, 5, 0.004),
        down=_way(100, 25, 5, 0.004),
        source=(
            "Starlink. round trip: 50 ms median to European anchors, quartiles 40 and 60 ms, and loss "
            "below 0.5 % without load: Michel et al., 'A First Look at Starlink Performance', IMC 2022. "
            "rates: near Ookla's US medians for the third quarter of 2021, 87 Mbit/s down and 13.5 Mbit/s "
            "up (Michel et al. measured more). jitter: from the quartiles"
        ),
    ),
    Profile(
        "geo",
        up=_way(3, 300, 10, 0.0005),
        down=_way(20, 300, 10, 0.0005),
        source=(
            "Ookla's US medians for the third quarter of 2021: HughesNet 19.3 Mbit/s down, 2.5 Mbit/s up, "
            "744 ms; Viasat 18.8 Mbit/s down, 3.0 Mbit/s up, 629 ms. round trip: 600 ms, the least a "
            "geostationary service shows (Michel et al., IMC 2022). jitter, loss 0.05 %: our choice"
        ),
    ),
    Profile(
        "wan",
        up=_way(200, 10),
        down=_way(200, 10),
        source=(
            "wired access to a cloud region in the same country. round trip: 20 ms, which four of five "
            "RIPE Atlas probes stay below in European countries with a cloud region (Internet Society "
            "Pulse, University of Crete study of six countries); Corneo et al., 'Surrounded by the "
            "Clouds', WWW 2021, is the global picture. rate: a business line, our choice; no jitter, no "
            "loss"
        ),
    ),
)

PRESETS: dict[str, Profile] = {profile.name: profile for profile in _ALL}
"""Preset name -> profile. *up* is edge to cloud, the way that carries the KV cache."""
