"""Link emulators: ways of imposing a profile on a link, behind one contract, by name.

All do the same to a packet. One that enters at time *t* is lost with the profile's probability; else it reaches the bottleneck at
``t + delay`` (plus jitter, never before the packet in front of it), waits there in a drop-tail queue, and leaves after the
packet in front of it has left and its own bytes have been sent at the rate.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

# The relay process comes by here, too, and has to be there at once: nothing heavy is imported.
from testbed.errors import NetworkError, SpecError

if TYPE_CHECKING:
    from pathlib import Path

    from testbed.net.emulators.emulator import Attachment, Emulator


_KINDS = {
    "netem": "testbed.net.emulators.netem.netem:Netem",
    "userspace": "testbed.net.emulators.relay.userspace:Userspace",
}
"""The preferred ones first."""
NAMES = ("auto", *_KINDS)


def _kind(name: str) -> type[Emulator]:
    from testbed.kinds import load

    return load(_KINDS[name])


def known(name: str) -> str:
    """*name*, if there is such an emulator. Raises SpecError."""
    if name not in NAMES:
        raise SpecError(f"unknown emulator {name[:40]!r}; use one of {', '.join(NAMES)}")
    return name


def choose(name: str = "auto", *, seed: int | None = None) -> Emulator:
    """The emulator called *name*; ``auto`` is netem where the kernel has it, else the userspace relay.

    *seed* fixes the random losses and delays (netem: since Linux 6.6). Raises UsageError when this machine cannot run it.
    """
    *preferred, last = map(_kind, _KINDS if known(name) == "auto" else (name,))
    for kind in preferred:
        if kind.available():
            return kind(seed)
    last.require()
    return last(seed)


def reattach(name: str, wire: str, link: str, a: str, b: str, keep: Path) -> Attachment:
    """The running attachment that emulator *name* made earlier with ``keep``; raises NetworkError when it is gone."""
    if name not in _KINDS:
        raise NetworkError(f"link {link}: its emulator {name!r} is not known here")
    return _kind(name)().reattach(wire, link, a, b, keep=keep)
