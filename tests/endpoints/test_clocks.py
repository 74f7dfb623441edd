"""Two clocks: the cloud's times on the edge's, no further off than is stated; with one clock nothing is asked."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from testbed.endpoints.clocks import Clocks
from testbed.endpoints.endpoint import Endpoint
from testbed.endpoints.protocol import LINK, Link
from testbed.endpoints.spans import bound, hidden
from testbed.errors import EndpointError
from testbed.hosts.local import Local
from testbed.transport.clock import DRIFT, Clock, Offset, offset
from tests.endpoints.pair import Pair, in_this_process

AHEAD_S = 3.0

way = st.floats(1e-5, 0.2)
many_ways = st.lists(st.tuples(way, way), min_size=16, max_size=16)


def looked(
    there: Callable[[float], float], now: float, ways: list[tuple[float, float]], busy: float
) -> tuple[list[tuple[float, float, float, float]], float]:
    """A set of exchanges that begins at a moment, and when it is over. there: what the other clock says at a moment."""
    exchanges = []
    for up, down in ways:
        exchanges.append((now, there(now + up), there(now + up + busy), now + up + busy + down))
        now += up + busy + down
    return exchanges, now


@given(
    ahead=st.floats(-1e4, 1e4),
    drift=st.floats(-50e-6, 50e-6),
    ways=many_ways,
    busy=st.floats(0, 0.01),
    took=st.floats(0.01, 100),
    share=st.floats(0, 1),
)
def test_a_time_of_the_other_clock_is_no_further_off_than_is_stated(
    ahead: float, drift: float, ways: list[tuple[float, float]], busy: float, took: float, share: float
) -> None:
    def there(now: float) -> float:
        return 2e4 + ahead + now * (1 + drift)

    first, began = looked(there, 100.0, ways[:8], busy)
    second, _ = looked(there, began + took, ways[8:], busy)
    clock = Clock(offset(first), offset(second))
    moment = began + share * took
    assert abs(clock.here(there(moment)) - moment) <= clock.error_s + 1e-9
    assert clock.jumped_s == 0.0
    least = max(min((up + down) / 2 for up, down in half) for half in (ways[:8], ways[8:]))
    assert clock.error_s <= 1.001 * least + 1e-6 * (took + 10) + 200e-6 * 0.02


@given(
    drift=st.floats(-50e-6, 50e-6),
    ways=many_ways,
    took=st.floats(0.01, 100),
    by=st.floats(-1e3, 1e3),
    when=st.floats(0, 1),
)
def test_a_clock_that_jumps_between_two_looks_is_found_out(
    drift: float, ways: list[tuple[float, float]], took: float, by: float, when: float
) -> None:
    """It is set, or its machine stood still. What drift may have made is none."""
    over = 100.0 + sum(map(sum, ways[:8]))

    def there(now: float) -> float:
        return 2e4 + now * (1 + drift) + (by if now > over + when * took else 0.0)

    first, _ = looked(there, 100.0, ways[:8], 0.0)
    second, _ = looked(there, over + took, ways[8:], 0.0)
    before, behind = offset(first), offset(second)
    assert Clock(before).jumped_s == 0.0
    assume(abs(by) > 2 * (before.error_s + behind.error_s) + 2 * DRIFT * (took + 20))
    assert Clock(before, behind).jumped_s == pytest.approx(by, abs=before.error_s + behind.error_s + 0.01)


def test_a_request_within_which_the_clouds_clock_jumps_is_an_error_and_the_next_is_none(
    alone: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = alone.ask("int8", link={"apart": True}).answer
    behind = Clocks.behind
    with monkeypatch.context() as patch:

        def later(clocks: Clocks, link: Link, before: Offset) -> Offset:
            found = behind(clocks, link, before)
            return Offset(found.at, found.ahead_s - 0.5, found.error_s)

        patch.setattr(Clocks, "behind", later)
        with pytest.raises(
            EndpointError, match=r"clock jumped by -0\.5\d\d s .*none of its times can be told"
        ):
            alone.ask("int8", link={"apart": True})
    assert alone.ask("int8", link={"apart": True}).answer == answer


class Elsewhere(Local):
    """This machine, with a monotonic clock of its own (time_namespaces(7))."""

    def command(self, argv: list[str]) -> list[str]:  # type: ignore[override]
        return [
            "unshare",
            "--time",
            "--monotonic",
            str(int(AHEAD_S)),
            "--fork",
            "--kill-child",
            "--",
            *super().command(argv),
        ]


def clocks_can_be_apart() -> bool:
    ask = ["unshare", "--time", "--monotonic", "3", "--fork", "true"]
    return (
        bool(shutil.which("unshare"))
        and subprocess.run(ask, capture_output=True, check=False).returncode == 0
    )


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], Path]) -> Path:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def alone(model: Path) -> Pair:
    return in_this_process(model)


@pytest.mark.skipif(not clocks_can_be_apart(), reason="no time namespaces here")
@pytest.mark.parametrize("transport", ["tcp", "tcp(connection=reuse)", "quic"])
def test_a_cloud_whose_clock_is_ahead_is_told_in_the_edges_times(
    model: Path, alone: Pair, tmp_path: Path, transport: str
) -> None:
    from testbed.endpoints.protocol import Serve

    with ExitStack() as stack:
        edge = stack.enter_context(Endpoint.start("edge", Local(), tmp_path / "edge.log").process)
        cloud = stack.enter_context(Endpoint.start("cloud", Elsewhere(), tmp_path / "cloud.log").process)
        pair = Pair(Endpoint("edge", edge), Endpoint("cloud", cloud), model)
        link = {"apart": True, "transport": transport}
        link["port"] = pair.cloud.call(Serve(1 << 22, transport=transport), 10)
        for what, about in (
            ("cloud", {}),
            ("int8", {}),
            ("int8", {"delivery": "stream(chunk=64)"}),
            ("int8", {"delivery": "stream(by=layers)"}),
            ("int8", {"delivery": "meet(chunk=64)", "placement": "store"}),
            ("planes", {"delivery": "progressive(planes=3)"}),
        ):
            result = pair.ask(what, link=link, **about)
            assert abs(result.clock_offset_s - AHEAD_S) <= result.clock_error_s < 0.1
            assert result.answer == alone.ask(what, **about).answer
            crossed = [span for span in result.spans if span.side == LINK]
            assert (
                all(0 <= span.start <= span.end <= result.e2e_s + 1e-5 for span in result.spans) and crossed
            )
            assert hidden(result.spans) >= 0 and bound(result.spans) > 0


def test_with_one_clock_nothing_is_asked(alone: Pair) -> None:
    one, two = alone.ask("int8"), alone.ask("int8", link={"apart": True})
    assert (one.clock_offset_s, one.clock_error_s) == (0.0, 0.0)
    assert two.clock_error_s > 0 and abs(two.clock_offset_s) <= two.clock_error_s
    assert (two.answer, two.payload_bytes) == (one.answer, one.payload_bytes)
