"""The testbed for programs: a network of namespaces to start programs in, a scenario's run, and a run's rows as tables.

`from testbed import Network, Profile, run_scenario, load_run`: what that costs is paid when it is used. docs/library.md shows it.
"""

from __future__ import annotations

import json
import os
import subprocess
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from testbed import identity
from testbed.errors import UsageError
from testbed.hosts import listening, namespaces
from testbed.hosts.local import Namespace
from testbed.identity import as_root
from testbed.net.fabric.fabric import Fabric
from testbed.net.profile.conditions import Profile
from testbed.net.topology.files import load_topology, topology_from
from testbed.net.topology.topology import Topology

if TYPE_CHECKING:
    from testbed.analysis.run import Run
    from testbed.experiment.progress import Progress
    from testbed.experiment.scenario import Plan
    from testbed.net.calibration.calibrate import Calibration
    from testbed.net.emulators.emulator import Counters

__all__ = ["Link", "Network", "Node", "Profile", "load_run", "run_scenario"]

#: Shows some files in the place of others, and goes on as a program: pairs of files, "--", the program.
_SHOWING = 'while [ "$1" != -- ]; do mount --bind "$1" "$2" || exit 126; shift 2; done; shift; exec "$@"'


class Node:
    """A node of a network: programs run in it, and reach the others by the network's links alone."""

    def __init__(self, fabric: Fabric, name: str) -> None:
        self._fabric, self.name = fabric, name

    @property
    def namespace(self) -> str:
        """The network namespace, to be found under /run/netns."""
        return self._fabric.namespace(self.name)

    @property
    def address(self) -> str:
        """Its IPv4 address on its first link."""
        return self._fabric.address(self.name)

    def address_on(self, link: str) -> str:
        """Its IPv4 address on the named link. Raises SpecError where it is not on it."""
        return self._fabric.address(self.name, link)

    def popen(self, argv: Sequence[str], *, root: bool = False, **options: Any) -> subprocess.Popen[Any]:
        """A program started in the node; `options` are subprocess.Popen's. It knows all nodes by name.

        It runs as the user who called, without a capability; `root`: as root, as ping, ip and tcpdump ask for. It ends with the
        network at the latest. Raises OSError where there is no such program; NetworkError after `Network.close`.
        """
        if isinstance(argv, str) or not argv:
            raise UsageError(
                "popen takes a program and its arguments as a list, such as ['ping', '-c3', 'cloud']"
            )
        with as_root():
            names = self._fabric.state.write_names(self.name)
        shown = [str(path) for seen, own in names.items() if seen.exists() for path in (own, seen)]
        user = identity.invoking_user()
        program = list(argv) if root else Namespace(self.namespace, user).plain(argv)
        theirs = {} if root else {"HOME": user.home, "USER": user.name, "LOGNAME": user.name}
        command = ["nsenter", f"--net={namespaces.path(self.namespace)}", "--", "unshare", "--mount"]
        command += ["--propagation", "slave", "--", "sh", "-c", _SHOWING, "testbed", *shown, "--", *program]
        return subprocess.Popen(command, **{"env": {**os.environ, **theirs}, **options})

    def await_port(self, port: int, timeout_s: float = 10.0) -> None:
        """Waits until a program in the node listens at a TCP port; nothing connects. Raises NetworkError where none does."""
        listening.await_port(self.namespace, port, timeout_s)

    def run(
        self, argv: Sequence[str], *, root: bool = False, timeout: float | None = 60.0, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """A program run to its end in the node; what it prints is text, in `stdout` and `stderr` of what this returns.

        Raises subprocess.TimeoutExpired after `timeout` seconds, and CalledProcessError with ``check=True``.
        """
        check = options.pop("check", False)
        piped = {
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "stdin": subprocess.DEVNULL,
            "text": True,
        }
        with self.popen(argv, root=root, **{**piped, **options}) as process:
            try:
                out, errors = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        done = subprocess.CompletedProcess(list(argv), process.returncode, out, errors)
        if check:
            done.check_returncode()
        return done


class Link:
    """A link of a network, whose conditions can be changed and proved, and whose packets are counted."""

    def __init__(self, fabric: Fabric, name: str) -> None:
        self._fabric, self.name = fabric, name

    @property
    def profile(self) -> Profile:
        """The conditions in force."""
        return self._fabric.topology.link(self.name).profile

    @property
    def ends(self) -> tuple[str, str]:
        """The two nodes' names; *up* goes from the first to the second."""
        link = self._fabric.topology.link(self.name)
        return link.a, link.b

    def apply(self, profile: Profile | str) -> Profile:
        """Puts the link under another profile and returns it. Connections survive; what is under way is dropped (see `settle`).

        Raises SpecError where the text is no profile.
        """
        wanted = Profile.parse(profile) if isinstance(profile, str) else profile
        self._fabric.apply(self.name, wanted)
        return wanted

    def counters(self) -> dict[str, Counters]:
        """What crossed each way, ``up`` and ``down``, since the network was built: packets, bytes of the network layer, drops."""
        return self._fabric.counters(self.name)

    def settle(self, patience_s: float | None = None) -> bool:
        """Waits until nothing is under way any more; whether that was so in time (None: two round trips and a little)."""
        return self._fabric.settle(self.name, patience_s)

    def calibrate(self) -> Calibration:
        """Measures the link as it is, both ways, with probes of its own: some seconds. ``ok``: all that its profile asks for is
        within tolerance; ``lines()``: asked beside measured; ``cause``: what is not, and why.
        """
        return self._fabric.calibrate(self.name, self.profile)

    def down(self) -> None:
        """Takes the link down, as a pulled cable does."""
        self._set(False)

    def up(self) -> None:
        """Brings it up again, with addresses, neighbours and routes."""
        self._set(True)

    def _set(self, up: bool) -> None:
        from testbed.net.fabric import wiring

        wiring.set_link(self._fabric.state, self._fabric.topology.link_number(self.name), up)


class Network:
    """A network that stands until `close`, the end of its ``with`` block, or that of this process. Building one takes root.

    topology: the name of a shipped one, a file, or what such a file says, as a mapping. links: profiles by link, in the place of
    the topology's. Raises SpecError for what is no topology or profile; UsageError without root; NetworkError where the kernel
    refuses.
    """

    def __init__(
        self,
        topology: str | Path | Mapping[str, Any] = "edge-cloud",
        links: Mapping[str, Profile | str] | None = None,
        *,
        emulator: str = "auto",
        captures: Path | None = None,
    ) -> None:
        read = _read(topology)
        if read.kind != "namespaces":
            raise UsageError(
                f"topology {read.name} is of hosts, which `testbed run` uses; a Network is of namespaces"
            )
        given = {name: Profile.parse(p) if isinstance(p, str) else p for name, p in (links or {}).items()}
        self._fabric = Fabric.build(read.with_profiles(given), emulator, captures=captures)
        self._end = weakref.finalize(self, self._fabric.close)

    @property
    def id(self) -> str:
        """The four digits that all its names carry, and `testbed show --id` takes."""
        return self._fabric.id

    @property
    def topology(self) -> Topology:
        """The topology with the profiles that are in force."""
        return self._fabric.topology

    @property
    def emulator(self) -> str:
        """What imposes the links' conditions: ``netem`` or ``userspace``."""
        return self._fabric.emulation

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Its nodes, in the topology's order."""
        return tuple(Node(self._fabric, node.name) for node in self.topology.nodes)

    @property
    def links(self) -> tuple[Link, ...]:
        """Its links, in the topology's order."""
        return tuple(Link(self._fabric, link.name) for link in self.topology.links)

    def node(self, name: str) -> Node:
        """The node of that name. Raises SpecError where there is none."""
        return Node(self._fabric, self.topology.require_node(name))

    def link(self, name: str) -> Link:
        """The link of that name. Raises SpecError where there is none."""
        return Link(self._fabric, self.topology.link(name).name)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def check(self) -> None:
        """Raises NetworkError where what imposes a link's conditions has died, which nothing else would tell."""
        self._fabric.check()

    def close(self) -> None:
        """Removes the network and ends what still runs in it. May be called again."""
        self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read(topology: str | Path | Mapping[str, Any]) -> Topology:
    if isinstance(topology, Mapping):
        return topology_from(topology, "topology", "library")
    return load_topology(topology)


def run_scenario(
    scenario: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    resume: bool = False,
    accept_uncalibrated: bool = False,
    watch: Callable[[Progress], None] | None = None,
) -> Run:
    """Runs a scenario into the directory `out`, as `testbed run` does, and returns its rows; failed trials are in `failed`.

    scenario: the name of a shipped one, a file, or what such a file says, as a mapping. settings: changes of it, as ``--set``.
    resume: where `out` has this very run already, only what has no row or failed is made. watch: is told of the progress.
    Nothing is drawn: see `load_run`. Behind sudo, files are those of the user who typed it.

    Raises SpecError for what is no scenario; UsageError without root where the topology is of namespaces, for a directory that
    has a run unless `resume`, and for one of other settings; NetworkError where a link is not what was asked for.
    """
    from testbed.experiment import runner
    from testbed.net.fabric import removal

    with identity.assumed():
        plan, path = _plan(scenario, settings or {}), Path(out)
        if plan.topology.kind == "namespaces":
            namespaces.require_root("building a network")
            removal.clean()
        told = watch or (lambda _: None)
        if resume and (path / "manifest.json").exists():
            if runner.plan_of(path).scenario != plan.scenario:
                raise UsageError(f"{path} is a run of other settings: name another directory")
            started = runner.resume(path, told, accept_uncalibrated)
        else:
            started = runner.start(plan, path, told, accept_uncalibrated)
        started.execute()
        return load_run(path)


def _plan(scenario: str | Path | Mapping[str, Any], settings: Mapping[str, Any]) -> Plan:
    from testbed.experiment.plan import load_plan, make_plan

    if isinstance(scenario, Mapping):
        return make_plan({"name": "library", **scenario, **settings}, "run_scenario")
    return load_plan(
        str(scenario), assignments=[f"{key}={json.dumps(value)}" for key, value in settings.items()]
    )


def load_run(path: str | Path, where: str | None = None) -> Run:
    """The run in a directory: `rows` and `failed` are tables (pandas) with the columns of docs/results.md; `manifest`,
    `calibration`, `compute`; `notes`: what is missing. where: only rows for which this holds, such as ``profile == "lte"``.

    Raises UsageError where there is no run, or the condition is none.
    """
    from testbed.analysis.run import load

    return load(Path(path), where)
