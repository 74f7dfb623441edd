"""Link emulators: two ways of imposing a profile on a link, behind one contract.

Both obey one law. A packet that enters at time *t* is lost with the profile's probability; else it reaches the bottleneck at
``t + delay`` (plus jitter, never before the packet in front of it), waits there in a drop-tail queue, and leaves after the
packet in front of it has left and its own bytes have been sent at the rate.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

# The relay process comes by here, too, and has to be there at once: nothing heavy is imported.
from testbed.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from testbed.net.emulators.emulator import Attachment, Counters, Emulator, Wanted

__all__ = [
    "NAMES",
    "Attachment",
    "Counters",
    "Emulator",
    "Wanted",
    "attach_all",
    "choose",
    "reattach",
    "release_all",
]

NAMES = ("auto", "netem", "userspace")


def __getattr__(name: str) -> object:
    if name in ("Attachment", "Counters", "Emulator", "Wanted"):
        from testbed.net.emulators import emulator as contract

        return getattr(contract, name)
    raise AttributeError(name)


def choose(name: str = "auto", *, seed: int | None = None) -> Emulator:
    """The emulator called *name*; ``auto`` is netem where the kernel has it, else the userspace relay.

    *seed* fixes the random losses and delays (netem: since Linux 6.6). Raises UsageError when this machine cannot run it.
    """
    from testbed.net.emulators.netem.netem import Netem
    from testbed.net.emulators.netem.support import available, require
    from testbed.net.emulators.relay.userspace import Userspace, require_packet_sockets

    if name not in NAMES:
        raise UsageError(f"unknown emulator {name!r}; use one of {', '.join(NAMES)}")
    if name == "netem":
        require()
    if name == "netem" or (name == "auto" and available()):
        return Netem(seed)
    require_packet_sockets()
    return Userspace(seed)


def attach_all(
    emulator: Emulator, wire: str, wanted: Sequence[Wanted], keep: Path | None = None
) -> list[Attachment]:
    """An attachment for each link that is wanted, in that order; when one fails, none stays. See `Emulator.attach`."""
    together = getattr(emulator, "attach_all", None)
    if together is not None:
        return together(wire, wanted, keep=keep)
    made: list[Attachment] = []
    try:
        for one in wanted:
            made.append(emulator.attach(wire, one.link, one.a, one.b, one.profile, keep=keep))
    except BaseException:
        for attachment in made:
            with contextlib.suppress(Exception):  # the first failure is the one to tell
                attachment.detach()
        raise
    return made


def release_all(emulator: Emulator, attachments: Sequence[Attachment]) -> None:
    """Ends the emulation of links whose wire is about to be removed, and takes everything on it along. Raises nothing."""
    together = getattr(emulator, "release_all", None)
    with contextlib.suppress(Exception):  # what it leaves goes with its namespaces, or is on record
        if together is not None:
            together(attachments)
            return
    for attachment in attachments:
        with contextlib.suppress(Exception):
            attachment.detach()


def reattach(name: str, wire: str, link: str, a: str, b: str, keep: Path) -> Attachment:
    """The running attachment that emulator *name* made earlier with ``keep``; raises NetworkError when it is gone."""
    from testbed.net.emulators.netem.netem import Netem
    from testbed.net.emulators.relay.userspace import Userspace

    emulator: Emulator = Netem() if name == "netem" else Userspace()
    return emulator.reattach(wire, link, a, b, keep=keep)
