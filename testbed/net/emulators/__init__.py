"""Link emulators: two ways of imposing a profile on a link, behind one contract.

Both obey one law. A packet that enters at time *t* is lost with the profile's probability; else it reaches the bottleneck at
``t + delay`` (plus jitter, never before the packet in front of it), waits there in a drop-tail queue, and leaves after the
packet in front of it has left and its own bytes have been sent at the rate.
"""

from __future__ import annotations

from pathlib import Path

from testbed.errors import UsageError
from testbed.net.emulators.contract import Attachment, Counters, Emulator

__all__ = ["NAMES", "Attachment", "Counters", "Emulator", "choose", "reattach"]

NAMES = ("auto", "netem", "userspace")


def choose(name: str = "auto", *, seed: int | None = None) -> Emulator:
    """The emulator called *name*; ``auto`` is netem where the kernel has it, else the userspace relay.

    *seed* fixes the random losses and delays (netem: since Linux 6.6). Raises UsageError when this machine cannot run it.
    """
    from testbed.net.emulators.netem import Netem, available, require
    from testbed.net.emulators.userspace import Userspace, require_taps

    if name not in NAMES:
        raise UsageError(f"unknown emulator {name!r}; use one of {', '.join(NAMES)}")
    if name == "netem":
        require()
    if name == "netem" or (name == "auto" and available()):
        return Netem(seed)
    require_taps()
    return Userspace(seed)


def reattach(name: str, wire: str, link: str, a: str, b: str, keep: Path) -> Attachment:
    """The running attachment that emulator *name* made earlier with ``keep``; raises NetworkError when it is gone."""
    from testbed.net.emulators.netem import Netem
    from testbed.net.emulators.userspace import Userspace

    emulator: Emulator = Netem() if name == "netem" else Userspace()
    return emulator.reattach(wire, link, a, b, keep=keep)
