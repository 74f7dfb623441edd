"""A fixed share for everybody, whether it is used or not."""

from __future__ import annotations

from dataclasses import dataclass

from testbed.net.sharing.contract import Fixed


@dataclass(frozen=True)
class Reserved(Fixed):
    """Everybody has the same part of the time reserved; what is not used is lost."""

    name = "reserved"
    source = "static equal allocation, the baseline of allocation by what is to be sent"

    def alone(self, place: int, members: int) -> float:
        return 1 / members
