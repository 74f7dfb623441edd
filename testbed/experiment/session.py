"""What a run holds while it is on: the network, both endpoints, the traffic beside them, the account of what crossed the link."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from testbed import files
from testbed.endpoints.endpoint import Endpoint
from testbed.experiment.deployment import Pair
from testbed.experiment.results import RunDirectory
from testbed.experiment.scenario import Plan
from testbed.hosts.host import Host
from testbed.net.fabric.accounting import Account
from testbed.net.fabric.fabric import Fabric
from testbed.net.loopback import Loopback
from testbed.net.network import Network
from testbed.net.traffic.traffic import running


class Session:
    """A network that is there, and the endpoints that run on it. `flows`: what the traffic came to, once it has ended."""

    def __init__(self, plan: Plan, network: Network, pair: Pair) -> None:
        self.plan, self.network, self.pair = plan, network, pair
        self.account = Account(network, plan.link)
        self.flows: list[dict[str, Any]] = []

    @property
    def linked(self) -> bool:
        """Whether requests cross a link: that has to be measured, and whose interfaces count the run's bytes alone."""
        return self.network.emulation != "none"

    @contextlib.contextmanager
    def traffic(self) -> Iterator[None]:
        """The scenario's background traffic, while the block runs. Raises UsageError, NetworkError where it cannot be started."""
        with running(self.network, self.plan.flows()) as self.flows:
            yield


#: Opens the session of a plan whose logs are to be in a run's directory; what it does is told to the function.
Opening = Callable[[Plan, RunDirectory, Callable[[str], None]], contextlib.AbstractContextManager[Session]]


@contextlib.contextmanager
def across_links(plan: Plan, directory: RunDirectory, say: Callable[[str], None]) -> Iterator[Session]:
    """The scenario's topology, in namespaces or on hosts of their own, edge and cloud each a process on its node. Raises
    UsageError, NetworkError, EndpointError."""
    topology = plan.under(plan.profiles[0])
    with contextlib.ExitStack() as stack:
        network: Network
        if topology.kind == "hosts":
            from testbed.net.real.real import Real

            say(f"reaching {', '.join(str(node.host) for node in topology.nodes)}")
            network = stack.enter_context(Real.open(topology))
        else:
            say("building the network")
            captures = directory.path / "captures"
            network = stack.enter_context(Fabric.build(topology, plan.scenario.emulator, captures=captures))
        hosts = {
            side: network.host(node)
            for side, node in (("edge", plan.scenario.edge), ("cloud", plan.scenario.cloud))
        }
        edge, cloud = (stack.enter_context(endpoint(side, host, directory)) for side, host in hosts.items())
        yield Session(plan, network, Pair(plan, edge, cloud, network.check, hosts))


@contextlib.contextmanager
def in_one_process(plan: Plan, directory: RunDirectory, say: Callable[[str], None]) -> Iterator[Session]:
    """Edge and cloud in one process that share one model, over loopback: what a codec does to the answers needs no link. Raises
    EndpointError."""
    with Loopback() as network, endpoint("loopback", network.host("edge"), directory) as both:
        yield Session(plan, network, Pair(plan, both, both))


def as_asked(
    plan: Plan, directory: RunDirectory, say: Callable[[str], None]
) -> contextlib.AbstractContextManager[Session]:
    """Across the scenario's links, or `in_one_process` where it is placement-free. Raises as they do."""
    return (in_one_process if plan.scenario.placement_free else across_links)(plan, directory, say)


@contextlib.contextmanager
def endpoint(role: str, host: Host, directory: RunDirectory, log: str = "") -> Iterator[Endpoint]:
    """An endpoint whose log is in the run's directory, of another name than its role's where one is given."""
    logs = directory.path / "logs"
    with files.storing(logs):
        logs.mkdir(exist_ok=True)
    endpoint = Endpoint.start(role, host, logs / f"{log or role}.log")
    with endpoint.process:
        yield endpoint
