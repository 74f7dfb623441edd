"""Running a command in a node, as a user at that host's terminal would."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from testbed.errors import NetworkError, UsageError
from testbed.hosts import namespaces, processes
from testbed.identity import as_root, resume_root
from testbed.net.fabric.state import State


def execute(network: State, node: str, argv: Sequence[str]) -> int:
    """Runs the command in the node's namespace and returns its exit status (128 + n where signal n ended it).

    The command runs as root. It knows all nodes by name (/etc/hosts) and sees its namespace's interfaces in /sys; it has this
    process's terminal, directory, and the environment that this process was started with. Signals reach it. To be called from
    the main thread.
    Raises SpecError for an unknown node, UsageError without root or where there is no such command.
    """
    namespace = network.namespace(node)
    namespaces.require_root("running a command in a node")
    if not argv:
        raise UsageError("no command given; write for example: testbed exec edge -- ping -c3 cloud")
    if not namespaces.path(namespace).exists():
        raise NetworkError(
            f"network {network.id}: namespace {namespace} is gone; remove the rest with `testbed down`"
        )
    with as_root():
        names = network.write_names(node)
    sys.stdout.flush()
    sys.stderr.flush()
    # Blocked, not handled: they stay pending until they are waited for, so none slips through while the child
    # starts.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, processes.passed_on())
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        child = os.fork()
        if child == 0:
            resume_root()
            _become(namespace, names, argv, writing, mask)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            trouble = pipe.read().decode(errors="replace")
        status = processes.await_child(child)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    if trouble:
        raise UsageError(trouble)
    return status


def _become(
    namespace: str,
    names: Mapping[Path, Path],
    argv: Sequence[str],
    trouble: int,
    mask: set[signal.Signals | int],
) -> NoReturn:
    """The rest of the child's life. The pipe `trouble` closes by itself when the command starts."""
    try:
        namespaces.enter(namespace)
        namespaces.private_view(names)
        namespaces.end_with_parent(signal.SIGHUP)
        for number in (
            signal.SIGPIPE,
            signal.SIGXFSZ,
            *processes.PASSED_ON,
        ):  # Python ignores the first two, a child inherits it
            if signal.getsignal(number) is not signal.SIG_IGN or number in (signal.SIGPIPE, signal.SIGXFSZ):
                signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.execvp(argv[0], list(argv))
    except OSError as error:
        os.write(trouble, f"{argv[0]}: {error.strerror}".encode())
    except BaseException as error:
        os.write(trouble, str(error).encode())
    os._exit(127)
