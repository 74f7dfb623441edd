"""Background traffic: TCP and UDP flows between named nodes, with rates and times, beside what is measured."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from testbed import strict_yaml
from testbed.errors import NetworkError, SpecError, UsageError
from testbed.hosts.host import Process
from testbed.net.traffic import flow
from testbed.units import parse_rate, parse_time

if TYPE_CHECKING:
    from testbed.net.network import Network

_KINDS = ("tcp", "udp", "iperf3")
_KEYS = {"from", "to", "kind", "rate", "start", "stop"}
_END_S = 5.0


@dataclass(frozen=True)
class Flow:
    """One flow. Times are seconds from when traffic starts; `stop_s` None: until it ends."""

    source: str
    target: str
    kind: Literal["tcp", "udp", "iperf3"] = "tcp"  # iperf3: a TCP flow by that program
    rate_bps: float | None = None
    start_s: float = 0.0
    stop_s: float | None = None


def flow_from(value: Any) -> Flow:
    """The flow that ``{from: edge2, to: cloud, kind: udp, rate: 20mbit, start: 0s, stop: 30s}`` describes. Raises SpecError."""
    strict_yaml.mapping(value, "", _KEYS, {"from", "to"})
    kind = strict_yaml.text(value.get("kind", "tcp"), "kind")
    if kind not in _KINDS:
        raise SpecError(f"kind: unknown kind {kind[:40]!r}; use one of {', '.join(_KINDS)}")
    numbers = {}
    for key, read in (("rate", parse_rate), ("start", parse_time), ("stop", parse_time)):
        try:
            numbers[key] = None if value.get(key) is None else read(value[key])
        except UsageError as error:
            raise SpecError(f"{key}: {error}") from None
    rate, start, stop = numbers["rate"], numbers["start"] or 0.0, numbers["stop"]
    if kind == "udp" and rate is None:
        raise SpecError("rate is missing; a udp flow does not find its own")
    if rate is not None and rate <= 0:
        raise SpecError("rate: must be more than nothing")
    if stop is not None and stop <= start:
        raise SpecError("stop: not after start")
    source, target = strict_yaml.text(value["from"], "from"), strict_yaml.text(value["to"], "to")
    if source == target:
        raise SpecError(f"a flow from {source!r} to itself")
    return Flow(source, target, cast(Literal["tcp", "udp", "iperf3"], kind), rate, start, stop)


def require_tools(flows: Sequence[Flow]) -> None:
    """Raises UsageError where a flow needs a program that is not there."""
    if any(one.kind == "iperf3" for one in flows) and shutil.which("iperf3") is None:
        raise UsageError(
            "traffic of kind iperf3: there is no iperf3 on this machine; install it, or use kind: tcp"
        )


@contextlib.contextmanager
def running(network: Network, flows: Sequence[Flow]) -> Iterator[list[dict[str, Any]]]:
    """The flows, while the block runs. Afterwards the list holds one entry each: the flow, ``sent_bytes``, ``received_bytes`` and
    ``goodput_bps`` at the receiver; also where the block is left by an exception, of what was done until then. Raises UsageError
    where iperf3 is asked for and missing, NetworkError where a flow cannot be started."""
    require_tools(flows)
    results: list[dict[str, Any]] = []
    pairs: list[tuple[Flow, Process, Process]] = []
    with contextlib.ExitStack() as ending:
        for one in flows:
            receiver = _start(network, one.target, "receive", one.kind)
            ending.callback(_kill, receiver)
            port = receiver.stdout.readline().decode().strip()
            if not port:
                raise NetworkError(f"traffic from {one.source} to {one.target}: its receiver does not start")
            numbers = (one.rate_bps or 0, one.start_s, one.stop_s or 0)
            address = network.address(one.target)
            sender = _start(network, one.source, "send", one.kind, address, port, *map(str, numbers))
            ending.callback(_kill, sender)
            pairs.append((one, sender, receiver))
        try:
            yield results
        except BaseException:
            with contextlib.suppress(NetworkError):  # what broke off the block is what is to be told
                _collect(pairs, results)
            raise
        _collect(pairs, results)


def _collect(pairs: Sequence[tuple[Flow, Process, Process]], results: list[dict[str, Any]]) -> None:
    for one, sender, receiver in pairs:
        results.append(_result(one, _finish(sender), _finish(receiver)))


def _result(one: Flow, sent: dict[str, float], received: dict[str, float]) -> dict[str, Any]:
    goodput = 8 * received["bytes"] / received["seconds"] if received["seconds"] else 0.0
    counted = {"sent_bytes": sent["bytes"], "received_bytes": received["bytes"], "goodput_bps": goodput}
    return asdict(one) | counted


def _start(network: Network, node: str, *arguments: str) -> Process:
    process = network.host(node).start([sys.executable, "-I", "-S", flow.__file__, *arguments], {})
    network.record_process(process.pid, what=f"traffic at {node}")
    return process


def _finish(process: Process) -> dict[str, float]:
    process.stdin.close()
    try:
        if process.status(_END_S) == 0:
            count: dict[str, float] = json.loads(process.stdout.read())
            return count
    except ValueError:
        pass
    raise NetworkError(f"background traffic: process {process.pid} ended without a result")


def _kill(process: Process) -> None:
    process.kill()
    process.stop()
