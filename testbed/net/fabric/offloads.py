"""Segmentation offloads of an interface, off: every packet on an emulated link is one that could be on a wire.

With them on, TCP hands a veth "packets" of up to 64 kB, which a queue counts as one and a loss takes as a whole. All features of
that kind go off by name, also the ones ethtool's short names leave out (``tx-udp-segmentation``, which QUIC stacks use). An
emulator that sees through such packets may have TCP's and UDP's (UDP_SEGMENT, udp(7)), capped to a fraction of a millisecond
of the link's rate, where they spare much of its work. Checksums stay offloaded: nobody needs them on a link inside one
machine. See ethtool(8).
"""

from __future__ import annotations

import contextlib
import functools
import platform
import re
from collections.abc import Callable
from typing import Any, ClassVar

from pyroute2.ethtool.ioctl import EthtoolError, IoctlEthtool, NotSupportedError

from testbed.errors import NetworkError

_SEGMENTATION = re.compile(r"tx-.*segmentation|tx-gso-(partial|list)|rx-gro.*|rx-udp-gro-forwarding|rx-lro")
_TRANSPORTS = re.compile(r"tx-(tcp6?|udp)-segmentation")
_UDP = "tx-udp-segmentation"
_UDP_SINCE = (6, 2)  # earlier kernels drop what a packet socket cannot describe: VIRTIO_NET_HDR_GSO_UDP_L4


class _Features(IoctlEthtool):
    """pyroute2's, which asks for the features' names before each answer; they are the same for every interface of a kernel."""

    names: ClassVar[list[str]] = []

    def get_stringset(self, *arguments: Any, **named: Any) -> list[str]:
        if not self.names:
            self.names[:] = super().get_stringset(*arguments, **named)
        return self.names


class Ethtool:
    """The ethtool requests for interfaces of the namespace in which this is made. Use it in a ``with``."""

    def __init__(self) -> None:
        self._ethtool = _Features()

    def __enter__(self) -> Ethtool:
        return self

    def __exit__(self, *_: object) -> None:
        self._ethtool.close()

    def disable_segmentation(self, interface: str, but_transports: bool = False) -> None:
        """Turns every segmentation and coalescing feature off and reads back that it is; `but_transports`: TCP's and UDP's stay
        as they are, which may hand over several segments as one packet, for an emulator that knows what they are. Raises
        NetworkError."""
        if left := self._set(interface, _is_not_transports if but_transports else _is_segmentation, False):
            names = ", ".join(left)
            raise NetworkError(
                f"{interface}: the kernel keeps {names} on; packets would be larger than the MTU"
            )

    def enable_transports_segmentation(self, interface: str) -> None:
        """Lets TCP and UDP hand over several segments as one packet. Raises NetworkError."""
        self._set(interface, _is_transports, True)

    def _set(self, interface: str, chosen: Callable[[str], bool], on: bool) -> list[str]:
        """Those of the chosen features that are not as asked afterwards."""
        self._ethtool.change_ifname(interface)
        try:
            features = self._ethtool.get_features()
            names = [name for name in _chosen(chosen) if features.is_active(name) != on]
            able = [n for n in names if features.is_available(n) and not features.is_never_changed(n)]
            if not able:
                return names
            for name in able:
                features[name] = on
            with contextlib.suppress(NotSupportedError):  # some need others: what counts is what is read back
                self._ethtool.set_features(features)
            features = self._ethtool.get_features()
        except (OSError, EthtoolError) as error:
            raise NetworkError(f"{interface}: cannot read or set its offloads: {error}") from None
        return [name for name in names if features.is_active(name) != on]


@functools.cache
def _chosen(fits: Callable[[str], bool]) -> list[str]:
    return list(filter(fits, _Features.names))


def _is_segmentation(name: str) -> bool:
    return bool(_SEGMENTATION.fullmatch(name))


def _is_not_transports(name: str) -> bool:
    return _is_segmentation(name) and not _is_transports(name)


def _is_transports(name: str) -> bool:
    return bool(_TRANSPORTS.fullmatch(name)) and (name != _UDP or _describes_udp(platform.release()))


def _describes_udp(release: str) -> bool:
    """Whether a kernel of that release tells a packet socket which packets are UDP's super-packets, and takes them from one."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is not None and tuple(map(int, numbers.groups())) >= _UDP_SINCE
