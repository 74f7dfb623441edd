"""Whoever waits for open files waits as well where a process has more of them than select(2) takes."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import testbed
from testbed import descriptors
from testbed.deadline import Deadline
from testbed.experiment.lanes import _drained
from testbed.hosts import asking, processes
from testbed.hosts.host import lines
from testbed.hosts.local import Local
from testbed.net.emulators.relay.relay import Waiter
from testbed.transport import wire
from testbed.transport.transport import parse

SELECTED = 1024  #: FD_SETSIZE


@pytest.fixture
def crowded() -> Iterator[None]:
    """All numbers that select(2) takes are other files'."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 4 * SELECTED:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 4 * SELECTED), hard))
    held: list[int] = []
    try:
        while not held or held[-1] < SELECTED + 8:
            held.append(os.open("/dev/null", os.O_RDONLY))
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reading, writing = os.pipe()
    try:
        yield reading, writing
    finally:
        os.close(reading)
        os.close(writing)


def test_files_of_any_number_are_waited_for(crowded: None) -> None:
    with pipe() as (reading, writing), pipe() as (silent, _):
        assert reading > SELECTED
        with pytest.raises(ValueError, match="out of range"):
            select.select([reading], [], [], 0)
        assert descriptors.ready([silent, reading], 0.01) == []
        assert descriptors.ready([silent], 0.01, [writing]) == [writing]
        os.write(writing, b"x")
        assert descriptors.ready([silent, reading]) == [reading]


def test_a_wait_is_over_with_its_time_an_end_or_an_error() -> None:
    with pipe() as (reading, _):
        began = time.monotonic()
        assert descriptors.ready([reading], 0.02) == []
        assert time.monotonic() - began >= 0.02
        assert descriptors.ready([reading], -1.0) == []
    with pytest.raises(OSError, match="Bad file descriptor"):
        descriptors.ready([reading], 1.0)
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert descriptors.ready([ours]) == [ours]


def test_a_signal_is_handled_amid_a_wait_which_then_goes_on_or_ends_as_the_handler_says() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with pipe() as (reading, _):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            began = time.monotonic()
            assert descriptors.ready([reading], 0.2) == []
            assert heard and time.monotonic() - began >= 0.2

            def stop(number: int, frame: object) -> None:
                raise InterruptedError

            signal.signal(signal.SIGUSR1, stop)
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            with pytest.raises(InterruptedError):
                descriptors.ready([reading], 20.0)
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("name", ["tcp", "quic", "datagram", "datagram(connections=2)"])
def test_frames_cross_every_transport_among_thousands_of_files(crowded: None, name: str) -> None:
    transport = parse(name)
    with contextlib.closing(transport.listen("127.0.0.1")) as listener:
        client = transport.connect("127.0.0.1", listener.port, None, 10.0)
        with contextlib.closing(client), contextlib.closing(listener.accept()) as server:
            client.send(wire.End(1, 2, 3), deadline=Deadline(10.0))
            received = server.receive(0, Deadline(10.0))
            assert received is not None and received.header == wire.End(1, 2, 3)


def test_processes_are_heard_and_ended_among_thousands_of_files(crowded: None) -> None:
    with Local().start([sys.executable, "-c", "print('one'); print('two')"], {}) as process:
        assert process.stdout.fileno() > SELECTED
        assert list(lines(process, "it")) == [b"one", b"two"]
    with Local().start(["sleep", "60"], {}) as process:
        assert processes.end(process.pid, processes.start_time(process.pid) or 0)
        assert process.status(10.0) is not None


def test_a_pipe_of_rounds_is_read_among_thousands_of_files(crowded: None) -> None:
    with pipe() as (reading, writing):
        os.write(writing, b"0.5\n1.5\n2")
        assert _drained(reading, wait=True) == [0.5, 1.5]


@pytest.mark.parametrize("count", [2, Waiter.FEW + 2])
def test_a_relay_serves_ports_of_any_number(crowded: None, count: int) -> None:
    waiter = Waiter()
    with contextlib.ExitStack() as closing:
        pipes = [closing.enter_context(pipe()) for _ in range(count)]
        files = [reading for reading, _ in pipes]
        assert waiter.wait(files, 0.01) == []
        os.write(pipes[-1][1], b"x")
        assert waiter.wait(files, 1.0) == [files[-1]]
        assert waiter.wait(files[-1:], 1.0) == files[-1:]


def test_an_echo_talks_to_more_than_select_takes_and_to_those_who_break_off(crowded: None) -> None:
    with Local().start(asking.program(sys.executable, "echo", "127.0.0.1"), {}) as process:
        port = int(next(lines(process, "the echo")))
        with contextlib.ExitStack() as closing:
            for _ in range(SELECTED + 8):
                talking = closing.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10.0))
            rude = socket.create_connection(("127.0.0.1", port))
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            rude.close()  # with a reset
            talking.sendall(b"still there?")
            assert talking.recv(64) == b"still there?"


#: Where every descriptor is known to be a low one: a relay's few, looked at before, and a program that opens three.
SELECTING = {"net/emulators/relay/relay.py", "net/traffic/flow.py"}


def test_nobody_waits_by_select_where_numbers_may_be_high() -> None:
    root = Path(testbed.__file__).parent
    using = {
        str(path.relative_to(root)) for path in root.rglob("*.py") if "select.select(" in path.read_text()
    }
    assert using == SELECTING
