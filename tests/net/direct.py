"""A link without conditions, for the tests of the fabric: what arrives at one end leaves through the other."""

from __future__ import annotations

import subprocess
from pathlib import Path

from testbed.errors import NetworkError
from testbed.net.emulators.emulator import Attachment, Counters, Emulator
from testbed.net.profile.profile import Profile


def tc(wire: str, *arguments: str) -> None:
    subprocess.run(["ip", "netns", "exec", wire, "tc", *arguments], check=True, capture_output=True)


class DirectLink(Attachment):
    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.detached = 0

    def apply(self, profile: Profile, origin_s: float | None = None, *, fresh: bool = False) -> None:
        self.profile = profile

    def under_way(self) -> int:
        return 0

    def counters(self) -> dict[str, Counters]:
        return {way: Counters(0, 0, 0, 0, 0.0) for way in ("up", "down")}

    def detach(self) -> None:
        self.detached += 1


class Direct(Emulator):
    """Redirects each end's arrivals to the other. `failing_at`: the link whose attachment fails."""

    name = "direct"

    def __init__(self, failing_at: str | None = None, error: BaseException | None = None) -> None:
        self.failing_at = failing_at
        self.error = error or NetworkError("this link fails")
        self.links: list[DirectLink] = []

    def attach(
        self, wire: str, link: str, a: str, b: str, profile: Profile, *, keep: Path | None = None
    ) -> DirectLink:
        if link == self.failing_at:
            raise self.error
        for here, there in ((a, b), (b, a)):
            tc(wire, "qdisc", "add", "dev", here, "ingress")
            redirect = f"parent ffff: u32 match u32 0 0 action mirred egress redirect dev {there}"
            tc(wire, "filter", "add", "dev", here, *redirect.split())
        self.links.append(DirectLink(profile))
        return self.links[-1]

    def reattach(self, wire: str, link: str, a: str, b: str, *, keep: Path) -> DirectLink:
        raise NetworkError("nothing outlives this")
