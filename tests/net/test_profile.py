"""Profiles: the texts they are written as, their bounds, and what their queues hold."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError
from testbed.net.profile import PRESETS, Direction, Profile, Queue, parse_profile, profile_from


def test_inline_conditions_hold_both_ways() -> None:
    profile = parse_profile("rate=50mbit, delay=20ms, jitter=2ms, loss=1%, queue=100p")
    assert profile.up == profile.down == Direction(50e6, 0.020, 0.002, 0.01, Queue(100, "packets"))


def test_each_way_can_be_inline_or_a_presets_half() -> None:
    profile = parse_profile("up:rate=10mbit,delay=30ms;down:5g-mid")
    assert profile.up == Direction(rate_bps=10e6, delay_s=0.030)
    assert profile.down == PRESETS["5g-mid"].down
    assert parse_profile("down:5g-mid;up:rate=10mbit,delay=30ms") == profile


def test_a_presets_name_is_that_preset() -> None:
    for name, preset in PRESETS.items():
        assert parse_profile(name) is preset
        assert str(preset) == name
        assert len(preset.source) > 80


def test_presets_written_out_keep_their_numbers() -> None:
    for preset in PRESETS.values():
        written = parse_profile(preset.text())
        assert (written.up, written.down) == (preset.up, preset.down)


queues = st.one_of(
    st.builds(Queue, st.floats(0, 60), st.just("s")),
    st.builds(Queue, st.integers(1500, 10**9).map(float), st.just("bytes")),
    st.builds(Queue, st.floats(1, 1e6), st.just("packets")),
    st.builds(Queue, st.floats(0, 100), st.just("bdp")),
)


@st.composite
def directions(draw: st.DrawFn) -> Direction:
    delay = draw(st.floats(0, 60))
    return Direction(
        rate_bps=draw(st.none() | st.floats(1e3, 100e9)),
        delay_s=delay,
        jitter_s=draw(st.floats(0, delay)),
        loss=draw(st.floats(0, 1)),
        queue=draw(queues),
    )


@given(directions(), directions())
def test_any_profile_reads_back_from_its_text_unchanged(up: Direction, down: Direction) -> None:
    read = parse_profile(Profile("", up, down).text())
    assert (read.up, read.down) == (up, down)
    assert parse_profile(str(read)) == read


@given(st.text(max_size=80))
def test_any_text_is_a_profile_or_a_spec_error(text: str) -> None:
    try:
        parse_profile(text)
    except SpecError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5g-mdi", "did you mean '5g-mid'"),
        ("rat=5mbit", "did you mean 'rate'"),
        ("rate=50mbps", "unknown unit 'mbps'"),
        ("rate=1mbit,rate=2mbit", "twice"),
        ("rate=10bit", "outside"),
        ("rate=200gbit", "outside"),
        ("delay=2min", "outside"),
        ("loss=101%", "outside"),
        ("delay=1ms,jitter=2ms", "exceeds the delay"),
        ("queue=3", "100p"),
        ("queue=1e9bdp", "outside"),
        ("queue=100b", "outside"),
        ("up:5g-mid", "one way is missing"),
        ("up:5g-mid;up:lte", "each once"),
        ("rate=nanmbit", "expected a number"),
        ("delay", "unknown profile"),
        ("rate=1mbit,,", "not key=value"),
        ("x" * 5000, "longer than"),
    ],
)
def test_a_wrong_text_is_refused_in_one_line_that_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=says.replace("(", r"\(")) as caught:
        parse_profile(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_yaml_mappings_give_the_same_profiles_as_text() -> None:
    flat = {"rate": "50mbit", "delay": "20ms", "loss": 0.01}
    assert profile_from(flat, "here") == parse_profile("rate=50mbit,delay=20ms,loss=1%")
    both = {"up": flat, "down": "lte"}
    assert profile_from(both, "here") == parse_profile("up:rate=50mbit,delay=20ms,loss=1%;down:lte")


@pytest.mark.parametrize(
    "value", [{}, {"up": "lte"}, {"up": 3, "down": "lte"}, [1], None, 7, {"rate": []}, {"rate": True}]
)
def test_a_wrong_yaml_value_is_refused_naming_the_place(value: object) -> None:
    with pytest.raises(SpecError, match=r"^links\[1\].profile: "):
        profile_from(value, "links[1].profile")


def test_a_queue_is_one_bdp_by_default_and_never_below_64_kb() -> None:
    # 50 Mbit/s x 60 ms round trip = 375000 bytes; 1 Mbit/s x 60 ms = 7500 bytes
    profile = parse_profile("up:rate=50mbit,delay=20ms;down:rate=1mbit,delay=40ms")
    assert profile.queue_bytes("up") == 375_000
    assert profile.queue_bytes("down") == 64_000


@pytest.mark.parametrize(
    ("queue", "expected"),
    [("2bdp", 500_000), ("100ms", 625_000), ("64kb", 64_000), ("10p", 15_000), ("0s", 1500), ("2kib", 2048)],
)
def test_queues_in_all_units_come_out_in_bytes(queue: str, expected: int) -> None:
    profile = parse_profile(f"rate=50mbit,delay=20ms,queue={queue}")  # one BDP: 50e6 / 8 * 0.04 = 250000
    assert profile.queue_bytes("up") == expected


def test_without_a_rate_only_sizes_are_a_size() -> None:
    assert parse_profile("delay=20ms").queue_bytes("up") is None
    assert parse_profile("delay=20ms,queue=100ms").queue_bytes("up") is None
    assert parse_profile("delay=20ms,queue=10p").queue_bytes("up") == 15_000
