"""Other testbeds' catalogues of links, as profiles of ours.

6G-Testbed's ``profiles.yaml`` (3GPP SA4, S4-260848): under ``profiles`` a name and what it asks of netem and HTB, with what
differs on the way up under ``uplink``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from testbed import strict_yaml
from testbed.errors import SpecError
from testbed.net.profile.conditions import Profile
from testbed.net.profile.profile import parse_profile

_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]


class _Way(BaseModel):
    """What one way asks for; all of it may be null."""

    model_config = ConfigDict(extra="forbid")

    delay_ms: _Amount | None = None
    jitter_ms: _Amount | None = None
    delay_distribution: Literal["fixed", "normal", "pareto", "paretonormal", "uniform"] | None = None
    loss_pct: _Percent | None = None
    loss_correlation_pct: _Percent | None = None
    loss_model: str | None = None  # not understood by netem behind a percentage, where they write it
    rate_mbit: _Amount | None = None
    rate_ceil_mbit: _Amount | None = None
    corruption_pct: _Percent | None = None
    reorder_pct: _Percent | None = None
    duplicate_pct: _Percent | None = None
    limit_packets: Annotated[int, Field(ge=1)] | None = None
    # No counterpart here: bursts, and correlations of what is rare or drawn anew for each packet.
    rate_burst_kbit: _Amount | None = None
    rate_cburst_kbit: _Amount | None = None
    delay_correlation_pct: _Percent | None = None
    corruption_correlation_pct: _Percent | None = None
    reorder_correlation_pct: _Percent | None = None
    duplicate_correlation_pct: _Percent | None = None

    def text(self) -> str:
        """The same in words of ours; a class of HTB that is alone sends at its ceiling."""
        law, rate = self.delay_distribution, self.rate_ceil_mbit or self.rate_mbit
        said = {
            "rate": f"{rate:.12g}mbit" if rate else "",
            "delay": f"{self.delay_ms:.12g}ms" if self.delay_ms else "",
            "jitter": "",
            "loss": "",
            "corrupt": f"{self.corruption_pct:.12g}%" if self.corruption_pct else "",
            "reorder": f"{self.reorder_pct:.12g}%" if self.reorder_pct else "",
            "duplicate": f"{self.duplicate_pct:.12g}%" if self.duplicate_pct else "",
            "queue": f"{self.limit_packets}p" if self.limit_packets and rate else "",
        }
        if self.jitter_ms and self.delay_ms:  # netem is told of it behind a delay only
            spread = f"{self.jitter_ms:.12g}ms"
            own = "uniform" if law in (None, "fixed") else law  # netem's, where it is told of no law
            said["jitter"] = spread if own == "normal" else f"{own}({spread})"
        if self.loss_pct:
            mean = f"{self.loss_pct:.12g}%"
            said["loss"] = (
                f"correlated({mean},{self.loss_correlation_pct:.12g}%)" if self.loss_correlation_pct else mean
            )
        return ",".join(f"{key}={value}" for key, value in said.items() if value) or "delay=0ms"


class _Link(_Way):
    description: str = ""
    uplink: dict[str, Any] = {}


class _Catalogue(BaseModel):
    profiles: Annotated[dict[str, dict[str, Any]], Field(min_length=1, max_length=1000)]


def read_catalogue(path: Path) -> dict[str, Profile]:
    """The profiles of a catalogue by name, each with its description as its source. Raises SpecError naming file, profile and
    what is wrong.
    """
    found = {}
    for name, value in strict_yaml.checked(_Catalogue, strict_yaml.read(path), str(path)).profiles.items():
        here = f"{path}: {name[:40]}"
        link = strict_yaml.checked(_Link, value, here)
        both = {key: each for key, each in value.items() if key not in ("uplink", "description")}
        up = strict_yaml.checked(_Way, both | link.uplink, f"{here}: uplink")
        try:
            profile = parse_profile(f"up:{up.text()};down:{link.text()}")
        except SpecError as error:
            raise SpecError(f"{here}: {error}") from None
        found[name] = Profile(profile.name, profile.up, profile.down, source=link.description)
    return found
