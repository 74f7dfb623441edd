"""The errors people see. Each ends in the command line as one line and an exit status, never as a traceback.

A message names the place, the value and the remedy: ``scenarios/5g.yaml: links.wan: unknown profile '6g'; see `testbed
profiles```.
"""

from __future__ import annotations


class TestbedError(Exception):
    """Something failed while running: exit status 1; rows so far are kept."""

    __test__ = False  # the name looks like a test class to pytest
    exit_status = 1


class UsageError(TestbedError):
    """The request was wrong (unknown name, bad unit, missing file, no root): exit status 2."""

    exit_status = 2


class UnitError(UsageError, ValueError):
    """A quantity that cannot be read: wrong unit, not a number, out of range."""


class SpecError(UsageError, ValueError):
    """A codec, profile, topology or scenario text that cannot be understood."""


class StorageError(TestbedError):
    """A file cannot be written, or is none: a full disk, a limit, a directory that has gone, a link in its place."""


class NetworkError(TestbedError):
    """The kernel refused, or a link is not what was asked for."""


class EndpointError(TestbedError):
    """An endpoint process died, answered with an error, or did not answer in time."""


class RefusedError(EndpointError):
    """The cloud had no room for a request."""


class NotFiniteError(TestbedError):
    """A model's caches or logits are NaN or infinite: what would be measured with them says nothing."""


class OutOfMemory(TestbedError):
    """A computation found no room in memory, a GPU's or the host's; what it had of it is free again."""


class LateError(TestbedError):
    """What a computation asked for did not come."""


class Stopped(TestbedError):
    """A computation was given up on request: nobody needs its result any more."""


class WireError(TestbedError, ValueError):
    """Bytes from the network that are not a valid frame."""


class PayloadError(TestbedError, ValueError):
    """Bytes that are not a valid codec payload."""
