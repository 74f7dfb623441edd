"""Profiles: the texts they are written as, their bounds, and what their queues hold."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from testbed.errors import SpecError, UsageError
from testbed.net.emulators.emulator import refuse_unknown
from testbed.net.profile import jitter
from testbed.net.profile.conditions import CoDel
from testbed.net.profile.jitter import LAWS
from testbed.net.profile.loss import FourState, GilbertElliott, LossModel
from testbed.net.profile.profile import PRESETS, Direction, Profile, Queue, parse_profile, profile_from


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


probabilities = st.floats(0, 1)
codels = st.none() | st.builds(CoDel, st.floats(1e-5, 10), st.floats(1e-4, 60))
queues = st.one_of(
    st.builds(Queue, st.floats(0, 60), st.just("s"), codels),
    st.builds(Queue, st.integers(1500, 10**9).map(float), st.just("bytes"), codels),
    st.builds(Queue, st.floats(1, 1e6), st.just("packets"), codels),
    st.builds(Queue, st.floats(0, 100), st.just("bdp"), codels),
)


@st.composite
def loss_models(draw: st.DrawFn) -> LossModel:
    kind = draw(st.sampled_from(["bursty", "chain", "states"]))
    if kind == "bursty":
        mean = draw(st.floats(1e-4, 0.9))
        return GilbertElliott.bursty(mean, draw(st.floats(max(1.0, mean / (1 - mean) * 1.001), 1e4)))
    if kind == "chain":
        steps = st.just(0.0) | st.floats(1e-9, 1)
        return GilbertElliott(draw(steps), draw(st.floats(0.001, 1)), draw(steps), draw(steps))
    halves = st.just(0.0) | st.floats(1e-9, 0.5)
    return FourState(draw(halves), draw(halves), draw(halves), draw(st.floats(0.001, 1)), draw(halves))


@st.composite
def directions(draw: st.DrawFn, mtu: int = 1500) -> Direction:
    delay = draw(st.floats(1e-9, 60))
    model = draw(st.none() | loss_models())
    return Direction(
        rate_bps=draw(st.none() | st.floats(1e3, 100e9)),
        delay_s=delay,
        jitter_s=draw(st.floats(0, delay)),
        loss=0.0 if model else draw(probabilities),
        queue=draw(queues),
        loss_model=model,
        jitter_law=draw(st.sampled_from(LAWS)),
        jitter_reorders=draw(st.booleans()),
        duplicate=draw(probabilities),
        corrupt=draw(probabilities),
        reorder=draw(probabilities),
        ecn=draw(st.booleans()),
        overhead_bytes=draw(st.integers(0, 1000)),
        mtu=mtu,
        seed=draw(st.none() | st.integers(0, 2**63 - 1)),
    )


@given(directions(), directions())
def test_any_profile_reads_back_from_its_text_unchanged(up: Direction, down: Direction) -> None:
    read = parse_profile(Profile("", up, down).text())
    assert (read.up, read.down) == (up, down)
    assert parse_profile(str(read)) == read


WORDS = (
    "rate= 50mbit , jitter= pareto( 2ms ) loss= gilbert( 1% burst= 4 codel( queue= 1bdp up: down: ; = p13= "
    "states( table( file= /dev/zero reorder ecn=yes"
)
PIECES = WORDS.split()


@given(directions(), directions())
def test_any_profile_survives_the_record_of_a_network(up: Direction, down: Direction) -> None:
    profile = Profile("", up, down)
    assert msgspec.json.decode(msgspec.json.encode(profile), type=Profile) == profile


@given(st.text(max_size=80) | st.lists(st.sampled_from(PIECES), max_size=20).map("".join))
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
        ("delay=1ms,jitter=paretto(1ms)", "did you mean 'pareto'"),
        ("delay=1ms,jitter=pareto(1ms,reordr)", "did you mean 'reorder'"),
        ("delay=1ms,jitter=table(1ms)", "file=FILE"),
        ("delay=1ms,jitter=table(1ms,file=/nowhere/x.dist)", "No such file"),
        ("delay=1ms,jitter=table(1ms,file=/dev/zero)", "not a regular file"),
        ("loss=gilbrt(1%,burst=2)", "did you mean 'gilbert'"),
        ("loss=gilbert(1%)", "burst=4"),
        ("loss=gilbert(50%,burst=1,p=1%)", "burst=4"),
        ("loss=gilbert(90%,burst=2)", "give 9 at least"),
        ("loss=gilbert(1%,burst=many)", "no number"),
        ("loss=states(p13=60%,p14=60%,p31=1%)", "together exceed"),
        ("loss=correlated(0%,10%)", "between"),
        ("queue=red(1bdp)", "codel"),
        ("queue=codel(1bdp,target=0s)", "target"),
        ("ecn=perhaps", "yes or no"),
        ("seed=-1", "whole number"),
        ("mtu=100", "mtu 100 lies outside"),
        ("up:mtu=1400;down:lte", "one mtu"),
        ("reorder=1%", "needs a delay"),
        ("overhead=2kb", "outside"),
    ],
)
def test_a_wrong_text_is_refused_in_one_line_that_says_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(SpecError, match=re.escape(says)) as caught:
        parse_profile(text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("rate", 5e7), ("delay", 20), ("jitter", 2), ("loss", 0.01), ("loss", 1), ("queue", 64000)),
        *(("duplicate", 1), ("corrupt", 0.1), ("reorder", 1), ("overhead", 24)),
    ],
)
def test_a_number_without_its_unit_is_refused_in_a_mapping_as_it_is_in_text(key: str, value: float) -> None:
    for way in (
        lambda: profile_from({"delay": "50ms"} | {key: value}, "here"),
        lambda: parse_profile(f"{key}={value}"),
    ):
        with pytest.raises(SpecError, match=f"{key}.*(no unit|write it as 100ms)"):
            way()
    if key not in ("rate", "queue"):
        assert profile_from({"delay": "50ms"} | {key: 0}, "here") == parse_profile(
            f"delay={'50ms' if key != 'delay' else 0}"
        )


@pytest.mark.parametrize(
    "loss", ["gilbert(0.01,burst=4)", "gilbert(p=1,r=25%)", "correlated(1%,0.25)", "states(p13=0.01,p31=20%)"]
)
def test_a_loss_models_probabilities_have_their_percent_sign(loss: str) -> None:
    with pytest.raises(SpecError, match="no unit"):
        parse_profile(f"delay=1ms,loss={loss}")


def test_yaml_mappings_give_the_same_profiles_as_text() -> None:
    flat = {"rate": "50mbit", "delay": "20ms", "loss": "1%"}
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


def test_every_condition_can_be_written() -> None:
    text = (
        "rate=50mbit,delay=20ms,jitter=pareto(2ms,reorder),loss=gilbert(1%,burst=4),queue=codel(2bdp,target=10ms),"
        "duplicate=0.1%,corrupt=0.2%,reorder=0.3%,ecn=yes,overhead=24b,mtu=1400,seed=7"
    )
    up = parse_profile(text).up
    assert (up.jitter_s, up.jitter_law, up.jitter_reorders) == (0.002, "pareto", True)
    assert up.queue == Queue(2, "bdp", CoDel(0.010, 0.1))
    assert (up.duplicate, up.corrupt, up.reorder, up.ecn) == (0.001, 0.002, 0.003, True)
    assert (up.overhead_bytes, up.mtu, up.seed) == (24, 1400, 7)
    assert parse_profile(str(up)).up == up
    mapping = {"rate": "50mbit", "loss": "gilbert(1%,burst=4)", "ecn": True, "mtu": 1400, "seed": 7}
    same = profile_from(mapping, "here").up
    assert (same.loss_model, same.ecn, same.mtu, same.seed) == (up.loss_model, True, 1400, 7)


def test_a_table_of_ones_own_is_read_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "lte.dist"
    file.write_text("# a comment\n-8192 0\n8192 16384\n")
    profile = parse_profile(f"delay=20ms,jitter=table(2ms,file={file})")
    assert jitter.table(profile.up.jitter_law) == (-8192, 0, 8192, 16384)
    assert parse_profile(str(profile)) == profile
    file.write_text("0 1\n2 three\n")
    with pytest.raises(SpecError, match="line 2: 'three'"):
        parse_profile(str(profile))


@pytest.mark.parametrize("law", LAWS)
def test_each_law_has_mean_zero_and_its_spread(law: str) -> None:
    values = [entry / jitter.TABLE_SCALE for entry in jitter.table(law)]
    assert len(values) == 4096
    assert sum(values) / len(values) == pytest.approx(0, abs=1e-3)
    # A uniform law within one jitter either way deviates by 1/sqrt(3) of it.
    variance = sum(value * value for value in values) / len(values)
    assert variance == pytest.approx(1 / 3 if law == "uniform" else 1, rel=0.01)


def test_a_queue_in_packets_is_counted_in_packets_of_the_profiles_mtu() -> None:
    assert parse_profile("rate=1mbit,mtu=1000,queue=10p").queue_bytes("up") == 10_000


@pytest.mark.parametrize(
    "text",
    [
        "trace:a.csv",
        "delay=20ms,queue=100ms,trace:a.csv(scale=0.5,offset=10s,end=hold,column=down)",
        "up:rate=10mbit,delay=5ms,loss=gilbert(1%,burst=4),outage:5s@1s/60s;down:delay=5ms,sine:1mbit..5mbit*4s",
        "up:trace:a b.up;down:trace:../a.down(scale=2)",
        "rate=5mbit,delay=10ms,jitter=pareto(2ms),flap:10s/1s",
    ],
)
def test_traces_stand_beside_fixed_conditions_and_read_back(text: str) -> None:
    profile = parse_profile(text)
    assert str(profile) == text
    assert parse_profile(str(profile)) == profile
    assert profile.up.beyond_the_basics()["trace"] == str(profile.up.trace)


def test_a_trace_in_yaml_is_a_key_like_the_others() -> None:
    assert profile_from({"delay": "5ms", "trace": "a.csv(scale=2)"}, "here") == parse_profile(
        "delay=5ms,trace:a.csv(scale=2)"
    )
    assert profile_from({"trace": "flap:10s/1s"}, "here") == parse_profile("flap:10s/1s")


def test_a_rate_and_a_trace_that_gives_one_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="gives the rate; leave rate= away"):
        parse_profile("rate=5mbit,sine:1mbit..5mbit*4s")
    (tmp_path / "a.csv").write_text("time_s,rate_mbps,delay_ms\n0,8,5\n")
    profile = parse_profile(f"delay=1ms,trace:{tmp_path}/a.csv")
    with pytest.raises(SpecError, match="it gives the delay; leave delay= away"):
        profile.up.schedule("up", 0.0)


def test_means_and_peaks_stand_for_what_changes(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("time_s,rate_mbps,delay_ms\n0,80,10\n3,160,50\n4,0,50\n")
    profile = parse_profile(f"trace:{tmp_path}/a.csv")
    steady = profile.steady()
    assert (steady.up.rate_bps, steady.up.delay_s) == (80e6, pytest.approx(0.026))
    assert profile.steady(peak=True).up.rate_bps == 160e6
    assert profile.queue_bytes("up") == round(80e6 / 8 * 2 * 0.026)
    assert profile.bdp_bytes() == pytest.approx(160e6 / 8 * 2 * 0.026)
    assert parse_profile("delay=5ms,rate=8mbit").steady() == parse_profile("delay=5ms,rate=8mbit")


def test_what_an_emulator_does_not_know_is_refused_by_name() -> None:
    profile = parse_profile("up:delay=5ms,loss=gilbert(1%,burst=3);down:delay=5ms,duplicate=1%")
    refuse_unknown("some", profile, {"loss model", "duplicate"})
    with pytest.raises(UsageError, match=r"emulator some cannot honour 'duplicate=1%' \(down, duplicate\)"):
        refuse_unknown("some", profile, {"loss model"})
    with pytest.raises(UsageError, match=r"'loss=gilbert\(1%,burst=3\)' \(up, loss model\)"):
        refuse_unknown("some", profile, set())
