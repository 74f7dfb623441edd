"""What all tests share: hypothesis profiles, skips that say why, and which tests run beside which (`make test`)."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import kernel, tiny_models

settings.register_profile(
    "fast", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
settings.register_profile("long", max_examples=10_000, deadline=None, suppress_health_check=list(HealthCheck))
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))

MODEL = "smollm2-135m"
NETWORKS = "networks"

if "PYTEST_XDIST_WORKER" in os.environ:  # a worker has one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.pop("COLUMNS", None)  # which pytest-xdist sets; what is printed into a pipe has no width


@pytest.hookimpl(tryfirst=True)  # before -m deselects
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    _mark_products(items)
    _mark_lanes(items)
    if hasattr(config, "workerinput"):
        items.sort(key=_turn)
    reasons: dict[str, str | None] = {}
    for item in items:
        for marker in ("netns", "netem", "model"):
            if item.get_closest_marker(marker):
                if marker not in reasons:
                    reasons[marker] = _missing(marker)
                if reasons[marker]:
                    item.add_marker(pytest.mark.skip(reason=reasons[marker] or ""))


def _mark_products(items: list[pytest.Item]) -> None:
    """Mark as `full`, of a test with the product of several parameters, all but a diagonal on which each value stands once.
    Of a part of a product those stay that bring a value which no earlier one has."""
    tests: dict[Any, list[pytest.Item]] = {}
    for item in items:
        if len(getattr(getattr(item, "callspec", None), "params", ())) > 1:
            tests.setdefault((item.parent, getattr(item, "originalname", "")), []).append(item)
    for cases in tests.values():
        seen: dict[str, dict[str, int]] = {}
        places, brings = [], []
        for case in cases:
            before = sum(map(len, seen.values()))
            values = getattr(case, "callspec").params.items()  # noqa: B009
            places.append(
                [(known := seen.setdefault(name, {})).setdefault(repr(v), len(known)) for name, v in values]
            )
            brings.append(sum(map(len, seen.values())) > before)
        sizes = [len(known) for known in seen.values()]
        if len(cases) == math.prod(sizes):
            diagonal = [[i % size for size in sizes] for i in range(max(sizes))]
            brings = [place in diagonal for place in places]
        for case, stays in zip(cases, brings, strict=True):
            if not stays:
                case.add_marker(pytest.mark.full)


def _mark_lanes(items: list[pytest.Item]) -> None:
    """What measures links has the machine for itself; what else builds networks does so one after the other."""
    for item in items:
        if item.get_closest_marker("netns") or item.get_closest_marker("netem"):
            of_links = item.path.parent.name == "net"
            item.add_marker(pytest.mark.alone if of_links else pytest.mark.xdist_group(NETWORKS))


def _turn(item: pytest.Item) -> int:
    """The order in which workers begin: what takes longest in one piece comes first."""
    if item.path.name == "test_netem_guest.py":
        return 0
    return 1 if item.get_closest_marker("xdist_group") else 2


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tests that build networks see each other's: better none runs than two at once, where pytest-xdist did not group them."""
    if session.config.getoption("loadgroup", False):
        for item in session.items:
            if item.get_closest_marker("xdist_group") and not item.nodeid.endswith(f"@{NETWORKS}"):
                raise pytest.UsageError(f"this pytest-xdist does not group tests: {item.nodeid}")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where tests are run by several workers: those of a group by one of them, and those of a file, whose fixtures they share."""
    from xdist.scheduler import LoadGroupScheduling

    class Lanes(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(super()._split_scope(nodeid)).split("::")[0]

    return Lanes(config, log)


def _missing(marker: str) -> str | None:
    """Why tests with this marker cannot run here; None where they can."""
    if marker == "model":
        from testbed.errors import UsageError
        from testbed.models.sources import resolve

        try:
            resolve(MODEL)
        except UsageError as error:
            return str(error)
        return None
    return (kernel.lacks_netem() if marker == "netem" else kernel.lacks_namespaces()) or None


@pytest.fixture(autouse=True)
def _on_the_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models compute on the processor, as what they are compared with, but where a test is of GPUs too."""
    if not getattr(request.module, "ON_GPUS", False) and "torch" in sys.modules:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture
def data() -> Path:
    """The question sets that are no part of the project; tests that use them are skipped without."""
    path = Path(os.environ.get("TESTBED_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no data sets at {path}")
    return path


@pytest.fixture(scope="module")
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A module's networks have a directory of states of their own: nobody else cleans them away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TESTBED_STATE", str(tmp_path_factory.mktemp("state")))
        yield


tiny_model = tiny_models.tiny_model
