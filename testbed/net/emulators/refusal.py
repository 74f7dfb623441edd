"""No approximation in silence: what an emulator does not know of, it refuses by name."""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

from testbed.errors import UsageError

if TYPE_CHECKING:
    from testbed.net.profile.profile import Profile


def refuse_unknown(emulator: str, profile: Profile, honoured: Set[str], remedy: str = "") -> None:
    """Raises UsageError that names the first thing in *profile* that is not in *honoured*.

    See `Direction.beyond_the_basics` for the names.
    """
    for way, direction in (("up", profile.up), ("down", profile.down)):
        for name, written in direction.beyond_the_basics().items():
            if name not in honoured:
                raise UsageError(
                    f"emulator {emulator} cannot honour {written!r} ({way}, {name}){remedy and '; ' + remedy}"
                )
