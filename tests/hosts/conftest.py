"""A host with an SSH server, and the connection to it, for the tests here; after each nothing is left there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from testbed.hosts.ssh import Ssh
from tests.hosts.bench import Host, assert_nothing_left, bench


@pytest.fixture(scope="module")
def edge() -> Iterator[Host]:
    with bench("edge") as hosts:
        yield hosts["edge"]


@pytest.fixture
def there(edge: Host) -> Iterator[Ssh]:
    with Ssh(edge.url) as made:
        yield made
    assert_nothing_left(edge)
