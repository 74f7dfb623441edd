"""Background traffic: TCP and UDP flows between named nodes, with rates and times, beside what is measured."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from testbed.errors import NetworkError, SpecError, UsageError
from testbed.hosts.host import Process
from testbed.net.traffic import flow
from testbed.units import parse_rate, parse_time

if TYPE_CHECKING:
    from testbed.net.network import Network

_END_S = 5.0


class Flow(BaseModel):
    """One flow, as ``{from: edge2, to: cloud, kind: udp, rate: 20mbit, start: 0s, stop: 30s}`` describes it. Times are seconds
    from when traffic starts; `stop_s` None: until it ends."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    kind: Literal["tcp", "udp", "iperf3"] = "tcp"  #: iperf3: a TCP flow by that program
    rate_bps: Annotated[float, BeforeValidator(parse_rate), Field(gt=0)] | None = Field(None, alias="rate")
    start_s: Annotated[float, BeforeValidator(parse_time)] = Field(0.0, alias="start")
    stop_s: Annotated[float, BeforeValidator(parse_time)] | None = Field(None, alias="stop")

    @model_validator(mode="after")
    def _fits(self) -> Flow:
        if self.kind == "udp" and self.rate_bps is None:
            raise SpecError("rate is missing; a udp flow does not find its own")
        if self.stop_s is not None and self.stop_s <= self.start_s:
            raise SpecError("stop: not after start")
        if self.source == self.target:
            raise SpecError(f"a flow from {self.source!r} to itself")
        return self


def require_tools(flows: Sequence[Flow]) -> None:
    """Raises UsageError where a flow needs a program that is not there."""
    if any(each.kind == "iperf3" for each in flows) and shutil.which("iperf3") is None:
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
        for each in flows:
            receiver = _start(network, each.target, "receive", each.kind)
            ending.callback(_kill, receiver)
            port = receiver.stdout.readline().decode().strip()
            if not port:
                raise NetworkError(
                    f"traffic from {each.source} to {each.target}: its receiver does not start"
                )
            numbers = (each.rate_bps or 0, each.start_s, each.stop_s or 0)
            address = network.address(each.target)
            sender = _start(network, each.source, "send", each.kind, address, port, *map(str, numbers))
            ending.callback(_kill, sender)
            for process, end in ((sender, each.source), (receiver, each.target)):
                what = f"background traffic from {each.source} to {each.target}: its end at {end}"
                ending.enter_context(network.watching(process, what))
            pairs.append((each, sender, receiver))
        try:
            yield results
        except BaseException:
            with contextlib.suppress(NetworkError):  # what broke off the block is what is to be told
                _collect(pairs, results)
            raise
        _collect(pairs, results)


def _collect(pairs: Sequence[tuple[Flow, Process, Process]], results: list[dict[str, Any]]) -> None:
    for each, sender, receiver in pairs:
        results.append(_result(each, _finish(sender), _finish(receiver)))


def _result(each: Flow, sent: dict[str, float], received: dict[str, float]) -> dict[str, Any]:
    goodput = 8 * received["bytes"] / received["seconds"] if received["seconds"] else 0.0
    counted = {"sent_bytes": sent["bytes"], "received_bytes": received["bytes"], "goodput_bps": goodput}
    return each.model_dump() | counted


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
