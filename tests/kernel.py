"""What this machine's kernel can do, as reasons to skip a test. Each function: empty when it can, else why not."""

from __future__ import annotations

import functools
import os

from testbed.errors import TestbedError


@functools.cache
def lacks_root() -> str:
    """Why nothing that needs root can run."""
    return "" if os.geteuid() == 0 else "needs root"


@functools.cache
def lacks_namespaces() -> str:
    """Why no namespace with an emulated link can be made."""
    from testbed.net.emulators.relay import userspace

    if reason := lacks_root():
        return reason
    try:
        userspace.require_packet_sockets()
    except TestbedError as error:
        return str(error)
    return ""


@functools.cache
def lacks_netem() -> str:
    """Why real netem cannot be tried directly."""
    from testbed.net.emulators.netem import support

    if reason := lacks_root():
        return reason
    return "" if support.available() else "this kernel has no sch_netem"


@functools.cache
def lacks_guest() -> str:
    """Why no guest kernel can be booted (see guest.py)."""
    from tests.guest import missing

    return missing()


def in_guest() -> bool:
    """Whether this already runs inside the guest kernel."""
    return "TESTBED_GUEST" in os.environ
